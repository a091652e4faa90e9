//! What the programs compared are given: one root file system, one kernel, one first process.
//!
//! Owns: `target/bench/inputs`, made anew each time. Refuses: to measure.
//!
//! ```text
//! hull/ (as installed)   image.tar (the root as an image)   root/   bundles/{true,bell,sleep}
//! large.tar (the same and a large file)
//! vmlinux   bell.cpio (the doorbell as a guest's first root)   hull-measure
//! bin/ lib/ firmware/ (the other programs and what they load)
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use hull_tests::host::{Report, packages};
use serde_json::json;

use super::bundle;
use crate::{kernel, stage};

/// Programs that are compared or that make what they are given, and their packages.
const TOOLS: [(&str, &str); 6] = [
    ("/bin/busybox", "busybox-static"),
    ("crun", "crun"),
    ("runc", "runc"),
    ("containerd", "containerd"),
    ("mke2fs", "e2fsprogs"),
    ("cc", "build-essential"),
];

/// Those that are brought along, beside Hull's.
const PROGRAMS: [&str; 7] = [
    "crun",
    "runc",
    "qemu-system-x86_64",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "mke2fs",
];

/// What of QEMU's own files a `microvm` machine loads.
const FIRMWARE: &str = "qboot.rom";

/// Commands of the image.
const APPLETS: [&str; 7] = ["sh", "true", "sleep", "dd", "cat", "ls", "stat"];

/// Directories of the image.
const DIRECTORIES: [&str; 7] = ["bin", "dev", "etc", "proc", "root", "sys", "tmp"];

/// Where the inputs lie in the KVM host, in memory.
pub(super) const PLACE: &str = "/tmp/hull-bench";

/// Bytes of the one file that many sandboxes read.
const LARGE_BYTES: usize = 200 << 20;

/// Makes all inputs, Hull among them if `prefix` holds it, and gives their directory. The image
/// with a large file is there if it is `wanted`: to load it takes a while.
pub(super) fn make(prefix: Option<&Path>, wanted: bool, report: &Report) -> Result<PathBuf> {
    packages::ensure(&TOOLS, report)?;
    let kernel = kernel::ensure()?;
    let measure = measurer()?;
    report.step("laying out the inputs");
    let inputs = stage::target_dir().join("bench/inputs");
    if inputs.exists() {
        fs::remove_dir_all(&inputs).context("cannot remove the last inputs")?;
    }
    fs::create_dir_all(&inputs).with_context(|| format!("cannot create {}", inputs.display()))?;
    if let Some(prefix) = prefix {
        tool(
            Command::new("cp")
                .arg("-a")
                .arg(prefix)
                .arg(inputs.join("hull")),
        )?;
    }
    fs::copy(kernel, inputs.join("vmlinux")).context("cannot copy the kernel")?;
    fs::copy(measure, inputs.join("hull-measure")).context("cannot copy hull-measure")?;
    let bell = compile_bell(&inputs)?;
    root(&inputs.join("root"), &bell)?;
    write_initrd(&bell, &inputs.join("bell.cpio"))?;
    image(&inputs, "image.tar", "bench")?;
    if wanted {
        let large = inputs.join("root/large");
        fs::write(&large, noise(LARGE_BYTES)).context("cannot write a large file")?;
        image(&inputs, "large.tar", "bench-large")?;
        fs::remove_file(large).context("cannot remove the large file")?;
    }
    for program in PROGRAMS {
        bring(program, &inputs)?;
    }
    let firmware = inputs.join("firmware");
    fs::create_dir_all(&firmware).context("cannot create the firmware's directory")?;
    fs::copy(
        Path::new("/usr/share/qemu").join(FIRMWARE),
        firmware.join(FIRMWARE),
    )
    .context("cannot copy QEMU's firmware")?;
    for command in [&["true"][..], &["bell"], &["sleep", "infinity"]] {
        bundle::write(&inputs.join("bundles"), command)?;
    }
    Ok(inputs)
}

fn measurer() -> Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["build", "--locked", "--quiet", "-p", "hull-tests"])
        .args(["--bin", "hull-measure"])
        .current_dir(stage::workspace());
    tool(&mut command)?;
    Ok(stage::target_dir().join("debug/hull-measure"))
}

