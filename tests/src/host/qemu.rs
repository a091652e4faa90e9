//! QEMU: its command line, and the few words said to it while it runs.
//!
//! Owns: how the machine looks from outside. Refuses: to start it (the keeper does).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::packages;
use super::wire::{LIVE_SOCKET, LIVE_TAG, PORT};

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
const CONTROL_SOCKET: &str = "control.sock";
const PATIENCE: Duration = Duration::from_secs(10);

/// What tells one machine from another.
#[derive(Debug, Clone)]
pub(super) struct Shape<'a> {
    /// Deterministic time: one instruction is 2 ns, one processor.
    pub(super) icount: bool,
    /// Memory, MiB.
    pub(super) memory: u32,
    /// The uncompressed kernel.
    pub(super) kernel: &'a Path,
    /// TCP port on the outer loopback.
    pub(super) port: u16,
}

/// QEMU's arguments; relative paths are in the machine's own directory.
pub(super) fn arguments(shape: &Shape<'_>) -> Vec<String> {
    let (time, processor, processors, isolation): (&[&str], _, _, _) = if shape.icount {
        // Without fast string moves a page is cleared in 512 counted steps instead of 4096.
        let icount = &["-icount", "shift=1,sleep=off"];
        (icount, "max,+svm,-la57,-erms,-fsrm", "1", "")
    } else {
        // The second is only there to be counted: docs/decisions/0002-hosts-of-one-processor.md.
        let isolation = "isolcpus=domain,managed_irq,1 irqaffinity=0";
        (&[], "max,+svm,-la57,-cx16", "2", isolation)
    };
    let mut arguments: Vec<String> = time.iter().map(|&text| text.to_owned()).collect();
    let memory = format!("{}M", shape.memory);
    let kernel = shape.kernel.display().to_string();
    let forward = format!(
        "user,id=control,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{}-10.0.2.15:{PORT}",
        shape.port
    );
    let control = format!("unix:{CONTROL_SOCKET},server=on,wait=off");
    let live = format!("socket,id=live,path={LIVE_SOCKET}");
    let live_device = format!("vhost-user-fs-pci,chardev=live,tag={LIVE_TAG},queue-size=1024");
    // The file server reads and writes the machine's memory.
    let shared = format!("memory-backend-memfd,id=memory,size={memory},share=on");
    let command_line = format!("{} {isolation}", kernel_command_line());
    for (option, value) in [
        ("-accel", "tcg"),
        ("-name", "hull-host"),
        ("-machine", "q35,memory-backend=memory"),
        ("-object", &shared),
        ("-cpu", processor),
        ("-smp", processors),
        ("-m", &memory),
        ("-kernel", &kernel),
        ("-initrd", "initrd"),
        ("-append", &command_line),
        ("-serial", "file:console.log"),
        ("-chardev", "stdio,id=ready,signal=off"),
        ("-serial", "chardev:ready"),
        ("-qmp", &control),
        (
            "-fsdev",
            "local,id=outer,path=/,security_model=none,multidevs=remap,readonly=on",
        ),
        ("-device", "virtio-9p-pci,fsdev=outer,mount_tag=outer"),
        ("-chardev", &live),
        ("-device", &live_device),
        ("-netdev", &forward),
        ("-device", "virtio-net-pci,netdev=control,romfile="),
        ("-display", "none"),
    ] {
        arguments.extend([option.to_owned(), value.to_owned()]);
    }
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    arguments
}

/// The server of live directories, on the socket that is its stdin. Names and attributes are
/// asked for each time; pages are kept (in Debian 12) as long as the file hasn't changed.
///
/// # Errors
/// When it isn't installed, or this process may not show all files.
pub(super) fn file_server() -> Result<Vec<String>> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the emulated KVM host shows this machine's files as they are: run it as root"
    );
    let program = packages::find_file_server().context("virtiofsd isn't installed")?;
    // Debian 12 has the one in C, beside QEMU's other programs.
    let options: &[&str] = if program.starts_with("/usr/lib/qemu") {
        &[
            "-f",
            "-o",
            "source=/",
            "-o",
            "cache=always",
            "-o",
            "timeout=0",
            "-o",
            "sandbox=chroot",
            "-o",
            "log_level=err",
        ]
    } else {
        &[
            "--shared-dir=/",
            "--cache=never",
            "--sandbox=chroot",
            "--log-level=error",
        ]
    };
    let mut command = vec![program.display().to_string(), "--fd=0".to_owned()];
    command.extend(options.iter().map(|&option| option.to_owned()));
    Ok(command)
}

