//! What the container sees besides its root: mounts, and the host's directories behind them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use hull_proto::LAYERED_ROOT_DIR;
use oci_spec::image::Config;
use oci_spec::runtime::{
    Linux, LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxPidsBuilder, LinuxResourcesBuilder, Mount, MountBuilder, Process, RootBuilder, Spec,
    SpecBuilder,
};

use crate::request::{Root, RunRequest, Tmpfs, Volume, VolumeSource};

use super::shape::{Export, ExportSource, FILE_NAME, IDENTITY_NAME, ROOT_NAME};
use super::{HostFacts, PlanError, clean, guest_path};

/// (target, type, source, options): what every container of Docker's has (moby,
/// `oci/defaults.go`).
const SYSTEM: [(&str, &str, &str, &[&str]); 7] = [
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    (
        "/dev",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    (
        "/sys",
        "sysfs",
        "sysfs",
        &["nosuid", "noexec", "nodev", "ro"],
    ),
    (
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["ro", "nosuid", "noexec", "nodev"],
    ),
    (
        "/dev/mqueue",
        "mqueue",
        "mqueue",
        &["nosuid", "noexec", "nodev"],
    ),
    (
        "/dev/shm",
        "tmpfs",
        "shm",
        &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"],
    ),
];

/// The files that tell the container who it is.
const IDENTITY_FILES: [&str; 3] = ["resolv.conf", "hostname", "hosts"];

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The VM is the container's network: it has no network namespace inside it.
pub(super) const NAMESPACES: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Cgroup,
];

/// Exports in the order of the mounts that need them, and mounts in the order to be made.
pub(super) fn plan(
    request: &RunRequest,
    config: &Config,
    facts: &HostFacts,
) -> Result<(Vec<Export>, Vec<Mount>), PlanError> {
    let mut exports = vec![Export {
        name: IDENTITY_NAME.to_owned(),
        source: ExportSource::Identity,
        read_only: false,
    }];
    let volumes = volumes(request, config)?;
    let mut asked: BTreeSet<PathBuf> = BTreeSet::new();
    let mut own = Vec::new();
    for volume in &volumes {
        let name = format!("v{}", exports.len() - 1);
        let (export, mount) = self::volume(volume, name, facts)?;
        asked.insert(mount.destination().clone());
        exports.push(export);
        own.push(mount);
    }
    for tmpfs in &request.tmpfs {
        let target = target(&tmpfs.target)?;
        if !asked.insert(PathBuf::from(&target)) {
            return Err(PlanError::DuplicateTarget(target));
        }
        own.push(self::tmpfs(tmpfs, &target)?);
    }
    let mut mounts = Vec::new();
    for mount in system()?.into_iter().chain(identity()?) {
        if !asked.contains(mount.destination()) {
            mounts.push(mount);
        }
    }
    mounts.append(&mut own);
    // A mount inside another's directory must come after it; sorting by depth keeps the rest.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok((exports, mounts))
}

/// The request's volumes, and an anonymous one for each of the image's that nothing else covers.
fn volumes(request: &RunRequest, config: &Config) -> Result<Vec<Volume>, PlanError> {
    let mut volumes: Vec<Volume> = Vec::new();
    for volume in &request.volumes {
        let target = target(&volume.target)?;
        if volumes.iter().any(|known| known.target == target) {
            return Err(PlanError::DuplicateTarget(target));
        }
        volumes.push(Volume {
            target,
            ..volume.clone()
        });
    }
    let mut theirs: Vec<&String> = config.volumes().iter().flatten().collect();
    theirs.sort();
    for path in theirs {
        let target = target(path)?;
        let covered = volumes.iter().any(|known| known.target == target)
            || request
                .tmpfs
                .iter()
                .any(|tmpfs| clean(&tmpfs.target).as_ref() == Some(&target));
        if !covered {
            volumes.push(Volume {
                source: VolumeSource::Anonymous,
                target,
                read_only: false,
            });
        }
    }
    Ok(volumes)
}

