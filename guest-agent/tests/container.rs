//! What the agent makes of an OCI runtime spec, seen from inside the container.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use guest::{Guest, fresh_name, install};
use hull_proto::{ExitStatus, FailureKind};
use serde_json::{Value, json};

macro_rules! guest {
    () => {
        match Guest::start() {
            Some(guest) => guest,
            None => return,
        }
    };
}

fn add_mount(spec: &mut Value, mount: Value) {
    if let Value::Array(all) = &mut spec["mounts"] {
        all.push(mount);
    }
}

#[test]
fn names_limits_and_namespaces_are_the_containers() {
    let guest = guest!();
    let mut spec = guest.spec(
        "hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/net/ipv4/ip_forward;
        ulimit -n; umask; cat /proc/self/oom_score_adj; echo $$; ip -o link | wc -l; pwd; echo $HOME",
    );
    spec["domainname"] = json!("example");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}]);
    spec["process"]["oomScoreAdj"] = json!(77);
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 0o027});
    spec["process"]["cwd"] = json!("/made/here");
    let text = guest.run(spec).text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "box",
            "example",
            "1",
            "123",
            "0027",
            "77",
            "1",
            "1",
            "/made/here",
            "/root"
        ]
    );
}

#[test]
fn a_user_has_its_ids_groups_and_home() {
    let guest = guest!();
    for (user, expected) in [
        (
            json!({"uid": 7, "gid": 8, "additionalGids": [9, 10]}),
            "7 8 8 9 10 /",
        ),
        (json!({"uid": 1000, "gid": 1}), "1000 1 1 /home/app"),
        (
            json!({"uid": 0, "gid": 0, "username": "app"}),
            "1000 1001 1001 50 63 /home/app",
        ),
        (
            json!({"uid": 0, "gid": 0, "username": "app:50"}),
            "1000 50 50 /home/app",
        ),
        (
            json!({"uid": 0, "gid": 0, "username": "12:staff"}),
            "12 50 50 /",
        ),
    ] {
        let mut spec =
            guest.spec("echo $(id -u) $(id -g) $(id -G) $HOME; echo to-stderr >/dev/stderr");
        spec["process"]["user"] = user;
        assert_eq!(guest.run(spec).text().trim(), expected);
    }
    let mut spec = guest.spec("true");
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "username": "bob"});
    let failure = guest.run(spec).failure();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert_eq!(
        failure.message,
        "unable to find user bob: no matching entries in passwd file"
    );
}

#[test]
fn hostile_passwd_files_hold_nothing_up() {
    let guest = guest!();
    let passwd = guest.root().join("etc/passwd");
    fs::remove_file(&passwd).unwrap();
    symlink("/proc/self/fd/0", &passwd).unwrap();
    let mut spec = guest.spec("echo fine");
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "username": "5"});
    assert_eq!(guest.run(spec.clone()).text(), "fine\n");
    fs::remove_file(&passwd).unwrap();
    symlink("/dev/zero", &passwd).unwrap();
    assert_eq!(guest.run(spec.clone()).text(), "fine\n");
    fs::remove_file(&passwd).unwrap();
    let file = fs::File::create(&passwd).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_eq!(guest.run(spec).text(), "fine\n");
}

#[test]
fn capabilities_are_what_the_spec_lists() {
    let guest = guest!();
    let script = "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status |
        tr -d '\\t' | tr '\\n' ' '";
    let mut spec = guest.spec(script);
    let two = json!(["CAP_CHOWN", "CAP_KILL"]);
    spec["process"]["capabilities"] = json!({"bounding": two, "permitted": two,
        "effective": two, "inheritable": two, "ambient": ["CAP_KILL"]});
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["noNewPrivileges"] = json!(true);
    assert_eq!(
        guest.run(spec).text().trim(),
        "CapInh:0000000000000021 CapPrm:0000000000000020 CapEff:0000000000000020 \
         CapBnd:0000000000000021 CapAmb:0000000000000020 NoNewPrivs:1"
    );
    let mut spec = guest.spec("mount -t tmpfs none /tmp 2>&1 || echo denied");
    spec["process"]["capabilities"] = json!({});
    assert!(guest.run(spec).text().contains("denied"));
}