fn kernel_command_line() -> String {
    [
        "console=ttyS0 quiet loglevel=4 panic=-1 lsm=landlock,yama,bpf",
        // Same addresses from boot to boot, and no cost for faults that an emulator hasn't.
        "nokaslr mitigations=off audit=0",
        "no_timer_check tsc=reliable nowatchdog random.trust_cpu=on",
        "rcupdate.rcu_expedited=1 cgroup_no_v1=all net.ifnames=0",
    ]
    .join(" ")
}

/// Has QEMU execute one command of its machine protocol without arguments, such as `quit`,
/// `stop` (freeze) or `cont` (thaw).
///
/// # Errors
/// When QEMU doesn't listen or refuses.
pub(super) fn tell(directory: &Path, command: &str) -> Result<()> {
    execute(directory, &json!({ "execute": command }))
        .with_context(|| format!("tell QEMU to {command}"))?;
    Ok(())
}

/// What the machine's processors are at, for a person.
///
/// # Errors
/// When QEMU doesn't listen or refuses.
pub(super) fn registers(directory: &Path) -> Result<String> {
    let arguments = json!({ "command-line": "info registers -a" });
    let ask = json!({ "execute": "human-monitor-command", "arguments": arguments });
    let answer = execute(directory, &ask).context("ask QEMU for registers")?;
    let lines = answer.as_str().unwrap_or_default().lines();
    let is_general = |line: &&str| {
        !["FPR", "XMM", "YMM"]
            .iter()
            .any(|unit| line.starts_with(unit))
    };
    Ok(lines.filter(is_general).collect::<Vec<_>>().join("\n"))
}

/// Has QEMU execute one command and returns what it answers; nothing where it ends before.
fn execute(directory: &Path, command: &Value) -> Result<Value> {
    // By descriptor: a socket's path may have 107 bytes only (unix(7)).
    let open = File::open(directory)?;
    let path = format!("/proc/self/fd/{}/{CONTROL_SOCKET}", open.as_raw_fd());
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(socket.try_clone()?);
    writeln!(socket, "{}", json!({ "execute": "qmp_capabilities" }))?;
    writeln!(socket, "{command}")?;
    let mut last = Value::Null;
    let mut agreed = 0;
    let mut line = String::new();
    while agreed < 2 {
        line.clear();
        if answers.read_line(&mut line)? == 0 {
            // `quit` may end it before the answer is out.
            break;
        }
        let mut answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error") {
            bail!("it answered {error}");
        }
        // Its greeting and its events are no answers.
        if let Some(value) = answer.get_mut("return") {
            last = value.take();
            agreed += 1;
        }
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(icount: bool) -> String {
        arguments(&Shape {
            icount,
            memory: 6144,
            kernel: Path::new("/k/vmlinux"),
            port: 4321,
        })
        .join(" ")
    }

    #[test]
    fn the_normal_machine_has_nested_virtualisation_and_a_processor_that_idles() {
        let line = line(false);
        for part in [
            "-accel tcg",
            "+svm,-la57,-cx16",
            "-smp 2",
            "isolcpus=domain,managed_irq,1",
            "-m 6144M",
            "-kernel /k/vmlinux",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
        assert!(!line.contains("icount"));
    }

    #[test]
    fn deterministic_time_has_one_processor_and_no_fast_string_moves() {
        let line = line(true);
        for part in ["-icount shift=1,sleep=off", "-smp 1", "-erms,-fsrm"] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
    }

    #[test]
    fn strangers_cannot_reach_it_and_it_cannot_reach_out() {
        let line = line(false);
        assert!(line.contains("hostfwd=tcp:127.0.0.1:4321-"));
        assert!(line.contains("restrict=on"));
        assert!(line.contains("id=outer,path=/,security_model=none,multidevs=remap,readonly=on"));
    }
}
