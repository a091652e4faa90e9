//! A host that lacks something: a kernel, /dev/kvm, the right to it, Hull's own parts.

use std::ffi::OsString;
use std::fs;

use hull_tests::hull::Hull;
use hull_tests::process::{Output, Process};

use super::{refused, still_usable};

/// Runs `true` in a container with other settings than the test's own.
#[track_caller]
fn run_with(hull: &Hull, settings: &str) -> Output {
    let image = hull.image();
    let file = hull.path().join("other.toml");
    fs::write(&file, settings).unwrap();
    hull.cmd(["run", "--rm", &image, "true"])
        .env("HULL_CONFIG", file.to_str().unwrap())
        .output()
}

#[test]
fn parts_that_are_missing_or_no_parts() {
    let Some(hull) = Hull::new() else { return };
    let text = hull.path().join("text");
    fs::write(&text, "no kernel at all\n".repeat(99)).unwrap();
    let cut = hull.path().join("cut");
    fs::write(&cut, b"\x7fELF\x02\x01\x01\0").unwrap();
    let (text, cut) = (text.display(), cut.display());
    let no_kernel = "[assets]\nkernel = \"/no/such/vmlinux\"\n";
    let no_initrd = "[assets]\ninitrd = \"/no/such/initrd\"\n";
    for (settings, words) in [
        (
            no_kernel.to_owned(),
            &["guest kernel", "/no/such/vmlinux"][..],
        ),
        (format!("[assets]\nkernel = \"{text}\"\n"), &["vmlinux"]),
        (format!("[assets]\nkernel = \"{cut}\"\n"), &["vmlinux"]),
        (no_initrd.to_owned(), &["first root", "/no/such/initrd"]),
        (
            "[assets]\nmonitor = \"/no/such/monitor\"\n".to_owned(),
            &["/no/such/monitor"],
        ),
        ("kvm = \"/no/such/kvm\"\n".to_owned(), &["/no/such/kvm"]),
        ("nosuchkey = 1\n".to_owned(), &["nosuchkey"]),
        ("not toml".to_owned(), &["other.toml"]),
    ] {
        refused(&run_with(&hull, &settings), 125, words);
    }
    still_usable(&hull);
}

/// A guest whose first root holds no agent says what its kernel said last.
#[test]
fn a_first_root_that_is_none() {
    let Some(hull) = Hull::new() else { return };
    let text = hull.path().join("text");
    fs::write(&text, "no archive at all\n".repeat(99)).unwrap();
    let settings = format!("[assets]\ninitrd = \"{}\"\n", text.display());
    let ran = run_with(&hull, &settings);
    refused(&ran, 125, &["Kernel panic", "console"]);
    still_usable(&hull);
}

/// What a process sees of /dev when it is made from this: nothing of the hypervisor.
const HIDE_KVM: &str = "mkdir -p \"$0\" && mount -t tmpfs none \"$0\" && \
    for device in null zero tty; do \
        touch \"$0/$device\" && mount --bind /dev/$device \"$0/$device\" || exit 99; \
    done && mount --move \"$0\" /dev && exec \"$@\"";

#[test]
fn no_hypervisor() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let device = hull.path().join("dev");
    let hidden = |words: &[&str]| {
        let mut argv: Vec<OsString> = ["unshare", "-m", "--propagation", "private", "sh", "-c"]
            .map(OsString::from)
            .to_vec();
        argv.extend([HIDE_KVM.into(), device.clone().into()]);
        argv.push(std::env::var_os("HULL_BIN").unwrap());
        argv.extend(words.iter().map(OsString::from));
        inside(&hull, argv)
    };
    let ran = hidden(&["run", "--rm", &image, "true"]);
    refused(&ran, 125, &["hypervisor", "/dev/kvm", "No such file"]);
    let looked = hidden(&["doctor"]);
    assert_eq!(looked.code, 1, "{:?}", looked.all());
    assert!(looked.text().contains("modprobe"), "{}", looked.text());
    fs::remove_dir(&device).unwrap();
    still_usable(&hull);
}

#[test]
fn no_right_to_the_hypervisor() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    // A device like the real one, that only root may open.
    let device = hull.path().join("kvm");
    let numbers = Process::new(["stat", "-c", "%Hr %Lr", "/dev/kvm"])
        .output()
        .ok();
    let [major, minor] = numbers.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{numbers}");
    };
    let path = device.to_str().unwrap();
    Process::new(["mknod", "-m", "600", path, "c", major, minor])
        .output()
        .ok();
    let settings = hull.path().join("other.toml");
    fs::write(&settings, format!("kvm = \"{path}\"\n")).unwrap();
    Process::new([
        "chown",
        "-R",
        "65534:65534",
        hull.state_dir().to_str().unwrap(),
    ])
    .output()
    .ok();
    Process::new(["chmod", "0755", hull.path().to_str().unwrap()])
        .output()
        .ok();
    let run_dir = hull.path().join("user-run");
    fs::create_dir(&run_dir).unwrap();
    Process::new(["chown", "65534:65534", run_dir.to_str().unwrap()])
        .output()
        .ok();
    let program = std::env::var("HULL_BIN").unwrap();
    let words = [
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        &program,
        "run",
        "--rm",
        &image,
        "true",
    ];
    let ran = Process::new(words)
        .env("HULL_CONFIG", settings.to_str().unwrap())
        .env("HULL_STATE_DIR", hull.state_dir().to_str().unwrap())
        .env("HULL_RUN_DIR", run_dir.to_str().unwrap())
        .output();
    refused(&ran, 125, &["hypervisor", path, "Permission denied"]);
    Process::new(["chown", "-R", "0:0", hull.state_dir().to_str().unwrap()])
        .output()
        .ok();
    still_usable(&hull);
}

/// Runs `argv` as the test's own Hull would be run.
fn inside(hull: &Hull, argv: Vec<OsString>) -> Output {
    Process::new(argv)
        .env(
            "HULL_CONFIG",
            hull.path().join("config.toml").to_str().unwrap(),
        )
        .env("HULL_STATE_DIR", hull.state_dir().to_str().unwrap())
        .env("HULL_RUN_DIR", hull.run_dir().to_str().unwrap())
        .output()
}