#[test]
fn masked_and_read_only_paths_hold() {
    let guest = guest!();
    let script = "cat /proc/keys; ls /sys/firmware | wc -l; cat /etc/passwd; ls /bin | wc -l;
        echo 1 > /proc/sys/kernel/hostname || echo proc-sys-ro;
        echo x > /sys/kernel/x || echo sys-ro; umount /proc/keys || echo no-umount";
    let mut spec = guest.spec(script);
    let masked = spec["linux"]["maskedPaths"].as_array_mut().unwrap();
    masked.extend([json!("/etc/passwd"), json!("/etc/group"), json!("/missing")]);
    let text = guest.run(spec).text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "0", "{text}");
    assert!(lines[1].parse::<u32>().unwrap() > 100, "{text}");
    assert_eq!(lines[2..], ["proc-sys-ro", "sys-ro", "no-umount"]);
}

#[test]
fn a_masked_directory_is_empty_and_can_be_masked_twice() {
    let guest = guest!();
    for dir in ["one", "two"] {
        fs::create_dir_all(guest.root().join(dir)).unwrap();
        fs::write(guest.root().join(dir).join("secret"), "x").unwrap();
    }
    let mut spec = guest.spec("ls /one /two; touch /one/x || echo ro");
    spec["linux"]["maskedPaths"] = json!(["/one", "/two", "/one"]);
    assert_eq!(guest.run(spec).text(), "/one:\n\n/two:\nro\n");
}

#[test]
fn a_read_only_root_is_read_only_and_its_volumes_are_not() {
    let guest = guest!();
    let volume = guest.beside("volume");
    let mut spec = guest.spec("touch /x || echo ro; touch /v/x && echo rw; touch /w/x || echo ro");
    spec["root"]["readonly"] = json!(true);
    for (place, access) in [("/v", "rw"), ("/w", "ro")] {
        fs::create_dir_all(guest.root().join(&place[1..])).unwrap();
        add_mount(
            &mut spec,
            json!({"destination": place, "type": "bind", "source": volume,
                "options": ["rbind", "rprivate", access]}),
        );
    }
    assert_eq!(guest.run(spec).text(), "ro\nrw\nro\n");
    assert!(volume.join("x").exists());
}

