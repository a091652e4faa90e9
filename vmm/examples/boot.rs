//! Boots a kernel with a console on standard output: how one tries the machine by hand.
//!
//!     boot KERNEL [--initrd FILE] [--memory MIB] [--vcpus N] [--disk FILE]... [--serial]
//!          [--share NAME=DIRECTORY[:ro][:auto][:immutable]]... [--window MIB] [--cmdline TEXT]
//!          [--seconds N]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use hull_vmm::machine::{Host, Machine};
use hull_vmm::spec::{BlockSpec, DeviceSpec, FsSpec, MemoryBacking, MemorySpec, VmSpec, VsockSpec};
use hull_vmm::virtio::fs::{CachePolicy, FsExport, FsLimits, FsRole};

struct Wanted {
    kernel: String,
    initrd: Option<String>,
    memory_mib: u64,
    vcpus: u8,
    disks: Vec<String>,
    shares: Vec<String>,
    window_mib: u64,
    serial: bool,
    cmdline: String,
    seconds: u64,
}

fn parse() -> Result<Wanted, String> {
    let mut wanted = Wanted {
        kernel: String::new(),
        initrd: None,
        memory_mib: 256,
        vcpus: 1,
        disks: Vec::new(),
        shares: Vec::new(),
        window_mib: 0,
        serial: false,
        cmdline: "console=hvc0 reboot=k panic=-1".to_owned(),
        seconds: 0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        let number = |text: String| text.parse::<u64>().map_err(|error| error.to_string());
        match argument.as_str() {
            "--initrd" => wanted.initrd = Some(value()?),
            "--memory" => wanted.memory_mib = number(value()?)?,
            "--vcpus" => wanted.vcpus = u8::try_from(number(value()?)?).unwrap_or(u8::MAX),
            "--disk" => wanted.disks.push(value()?),
            "--share" => wanted.shares.push(value()?),
            "--window" => wanted.window_mib = number(value()?)?,
            "--cmdline" => wanted.cmdline = value()?,
            "--seconds" => wanted.seconds = number(value()?)?,
            "--serial" => wanted.serial = true,
            _ => wanted.kernel = argument,
        }
    }
    if wanted.kernel.is_empty() {
        return Err("usage: boot KERNEL [--initrd FILE] [--memory MIB] [--vcpus N] …".to_owned());
    }
    Ok(wanted)
}

fn open(path: &str) -> Result<File, String> {
    File::open(path).map_err(|error| format!("cannot open {path}: {error}"))
}

/// `NAME=DIRECTORY[:ro][:auto][:immutable]`.
fn share(text: &str) -> io::Result<FsExport> {
    let (name, rest) = text.split_once('=').unwrap_or(("root", text));
    let mut parts = rest.split(':');
    let path = Path::new(parts.next().unwrap_or_default());
    let words: Vec<_> = parts.collect();
    let cache = match words.contains(&"auto") {
        true => CachePolicy::Auto,
        false => CachePolicy::Always,
    };
    let immutable = words.contains(&"immutable");
    let read_only = immutable || words.contains(&"ro");
    let mut export = FsExport::open(name, path, read_only, cache)?;
    export.immutable = immutable;
    Ok(export)
}

fn spec(wanted: &Wanted) -> VmSpec {
    let mut devices = vec![
        DeviceSpec::Fs(FsSpec {
            tag: "hull".to_owned(),
            dax_window_bytes: wanted.window_mib << 20,
        }),
        DeviceSpec::Vsock(VsockSpec { guest_cid: 3 }),
        DeviceSpec::Console,
    ];
    for _ in &wanted.disks {
        devices.push(DeviceSpec::Block(BlockSpec {
            read_only: false,
            serial: String::new(),
            durable: true,
        }));
    }
    devices.push(DeviceSpec::Rng);
    VmSpec {
        vcpus: wanted.vcpus,
        memory: MemorySpec {
            size_bytes: wanted.memory_mib << 20,
            backing: MemoryBacking::Anonymous,
        },
        kernel_cmdline: wanted.cmdline.clone(),
        devices,
        debug_serial: wanted.serial,
    }
}

fn run(wanted: &Wanted) -> Result<(), Box<dyn std::error::Error>> {
    let spec = spec(wanted);
    let mut blocks = Vec::new();
    for path in &wanted.disks {
        blocks.push(File::options().read(true).write(true).open(path)?);
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let host = Host {
        kvm: kvm.into(),
        kernel: Some(open(&wanted.kernel)?),
        initrd: wanted.initrd.as_deref().map(open).transpose()?,
        memory: None,
        working_set: None,
        console: Box::new(io::stdout()),
        console_input: None,
        blocks,
        taps: Vec::new(),
        vsock_ports: BTreeMap::new(),
        fs_exports: wanted
            .shares
            .iter()
            .map(|text| share(text))
            .collect::<io::Result<_>>()?,
        fs_role: FsRole::Own,
        fs_limits: FsLimits::default(),
    };
    let mut machine = Machine::build(spec.validate()?, host)?;
    machine.start()?;
    let limit = Duration::from_secs(wanted.seconds);
    let exit = if limit.is_zero() {
        Some(machine.wait())
    } else {
        machine.wait_for(limit)
    };
    machine.stop();
    if let Some(stats) = machine.fs_stats().filter(|stats| stats.total() > 0) {
        eprintln!("requests of the fs device: {stats:?}");
    }
    match exit {
        Some(exit) => eprintln!("machine ended: {exit}"),
        None => eprintln!("machine stopped after {} s", wanted.seconds),
    }
    Ok(())
}

fn main() -> ExitCode {
    let result = parse().map_err(Into::into).and_then(|wanted| run(&wanted));
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("boot: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprintln!("  because: {error}");
        source = error.source();
    }
    ExitCode::FAILURE
}