fn volume(volume: &Volume, name: String, facts: &HostFacts) -> Result<(Export, Mount), PlanError> {
    let (source, seen) = match &volume.source {
        VolumeSource::Anonymous => (
            ExportSource::Anonymous(volume.target.clone()),
            guest_path(&name),
        ),
        VolumeSource::Host(path) if !path.is_absolute() => {
            return Err(PlanError::Source(path.clone()));
        }
        VolumeSource::Host(path) if facts.files.contains(path) => (
            ExportSource::File(path.clone()),
            guest_path(&name).join(FILE_NAME),
        ),
        VolumeSource::Host(path) => (ExportSource::Directory(path.clone()), guest_path(&name)),
    };
    let access = if volume.read_only { "ro" } else { "rw" };
    let mount = bind(&volume.target, seen, &["rbind", "rprivate", access])?;
    let export = Export {
        name,
        source,
        read_only: volume.read_only,
    };
    Ok((export, mount))
}

fn tmpfs(tmpfs: &Tmpfs, target: &str) -> Result<Mount, PlanError> {
    let mut options: Vec<String> = ["noexec", "nosuid", "nodev"].map(str::to_owned).to_vec();
    for option in tmpfs.options.iter().filter(|option| !option.is_empty()) {
        let undone = format!("no{option}");
        options.retain(|known| *known != undone && known != option);
        options.push(option.clone());
    }
    Ok(MountBuilder::default()
        .destination(target)
        .typ("tmpfs")
        .source("tmpfs")
        .options(options)
        .build()?)
}

fn system() -> Result<Vec<Mount>, PlanError> {
    SYSTEM
        .iter()
        .map(|(target, kind, source, options)| {
            Ok(MountBuilder::default()
                .destination(*target)
                .typ(*kind)
                .source(*source)
                .options(owned(options))
                .build()?)
        })
        .collect()
}

fn identity() -> Result<Vec<Mount>, PlanError> {
    IDENTITY_FILES
        .iter()
        .map(|file| {
            bind(
                &format!("/etc/{file}"),
                guest_path(IDENTITY_NAME).join(file),
                &["rbind", "rprivate"],
            )
        })
        .collect()
}

fn bind(target: &str, source: PathBuf, options: &[&str]) -> Result<Mount, PlanError> {
    Ok(MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(owned(options))
        .build()?)
}

/// The whole specification around `process` and `mounts`.
pub(super) fn spec(
    request: &RunRequest,
    process: Process,
    mounts: Vec<Mount>,
    hostname: &str,
) -> Result<Spec, PlanError> {
    Ok(SpecBuilder::default()
        .version("1.2.0")
        .root(
            RootBuilder::default()
                .path(match request.root {
                    Root::Image(_) => PathBuf::from(LAYERED_ROOT_DIR),
                    Root::Directory(_) => guest_path(ROOT_NAME),
                })
                .readonly(request.read_only)
                .build()?,
        )
        .mounts(mounts)
        .process(process)
        .hostname(hostname)
        .linux(linux(request)?)
        .build()?)
}

fn linux(request: &RunRequest) -> Result<Linux, PlanError> {
    let namespaces = NAMESPACES
        .into_iter()
        .map(|kind| Ok(LinuxNamespaceBuilder::default().typ(kind).build()?))
        .collect::<Result<Vec<LinuxNamespace>, PlanError>>()?;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .masked_paths(owned(&MASKED))
        .readonly_paths(owned(&READ_ONLY))
        .build()?;
    linux
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_devices(None)
        .set_seccomp(None)
        .set_resources(None);
    if !request.sysctls.is_empty() {
        linux.set_sysctl(Some(request.sysctls.clone().into_iter().collect()));
    }
    if let Some(limit) = request.pids_limit {
        let pids = LinuxPidsBuilder::default().limit(limit).build()?;
        let resources = LinuxResourcesBuilder::default().pids(pids).build()?;
        linux.set_resources(Some(resources));
    }
    Ok(linux)
}

fn target(path: &str) -> Result<String, PlanError> {
    let wrong = |why| PlanError::Target {
        target: path.to_owned(),
        why,
    };
    match clean(path) {
        None => Err(wrong("it needs to be an absolute path")),
        Some(clean) if clean == "/" => Err(wrong("it can't be '/'")),
        Some(clean) => Ok(clean),
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}