#[test]
fn files_directories_and_tmpfs_are_mounted_as_asked() {
    let guest = guest!();
    let file = guest.beside("files").join("config");
    fs::write(&file, "from the host\n").unwrap();
    let mut spec = guest.spec(
        "cat /etc/deep/config; stat -c %a /scratch; df -k /scratch | tail -1 | awk '{print $2}';
        touch /scratch/x; chmod +x /scratch/x; /scratch/x || echo noexec",
    );
    add_mount(
        &mut spec,
        json!({"destination": "/etc/deep/config", "type": "bind", "source": file,
            "options": ["bind", "ro"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
            "options": ["noexec", "size=1m", "mode=1770"]}),
    );
    assert_eq!(
        guest.run(spec).text(),
        "from the host\n1770\n1024\nnoexec\n"
    );
    let mut spec = guest.spec("true");
    add_mount(
        &mut spec,
        json!({"destination": "/x", "type": "bind", "source": "/no/such/thing",
            "options": ["bind"]}),
    );
    let failure = guest.run(spec).failure();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert_eq!(
        failure.message,
        "cannot mount /x: no such file or directory"
    );
}

#[test]
fn links_of_an_image_lead_no_mount_out_of_its_root() {
    let guest = guest!();
    let outside = guest.beside("outside");
    symlink(&outside, guest.root().join("volume")).unwrap();
    symlink("../../../../../../..", guest.root().join("up")).unwrap();
    let source = guest.beside("source");
    fs::write(source.join("mark"), "").unwrap();
    let inside = format!("ls {}", outside.join("sub").display());
    let mut spec = guest.spec(&inside);
    add_mount(
        &mut spec,
        json!({"destination": "/volume/sub", "type": "bind", "source": source, "options": ["bind"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/up/tmp/over", "type": "bind", "source": source, "options": ["bind"]}),
    );
    assert_eq!(guest.run(spec).text(), "mark\n");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(guest.root().join("tmp/over").is_dir());
}

#[test]
fn proc_is_not_mounted_through_a_link() {
    let guest = guest!();
    fs::remove_dir(guest.root().join("proc")).unwrap();
    symlink("tmp", guest.root().join("proc")).unwrap();
    let failure = guest.run(guest.spec("true")).failure();
    assert!(
        failure.message.starts_with("cannot mount /proc"),
        "{}",
        failure.message
    );
}

#[test]
fn devices_are_there_and_work() {
    let guest = guest!();
    let script =
        "cd /dev; for d in null zero full random urandom tty; do stat -c '%n %F %t:%T %a' $d; done;
        readlink fd; readlink ptmx; head -c 4 zero | od -An -tx1; echo x > null; echo x > full || echo full;
        stat -c '%t:%T %a %u' mine";
    let mut spec = guest.spec(script);
    spec["linux"]["devices"] = json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3,
        "fileMode": 0o640, "uid": 5, "gid": 6}]);
    let text = guest.run(spec).text();
    let expected = "null character special file 1:3 666\nzero character special file 1:5 666\n\
        full character special file 1:7 666\nrandom character special file 1:8 666\n\
        urandom character special file 1:9 666\ntty character special file 5:0 666\n\
        /proc/self/fd\npts/ptmx\n 00 00 00 00\nfull\n1:3 640 5\n";
    assert_eq!(text, expected);
}

#[test]
fn commands_that_cannot_run_say_why_in_the_engines_words() {
    let guest = guest!();
    let root = guest.root();
    fs::write(root.join("plain"), "x").unwrap();
    for (program, text) in [
        ("noise", "\x00\x01garbage"),
        ("script", "#!/no/such/interpreter\n"),
    ] {
        let written = root.join("tmp").join(program);
        fs::write(&written, text).unwrap();
        install(&written, &root.join(program));
    }
    use FailureKind::{NotExecutable, NotFound, Refused};
    for (command, kind, message) in [
        (
            "foo",
            NotFound,
            "exec: \"foo\": executable file not found in $PATH",
        ),
        (
            "/x",
            NotFound,
            "exec: \"/x\": stat /x: no such file or directory",
        ),
        (
            "/plain",
            NotExecutable,
            "exec: \"/plain\": permission denied",
        ),
        ("/etc", NotExecutable, "exec: \"/etc\": is a directory"),
        ("/noise", NotExecutable, "exec /noise: exec format error"),
        (
            "/script",
            NotFound,
            "exec /script: no such file or directory",
        ),
        ("", Refused, "no command specified"),
    ] {
        let mut spec = guest.spec("");
        spec["process"]["args"] = json!([command]);
        let failure = guest.run(spec).failure();
        assert_eq!((failure.kind, failure.message.as_str()), (kind, message));
    }
}

#[test]
fn working_directories_that_cannot_be_are_refused() {
    let guest = guest!();
    let mut spec = guest.spec("true");
    spec["process"]["cwd"] = json!("/etc/passwd");
    let failure = guest.run(spec).failure();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert_eq!(
        failure.message,
        "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory"
    );
    // A descriptor of the agent's, were one open, would lead out of the container here.
    for number in 3..12 {
        let mut spec = guest.spec("pwd -P; ls");
        spec["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let outcome = guest.run(spec);
        let inside = outcome.end.is_err() || !outcome.text().contains("root");
        assert!(inside, "descriptor {number}");
    }
}

#[test]
fn seccomp_denies_what_the_profile_denies() {
    let guest = guest!();
    for no_new_privileges in [false, true] {
        let mut spec =
            guest.spec("mkdir /tmp/d 2>/dev/null || echo denied; grep Seccomp: /proc/self/status");
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]});
        assert_eq!(guest.run(spec).text(), "denied\nSeccomp:\t2\n");
    }
}

#[test]
fn a_user_namespace_maps_its_root() {
    let guest = guest!();
    let chown = |path: &std::path::Path| {
        std::os::unix::fs::chown(path, Some(100_000), Some(100_000)).unwrap();
    };
    chown(&guest.root());
    for dir in ["dev", "proc", "sys", "tmp"] {
        chown(&guest.root().join(dir));
    }
    let mut spec = guest.spec("id -u; cat /proc/self/uid_map; echo x > /dev/null && echo null");
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let root_path = guest.root();
    let nest = root_path.parent().unwrap();
    fs::set_permissions(nest, fs::Permissions::from_mode(0o755)).unwrap();
    let text = guest.run(spec).text();
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "65536", "null"]);
}

#[test]
fn memory_beyond_the_limit_ends_in_an_oom_kill() {
    let guest = guest!();
    let controllers = "/sys/fs/cgroup/cgroup.controllers";
    if !fs::read_to_string(controllers).is_ok_and(|all| all.contains("memory")) {
        eprintln!("SKIP: the memory controller is not on this machine's unified hierarchy");
        return;
    }
    let mut spec = guest.spec("exec tail /dev/zero");
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    let end = guest.create(&fresh_name(), spec, false).finish().end;
    let killed = ExitStatus::Signaled {
        signal: 9,
        oom: true,
    };
    assert_eq!(end, Ok(killed));
}
