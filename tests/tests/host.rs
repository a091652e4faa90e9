//! The emulated KVM host itself, from outside.
//!
//! Most cases share the warm machine; where this machine's own KVM is real they hold there too.

#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use hull_tests::host::{Host, Options};
use hull_tests::process::Output;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

fn host() -> Option<Host> {
    Host::acquire_or_skip(&Options::default())
}

fn shell(host: &Host, script: &str) -> Output {
    host.command(["sh", "-c", script]).output().unwrap()
}

/// A directory that both sides see, gone at the end.
struct Shared(PathBuf);

impl Shared {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("host-test-{}-{number}", std::process::id());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_exit_code_and_both_streams_come_through_apart() {
    let Some(host) = host() else { return };
    let done = shell(&host, "echo out; echo err >&2; exit 7");
    assert_eq!(
        (done.code, done.text(), done.errors()),
        (7, "out\n".into(), "err\n".into())
    );
}

#[test]
fn a_fatal_signal_is_128_and_its_number() {
    let Some(host) = host() else { return };
    assert_eq!(shell(&host, "kill -SEGV $$").code, 139);
}

#[test]
fn stdin_arrives_whole_and_ends() {
    let Some(host) = host() else { return };
    let sent: Vec<u8> = (0..1_500_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let done = host.command(["cat"]).stdin(sent.clone()).output().unwrap();
    assert_eq!(done.code, 0);
    assert!(done.stdout == sent, "{} bytes came back", done.stdout.len());
}

#[test]
fn a_command_that_ignores_its_stdin_still_ends() {
    let Some(host) = host() else { return };
    let done = host
        .command(["true"])
        .stdin(vec![0; 1 << 20])
        .output()
        .unwrap();
    assert_eq!(done.code, 0);
}

#[test]
fn signals_reach_the_command() {
    let Some(host) = host() else { return };
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut running = host.command(["sh", "-c", script]).spawn().unwrap();
    running.await_stdout("ready").unwrap();
    running.signal(SIGINT).unwrap();
    let done = running.wait().unwrap();
    assert_eq!((done.code, done.text()), (9, "ready\ncaught\n".into()));

    let mut running = host
        .command(["sh", "-c", "echo up; exec sleep 60"])
        .spawn()
        .unwrap();
    running.await_stdout("up").unwrap();
    running.signal(SIGTERM).unwrap();
    assert_eq!(running.wait().unwrap().code, 128 + i32::from(SIGTERM));
}

#[test]
fn a_command_whose_caller_is_gone_is_killed() {
    let Some(host) = host() else { return };
    let shared = Shared::new();
    let script =
        "trap 'touch hup' HUP; echo up; for i in $(seq 600); do sleep 0.1; done; touch late";
    let mut running = host
        .command(["sh", "-c", script, "the-abandoned-one"])
        .cwd(&shared.0)
        .spawn()
        .unwrap();
    running.await_stdout("up").unwrap();
    drop(running);
    // It's gone when nothing of that name is left; the pattern doesn't match its own searcher.
    let gone = "while pgrep -f 'the-abandoned-[o]ne' >/dev/null; do sleep 0.1; done";
    assert_eq!(shell(&host, gone).code, 0);
    assert!(!shared.0.join("late").exists());
}

#[test]
fn directory_and_environment_are_the_callers() {
    let Some(host) = host() else { return };
    let shared = Shared::new();
    let done = host
        .command(["sh", "-c", "pwd; echo $HULL_HOST_TEST"])
        .cwd(&shared.0)
        .env("HULL_HOST_TEST", "a value")
        .output()
        .unwrap();
    assert_eq!(done.text(), format!("{}\na value\n", shared.0.display()));
}

#[test]
fn commands_that_cannot_start_are_told_apart() {
    let Some(host) = host() else { return };
    if host.is_native() {
        return; // std::process reports these to the test itself there
    }
    let code = |command: &str| host.command([command]).output().unwrap().code;
    assert_eq!(code("no-such-command"), 127);
    assert_eq!(code("/etc/passwd"), 126);
    let lost = host
        .command(["true"])
        .cwd("/no/such/directory")
        .output()
        .unwrap();
    assert_eq!(lost.code, 125);
}

#[test]
fn a_terminal_has_its_size_and_is_the_commands_own() {
    let Some(host) = host() else { return };
    if host.is_native() {
        return; // the caller's own terminal is used there
    }
    let script = "stty size; test -t 0 && test -t 2 && echo terminal; ps -o tty= -p $$";
    let done = host
        .command(["sh", "-c", script])
        .terminal(33, 99)
        .output()
        .unwrap();
    assert!(
        done.text().starts_with("33 99\r\nterminal\r\npts/"),
        "{:?}",
        done.text()
    );
}

#[test]
fn many_commands_run_at_once() {
    let Some(host) = host() else { return };
    let shared = Shared::new();
    // Each waits for all the others.
    let script = "touch $0; while [ $(ls | wc -l) -lt 6 ]; do sleep 0.1; done; echo $0";
    let running: Vec<_> = (0..6)
        .map(|number| {
            host.command([
                "sh".to_owned(),
                "-c".to_owned(),
                script.to_owned(),
                number.to_string(),
            ])
            .cwd(&shared.0)
            .spawn()
            .unwrap()
        })
        .collect();
    for (number, command) in running.into_iter().enumerate() {
        assert_eq!(command.wait().unwrap().text(), format!("{number}\n"));
    }
}

#[test]
fn kvm_answers() {
    let Some(host) = host() else { return };
    // KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CREATE_VCPU of Documentation/virt/kvm/api.rst.
    let script = "$k = 0; open(my $f, '+<', '/dev/kvm') or die $!; \
                  print ioctl($f, 0xAE00, 0), \"\\n\"; \
                  ioctl($f, 0xAE01, 0) or die \"no VM: $!\";";
    let done = host.command(["perl", "-e", script]).output().unwrap();
    assert_eq!(
        (done.text(), done.errors(), done.code),
        ("12\n".into(), String::new(), 0)
    );
}

#[test]
fn what_containers_need_is_there() {
    let Some(host) = host() else { return };
    if host.is_native() {
        return; // the machine's owner decides there
    }
    let done = shell(
        &host,
        "set -e
         cat /sys/fs/cgroup/cgroup.subtree_control
         mkdir /sys/fs/cgroup/test-$$ && rmdir /sys/fs/cgroup/test-$$
         for device in kvm net/tun vhost-vsock vsock fuse loop-control ptmx; do test -c /dev/$device; done
         cd $(mktemp -d); mkdir lower upper work merged; echo low > lower/file
         mount -t overlay o -olowerdir=lower,upperdir=upper,workdir=work merged
         echo high > merged/file; cat upper/file lower/file; umount merged
         mount | grep -q '^shm on /dev/shm'
         unshare --net true
         ls /sys/class/net",
    );
    assert_eq!(done.code, 0, "{}", done.errors());
    let text = done.text();
    let mut lines = text.lines();
    let controllers = lines.next().unwrap();
    for controller in ["cpuset", "cpu", "io", "memory", "pids"] {
        assert!(
            controllers.split(' ').any(|known| known == controller),
            "{controllers}"
        );
    }
    assert_eq!(lines.collect::<Vec<_>>(), ["high", "low", "lo"]);
}

#[test]
fn a_file_changed_outside_is_seen_inside_and_back() {
    let Some(host) = host() else { return };
    let shared = Shared::new();
    let file = shared.0.join("file");
    let inside = || {
        host.command(["cat", "file"])
            .cwd(&shared.0)
            .output()
            .unwrap()
            .text()
    };
    fs::write(&file, "first").unwrap();
    assert_eq!(inside(), "first");
    fs::write(&file, "again").unwrap(); // in place, of the same length
    assert_eq!(inside(), "again");
    fs::write(shared.0.join("new"), "renamed").unwrap();
    fs::rename(shared.0.join("new"), &file).unwrap();
    assert_eq!(inside(), "renamed");
    host.command(["sh", "-c", "echo inside > file"])
        .cwd(&shared.0)
        .output()
        .unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "inside\n");
}

#[test]
fn a_program_rebuilt_while_it_runs_is_the_new_one_next_time() {
    let Some(host) = host() else { return };
    let shared = Shared::new();
    let program = shared.0.join("program");
    fs::copy("/bin/sleep", &program).unwrap();
    let old = host
        .command(["sh", "-c", "echo up; exec ./program 60"])
        .cwd(&shared.0);
    let mut old = old.spawn().unwrap();
    old.await_stdout("up").unwrap();
    fs::remove_file(&program).unwrap();
    fs::copy("/bin/true", &program).unwrap();
    // The old one would complain about its missing operand.
    let new = host.command(["./program"]).cwd(&shared.0).output().unwrap();
    assert_eq!((new.code, new.errors()), (0, String::new()));
}

#[test]
fn the_rest_of_the_outer_root_is_never_written() {
    let Some(host) = host() else { return };
    if host.is_native() {
        return;
    }
    let name = format!("/etc/hull-host-test-{}", std::process::id());
    assert_eq!(
        shell(&host, &format!("echo x > {name} && cat {name}")).text(),
        "x\n"
    );
    assert!(!PathBuf::from(&name).exists());
}

#[test]
fn a_machine_that_dies_is_said_and_replaced() {
    let options = Options {
        name: "dying".into(),
        memory: 1024,
        ..Options::default()
    };
    let Some(host) = Host::acquire_or_skip(&options) else {
        return;
    };
    if host.is_native() {
        return;
    }
    let mut running = host
        .command(["sh", "-c", "echo up; sleep 60"])
        .spawn()
        .unwrap();
    running.await_stdout("up").unwrap();
    assert!(Host::stop(&options).unwrap(), "there was a machine");
    let error = running.wait().unwrap_err().to_string();
    assert!(error.contains("host ended"), "{error}");
    drop(host);
    let host = Host::acquire(&options).unwrap();
    assert_eq!(shell(&host, "echo again").text(), "again\n");
    drop(host);
    Host::stop(&options).unwrap();
    assert!(!Host::stop(&options).unwrap(), "nothing is left to stop");
}

#[test]
fn an_idle_machine_ends_and_a_used_one_does_not() {
    let shared = Shared::new();
    let users = fs::File::create(shared.0.join("users")).unwrap();
    users.lock_shared().unwrap();
    // Programs that never end stand in for QEMU and its file server.
    let mut keeper = Command::new(env!("CARGO_BIN_EXE_hull-host-init"))
        .args(["supervise", &shared.0.display().to_string(), "1"])
        .args(["sleep", "1000", "--", "sleep", "1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Held by what the keeper runs, and let go by the keeper itself.
    let mut stdout = keeper.stdout.take().unwrap();
    let while_used = Timespec {
        tv_sec: 3,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(&stdout, PollFlags::IN)];
    assert_eq!(
        poll(&mut watched, Some(&while_used)),
        Ok(0),
        "it ended while used"
    );
    users.unlock().unwrap();
    let mut said = String::new();
    stdout.read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
    assert!(keeper.wait().unwrap().success());
}

#[test]
fn the_init_refuses_to_be_run_by_hand() {
    let done = Command::new(env!("CARGO_BIN_EXE_hull-host-init"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("cargo xtask host"));
}
