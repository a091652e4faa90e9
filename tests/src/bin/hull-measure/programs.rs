//! The programs that are compared, and how each is asked for the same.
//!
//! Owns: their command lines. Refuses: to run them.

use std::path::{Path, PathBuf};

/// Memory of each guest, MiB: Hull's own default.
pub(crate) const MEMORY_MIB: u32 = 512;

/// As Hull's own command line (`kernel-config/README.md` says why each word), but for the way to
/// restart: this machine has no keyboard controller, and a triple fault ends it.
const CMDLINE: &str = "console=hvc0 quiet reboot=t rcupdate.rcu_expedited=1 noreplace-smp \
    initcall_blacklist=slab_late_init dummy.numdummies=0 tsc=reliable \
    sysctl.vm.compaction_proactiveness=0 swiotlb=noforce";

/// What makes a start of Hull's boot.
pub(crate) const COLD: &str = "--no-template";

/// One of the programs compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// Hull's command line.
    Hull,
    /// QEMU's `microvm` machine with Hull's kernel and the doorbell as its init.
    Qemu,
    /// An OCI runtime of Debian's, by the name of its program.
    Runtime(&'static str),
}

/// Name and program, in the order of the table.
const ALL: [(&str, Program); 4] = [
    ("hull", Program::Hull),
    ("qemu-microvm", Program::Qemu),
    ("crun", Program::Runtime("crun")),
    ("runc", Program::Runtime("runc")),
];

impl Program {
    /// The program of a name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let found = ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, program)| *program)
    }

    /// Whether what it starts is a virtual machine.
    pub(crate) fn has_guests(self) -> bool {
        !matches!(self, Self::Runtime(_))
    }
}

/// The inputs' directory.
#[derive(Debug, Clone)]
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn join(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// A command of Hull's.
    pub(crate) fn hull(&self, arguments: &[&str]) -> Vec<String> {
        argv(&self.join("hull/bin/hull"), arguments)
    }

    /// A start whose command is `true`; for QEMU, whose guest has no container, the doorbell.
    /// Only Hull's starts can be other than cold.
    pub(crate) fn run_true(&self, program: Program, cold: bool) -> Vec<String> {
        match program {
            Program::Hull if cold => self.hull(&["run", "--rm", COLD, "bench", "true"]),
            Program::Hull => self.hull(&["run", "--rm", "bench", "true"]),
            Program::Qemu => self.qemu(""),
            Program::Runtime(name) => self.runtime(name, "true"),
        }
    }

    /// The start of a container that idles. QEMU's guest has none.
    pub(crate) fn idle(&self, program: Program, name: &str) -> Vec<String> {
        let Program::Runtime(runtime) = program else {
            return self.hull(&["run", "-d", "--name", name, "bench", "sleep", "infinity"]);
        };
        let bundle = self.join("bundles/sleep").display().to_string();
        let words = ["run", "--detach", "--bundle", &bundle, name];
        argv(&self.join("bin").join(runtime), &words)
    }

    /// One more process in it, whose command is `true`.
    pub(crate) fn exec_true(&self, program: Program, name: &str) -> Vec<String> {
        self.any(program, &["exec", name, "true"])
    }

    /// Its end.
    pub(crate) fn remove(&self, program: Program, name: &str) -> Vec<String> {
        match program {
            Program::Runtime(_) => self.any(program, &["delete", "--force", name]),
            _ => self.any(program, &["rm", "-f", name]),
        }
    }

    fn any(&self, program: Program, words: &[&str]) -> Vec<String> {
        match program {
            Program::Runtime(name) => argv(&self.join("bin").join(name), words),
            _ => self.hull(words),
        }
    }

    /// A start whose command is the doorbell.
    pub(crate) fn run_bell(&self, program: Program) -> Vec<String> {
        match program {
            Program::Hull => self.hull(&["run", "--rm", COLD, "bench", "bell"]),
            Program::Qemu => self.qemu(""),
            Program::Runtime(name) => self.runtime(name, "bell"),
        }
    }

    /// QEMU's smallest machine; `arguments` go to the guest's init.
    pub(crate) fn qemu(&self, arguments: &str) -> Vec<String> {
        let kernel = self.join("vmlinux").display().to_string();
        let initrd = self.join("bell.cpio").display().to_string();
        let firmware = self.join("firmware").display().to_string();
        let memory = format!("{MEMORY_MIB}M");
        // No "--" before them: QEMU adds its devices at the end, and they are the kernel's.
        let append = format!("{CMDLINE} {arguments}");
        let machine = "microvm,accel=kvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off,\
            isa-serial=off";
        argv(
            &self.join("bin/qemu-system-x86_64"),
            &[
                "-L",
                &firmware,
                "-machine",
                machine,
                "-cpu",
                "host",
                "-smp",
                "1",
                "-m",
                &memory,
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-chardev",
                "stdio,id=console,signal=off",
                "-device",
                "virtio-serial-device",
                "-device",
                "virtconsole,chardev=console",
                "-kernel",
                &kernel,
                "-initrd",
                &initrd,
                "-append",
                append.trim_end(),
            ],
        )
    }

    fn runtime(&self, name: &str, command: &str) -> Vec<String> {
        let bundle = self.join("bundles").join(command).display().to_string();
        argv(
            &self.join("bin").join(name),
            &["run", "--bundle", &bundle, "bench"],
        )
    }
}

fn argv(program: &Path, arguments: &[&str]) -> Vec<String> {
    let mut words = vec![program.display().to_string()];
    words.extend(arguments.iter().map(|&word| word.to_owned()));
    words
}
