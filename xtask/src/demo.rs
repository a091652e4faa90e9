//! `cargo xtask demo`: Hull's main job on an image that others' tools made.
//!
//! A Debian userland by mmdebstrap, packed by umoci, pushed by skopeo to Debian's own registry on
//! loopback, pulled by `hull`, and run in its own VM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use hull_tests::host::{Host, Options, Report, packages};

use crate::stage;

const TOOLS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("umoci", "umoci"),
    ("skopeo", "skopeo"),
    ("docker-registry", "docker-registry"),
    ("mke2fs", "e2fsprogs"),
];

/// The registry of the demonstration, on the KVM host's loopback.
const REGISTRY: &str = "127.0.0.1:5117";

/// What the guest says of itself; the shell's own words show that it is another kernel.
const GREETING: &str = "echo \"kernel    $(uname -r)\"; . /etc/os-release; \
     echo \"userland  $PRETTY_NAME\"; echo \"processes $(ls -d /proc/[0-9]* | wc -l)\"";

/// Sets up everything and runs it.
pub(crate) fn run() -> Result<()> {
    let report = crate::report("demo");
    packages::ensure(TOOLS, &report)?;
    let prefix = stage::stage()?;
    let userland = userland(&report)?;
    let host = Host::acquire(&Options {
        report: report.clone(),
        ..Options::default()
    })?;
    let place = if host.is_native() {
        "this machine's KVM"
    } else {
        "the emulated KVM host"
    };
    report.step(&format!("running on {place} ({})", kernel_release(&host)?));

    let scratch = stage::target_dir().join("demo");
    let _registry = start_registry(&host, &scratch, &report)?;
    let reference = format!("{REGISTRY}/debian:bookworm");
    report.step("pushing the image to a registry on loopback, by skopeo");
    let source = format!("oci:{}:bookworm", userland.display());
    let target = format!("docker://{reference}");
    attached(
        &host,
        &[
            "skopeo",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
            &source,
            &target,
        ],
    )?;

    let hull = prefix.join("bin/hull").display().to_string();
    report.step(&format!("hull pull {reference}"));
    attached(&host, &[&hull, "pull", &reference])?;
    report.step(&format!("hull run --rm {reference} bash -c …"));
    attached(
        &host,
        &[&hull, "run", "--rm", &reference, "bash", "-c", GREETING],
    )?;
    report.step("once more, by the clock");
    attached(
        &host,
        &[
            "bash",
            "-c",
            &format!("time {hull} run --rm {reference} true"),
        ],
    )?;
    report.step("what is left: no container, no mount, no process");
    attached(&host, &[&hull, "ps", "-a"])?;
    Ok(())
}

/// An OCI layout that holds a Debian userland, made once.
fn userland(report: &Report) -> Result<PathBuf> {
    let directory = stage::workspace().join("target/demo");
    let layout = directory.join("debian");
    if layout.join("index.json").is_file() {
        return Ok(layout);
    }
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let root = directory.join("root.tar");
    report.step("making a Debian 12 userland by mmdebstrap (a minute or two)");
    tool(
        Command::new("mmdebstrap")
            .args(["--variant=essential", "bookworm"])
            .arg(&root),
    )?;
    report.step("packing it as an OCI image by umoci");
    let building = directory.join("debian.building");
    if building.exists() {
        fs::remove_dir_all(&building).context("cannot remove a half-made layout")?;
    }
    let image = format!("{}:bookworm", building.display());
    tool(
        Command::new("umoci")
            .arg("init")
            .arg("--layout")
            .arg(&building),
    )?;
    tool(Command::new("umoci").args(["new", "--image", &image]))?;
    tool(
        Command::new("umoci")
            .args(["raw", "add-layer", "--image", &image])
            .arg(&root),
    )?;
    tool(Command::new("umoci").args(["config", "--image", &image, "--config.cmd", "bash"]))?;
    fs::rename(&building, &layout).context("cannot put the layout in its place")?;
    fs::remove_file(&root).context("cannot remove the packed userland")?;
    Ok(layout)
}

/// Debian's registry; dropping what is returned ends it.
fn start_registry(
    host: &Host,
    scratch: &Path,
    report: &Report,
) -> Result<hull_tests::host::Running> {
    report.step(&format!("starting docker-registry on {REGISTRY}"));
    fs::create_dir_all(scratch).context("cannot create the demonstration's directory")?;
    let config = scratch.join("registry.yml");
    let text = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: /tmp/hull-demo-registry}}}}\n\
         http: {{addr: \"{REGISTRY}\"}}\n"
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let command = format!("exec docker-registry serve '{}' 2>&1", config.display());
    let mut registry = host.command(["sh", "-c", &command]).spawn()?;
    registry
        .await_stdout("listening on")
        .context("docker-registry did not start")?;
    Ok(registry)
}

fn kernel_release(host: &Host) -> Result<String> {
    Ok(host
        .command(["uname", "-r"])
        .output()?
        .text()
        .trim()
        .to_owned())
}

/// A command on the host whose output goes straight to the person who watches.
fn attached(host: &Host, argv: &[&str]) -> Result<()> {
    let code = host.attach(argv.iter().map(|&word| word.to_owned()).collect(), &[])?;
    if code != 0 {
        bail!("`{}` ended with exit code {code}", argv.join(" "));
    }
    Ok(())
}

fn tool(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{command:?} ended with {}:\n{}",
            output.status,
            words.trim()
        );
    }
    Ok(())
}
