//! From the kernel's hand-over to a root that looks like the outer machine's.
//!
//! Owns: modules, mounts, limits, the root switch, and reaping for the machine's life. Refuses:
//! to run commands itself (`serve` does).

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use hull_tests::host::wire::Boot;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move,
};
use rustix::process::{Resource, Rlimit, WaitOptions};
use rustix::system::RebootCommand;
use rustix::thread::CpuSet;

use crate::{kept, network};

/// Where `serve` finds what it must know, in the machine's `/run`.
pub(crate) const BOOT_FILE: &str = "/run/hull-host/boot.json";
/// This binary, once the initramfs is out of reach.
const SELF: &str = "/run/hull-host/init";
/// The serial line whose far end waits for the machine to be ready.
const READY_LINE: &str = "/dev/ttyS1";
const NEW_ROOT: &str = "/newroot";

/// Directories that no overlay may back, as overlays will be mounted in them, or that must not
/// show what the outer machine's own services left there.
const PLAIN: [&str; 6] = [
    "/run",
    "/tmp",
    "/var/lib/hull",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
];

/// Sets the machine up and reaps until it is switched off.
///
/// # Errors
/// Never returns one: it is written to the console and the machine goes off.
pub(crate) fn run() -> Result<()> {
    let outcome = set_up();
    if let Err(error) = &outcome {
        eprintln!("hull-host-init: {error:#}");
        say(&format!("failed: {error:#}"));
        // The line must be empty before the power is gone.
        if let Ok(line) = File::options().write(true).open(READY_LINE) {
            let _drained = rustix::termios::tcdrain(&line);
        }
    }
    rustix::fs::sync();
    rustix::system::reboot(RebootCommand::PowerOff).context("switch the machine off")
}

fn set_up() -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        place(kind, kind, target, "")?;
    }
    let boot = fs::read("/boot.json").context("read /boot.json of the initramfs")?;
    let settings: Boot = serde_json::from_slice(&boot).context("parse /boot.json")?;
    for module in &settings.modules {
        load(module)?;
    }
    root().context("build the root")?;
    fs::create_dir_all(format!("{NEW_ROOT}/run/hull-host"))?;
    fs::write(format!("{NEW_ROOT}{BOOT_FILE}"), &boot).context("hand on the settings")?;
    rustix::fs::chmod(format!("{NEW_ROOT}{BOOT_FILE}"), 0o600.into())?;
    fs::copy("/init", format!("{NEW_ROOT}{SELF}")).context("hand on the init")?;
    switch_root()?;
    rustix::system::sethostname(settings.hostname.as_bytes()).context("set the hostname")?;
    limits();
    processors().context("show all processors")?;
    cgroups().context("hand out the cgroup controllers")?;
    modules_dir(&settings.kernel_dir).context("show the kernel's modules")?;
    if let Err(error) = kept::cgroup() {
        eprintln!("hull-host-init: no cgroup is kept: {error:#}");
    }
    let machine = kept::machine();
    if let Err(error) = &machine {
        eprintln!("hull-host-init: no virtual machine is kept: {error:#}");
    }
    serve_and_reap()
}

/// Lets everything see the second processor, which the kernel was told to schedule nothing on:
/// who counts processors finds two, and nobody leaves the first one.
fn processors() -> Result<()> {
    let mut all = CpuSet::new();
    (0..2).for_each(|processor| all.set(processor));
    Ok(rustix::thread::sched_setaffinity(None, &all)?)
}

fn place(kind: &str, source: &str, target: &str, data: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
    let data = std::ffi::CString::new(data)?;
    mount(source, target, kind, MountFlags::empty(), data.as_c_str())
        .with_context(|| format!("mount {kind} on {target}"))
}

fn load(module: &str) -> Result<()> {
    let path = format!("/modules/{module}");
    let file = File::open(&path).with_context(|| format!("open {path}"))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load {path}")),
    }
}