/// Copies a program and the libraries it loads, so that none of them is looked for on a file
/// system outside of the machine.
fn bring(program: &str, inputs: &Path) -> Result<()> {
    let path = packages::find(program).with_context(|| format!("cannot find {program}"))?;
    let libraries = tool(Command::new("ldd").arg(&path))?;
    let libraries = libraries
        .lines()
        .filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next())
        .map(PathBuf::from);
    for (directory, files) in [
        ("bin", vec![path.clone()]),
        ("lib", libraries.collect::<Vec<_>>()),
    ] {
        let directory = inputs.join(directory);
        fs::create_dir_all(&directory)?;
        for file in files {
            let name = file.file_name().context("a library has no name")?;
            fs::copy(&file, directory.join(name))
                .with_context(|| format!("cannot copy {}", file.display()))?;
        }
    }
    Ok(())
}

fn compile_bell(inputs: &Path) -> Result<PathBuf> {
    let source = stage::workspace().join("xtask/src/bench/bell.c");
    let bell = inputs.join("bell");
    // Its own code is what runs first, so what there is of start-up files stays out.
    let flags = [
        "-Os",
        "-static",
        "-nostdlib",
        "-fno-stack-protector",
        "-s",
        "-o",
    ];
    tool(Command::new("cc").args(flags).arg(&bell).arg(source))?;
    Ok(bell)
}

fn root(root: &Path, bell: &Path) -> Result<()> {
    for directory in DIRECTORIES {
        let path = root.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let bin = root.join("bin");
    let copied = [(Path::new("/bin/busybox"), "busybox"), (bell, "bell")];
    for (from, name) in copied {
        let to = bin.join(name);
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    for applet in APPLETS {
        symlink("busybox", bin.join(applet)).context("cannot link a command")?;
    }
    for name in bundle::IDENTITY_FILES {
        fs::write(root.join("etc").join(name), "").context("cannot make the root's files")?;
    }
    Ok(())
}

/// The doorbell as `/init`, with the console that its standard streams are opened on.
fn write_initrd(bell: &Path, to: &Path) -> Result<()> {
    let init = fs::read(bell).context("cannot read the doorbell")?;
    let sink = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    let directory = cpio::newc::Builder::new("dev").mode(0o40_755).nlink(2);
    let sink = directory.write(sink, 0).finish()?;
    let console = cpio::newc::Builder::new("dev/console")
        .mode(0o20_600)
        .rdev_major(5)
        .rdev_minor(1);
    let sink = console.write(sink, 0).finish()?;
    let size = u32::try_from(init.len()).context("the doorbell is past 4 GiB")?;
    let entry = cpio::newc::Builder::new("init").mode(0o100_755).nlink(1);
    let mut writer = entry.write(sink, size);
    writer.write_all(&init).context("cannot write the initrd")?;
    cpio::newc::trailer(writer.finish()?)?;
    Ok(())
}

/// The root as `docker save` would write it: one layer, its configuration, a list.
fn image(inputs: &Path, archive: &str, name: &str) -> Result<()> {
    let parts = inputs.join("image");
    fs::create_dir_all(&parts).context("cannot create the image's directory")?;
    let layer = parts.join("layer.tar");
    let numeric = ["--owner=0", "--group=0", "--numeric-owner", "-cf"];
    let mut pack = Command::new("tar");
    pack.args(numeric)
        .arg(&layer)
        .arg("-C")
        .arg(inputs.join("root"));
    tool(pack.arg("."))?;
    let digest = tool(Command::new("sha256sum").arg(&layer))?;
    let digest = digest.split_whitespace().next().unwrap_or_default();
    ensure!(digest.len() == 64, "sha256sum gave no digest");
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": ["true"], "Env": [bundle::PATH] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(parts.join("config.json"), config.to_string())?;
    let manifest = json!([{
        "Config": "config.json",
        "RepoTags": [format!("{name}:latest")],
        "Layers": ["layer.tar"],
    }]);
    fs::write(parts.join("manifest.json"), manifest.to_string())?;
    let mut save = Command::new("tar");
    save.arg("-cf").arg(inputs.join(archive)).arg("-C");
    save.arg(&parts)
        .args(["manifest.json", "config.json", "layer.tar"]);
    tool(&mut save)?;
    fs::remove_dir_all(&parts).context("cannot remove the image's parts")
}

/// Bytes of which no page is like another.
fn noise(length: usize) -> Vec<u8> {
    let words = (0..length as u64 / 8).map(|n| (n ^ n << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Runs a tool; its last words are the error.
fn tool(command: &mut Command) -> Result<String> {
    let done = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        bail!("{command:?} ended with {}:\n{}", done.status, words.trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