/// The outer machine's root, read-only over 9p, under a layer of memory that takes all writes.
fn root() -> Result<()> {
    place(
        "9p",
        "outer",
        "/outer",
        "trans=virtio,version=9p2000.L,msize=512000,cache=loose,access=any,ro",
    )?;
    place("tmpfs", "layer", "/layer", "mode=755,size=75%")?;
    for directory in ["/layer/upper", "/layer/work"] {
        fs::create_dir(directory).with_context(|| format!("make {directory}"))?;
    }
    place(
        "overlay",
        "root",
        NEW_ROOT,
        "lowerdir=/outer,upperdir=/layer/upper,workdir=/layer/work,redirect_dir=on,xino=off",
    )?;
    for directory in PLAIN {
        let mode = if directory == "/tmp" {
            "mode=1777"
        } else {
            "mode=755"
        };
        place("tmpfs", "memory", &format!("{NEW_ROOT}{directory}"), mode)?;
    }
    for directory in ["/run/lock", "/run/shm"] {
        fs::create_dir_all(format!("{NEW_ROOT}{directory}"))?;
    }
    Ok(())
}

fn switch_root() -> Result<()> {
    for directory in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW_ROOT}{directory}");
        fs::create_dir_all(&target)?;
        mount_move(directory, &target).with_context(|| format!("move {directory}"))?;
    }
    std::env::set_current_dir(NEW_ROOT)?;
    mount_move(".", "/").context("move the new root to /")?;
    rustix::process::chroot(".").context("enter the new root")?;
    std::env::set_current_dir("/")?;
    // As service managers leave it, for whoever relies on propagation.
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::SHARED,
    )?;
    place("tmpfs", "shm", "/dev/shm", "mode=1777")?;
    place(
        "devpts",
        "devpts",
        "/dev/pts",
        "mode=620,gid=5,ptmxmode=666",
    )?;
    place("mqueue", "mqueue", "/dev/mqueue", "")?;
    place(
        "cgroup2",
        "cgroup2",
        "/sys/fs/cgroup",
        "nsdelegate,memory_recursiveprot",
    )?;
    place("debugfs", "debugfs", "/sys/kernel/debug", "")?;
    place("securityfs", "securityfs", "/sys/kernel/security", "")?;
    place("tracefs", "tracefs", "/sys/kernel/tracing", "")?;
    place("bpf", "bpf", "/sys/fs/bpf", "mode=700")?;
    // As udev's rules have them: a jailed process opens them under an identity of its own.
    for device in ["/dev/kvm", "/dev/net/tun", "/dev/fuse", "/dev/vhost-vsock"] {
        rustix::fs::chmod(device, 0o666.into()).with_context(|| format!("open up {device}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, link).with_context(|| format!("make {link}"))?;
    }
    Ok(())
}

/// What a machine started by a service manager has; the kernel's own defaults are far lower.
fn limits() {
    let both = |value| Rlimit {
        current: value,
        maximum: value,
    };
    let open_files = Rlimit {
        current: Some(1 << 16),
        maximum: Some(1 << 20),
    };
    for (resource, limit) in [
        (Resource::Nofile, open_files),
        (Resource::Memlock, both(None)),
        (Resource::Nproc, both(None)),
    ] {
        if let Err(error) = rustix::process::setrlimit(resource, limit) {
            eprintln!("hull-host-init: limit {resource:?}: {error}");
        }
    }
}

fn cgroups() -> Result<()> {
    let all = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in all.split_whitespace() {
        // Some (a real-time build's cpu) cannot be handed out: the others still are.
        if let Err(error) = fs::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            format!("+{controller}"),
        ) {
            eprintln!("hull-host-init: cgroup controller {controller}: {error}");
        }
    }
    Ok(())
}

fn modules_dir(kernel_dir: &Path) -> Result<()> {
    let release = rustix::system::uname().release().to_str()?.to_owned();
    let source = kernel_dir.join("lib/modules").join(&release);
    let target = Path::new("/lib/modules").join(&release);
    fs::create_dir_all(&target)?;
    mount_bind(&source, &target)
        .with_context(|| format!("bind {} to {}", source.display(), target.display()))
}

fn serve_and_reap() -> Result<()> {
    let listener = network::set_up()?;
    let mut server = Command::new(SELF)
        .arg("serve")
        .arg0("hull-host-serve")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .spawn()
        .context("start the server of commands")?;
    say("ready");
    let server_pid = rustix::process::Pid::from_child(&server);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == server_pid => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("reap"),
        }
    }
    // Already reaped above: the handle only has to be let go.
    let _gone = server.try_wait();
    anyhow::bail!("the server of commands ended")
}

/// Tells the caller who waits for the machine.
fn say(text: &str) {
    let written = File::options()
        .write(true)
        .open(READY_LINE)
        .and_then(|mut line| writeln!(line, "{text}"));
    if let Err(error) = written {
        eprintln!("hull-host-init: {READY_LINE}: {error}");
    }
}
