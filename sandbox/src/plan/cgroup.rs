//! Where the monitor of a container is accounted for: its cgroup on the host.
//!
//! Owns: the path, from the spellings that engines use, and what is written there. Refuses: paths
//! that are none.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Linux;
use serde::{Deserialize, Serialize};

use super::{Plan, PlanError, clean, limits};

/// The cgroup of all whose engine names none.
const OWN: &str = "hull";

/// The monitor's cgroup on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedCgroup {
    /// Where, below the root of cgroup v2.
    pub path: PathBuf,
    /// Its files and what is written to them, in order.
    pub files: Vec<(String, String)>,
}

impl Plan {
    /// The monitor's cgroup on the host, if it has one of its own.
    #[must_use]
    pub fn host_cgroup(&self) -> Option<PlannedCgroup> {
        let of_quota = |cpus| {
            let (quota, period) = limits::quota(cpus);
            PlannedCgroup {
                path: own(&self.id),
                files: vec![("cpu.max".to_owned(), format!("{quota} {period}"))],
            }
        };
        let named = self.cgroup.clone();
        let mut planned = named.or_else(|| self.vm.cpu_quota.map(of_quota))?;
        let changed = self.limits.iter().flat_map(|limits| &limits.host);
        planned.files.extend(changed.cloned());
        Some(planned)
    }
}

fn own(name: &str) -> PathBuf {
    Path::new(OWN).join(name)
}

/// The cgroup that a bundle asks for; none if neither a path nor a limit needs one.
pub(super) fn of_bundle(linux: &Linux, id: &str) -> Result<Option<PlannedCgroup>, PlanError> {
    let files = linux.resources().as_ref().map(limits::on_host);
    let files = files.unwrap_or_default();
    let asked = linux
        .cgroups_path()
        .as_ref()
        .map(|path| path.to_string_lossy());
    let path = match asked.as_deref() {
        Some(path) => locate(path)?,
        None => None,
    };
    Ok(match path {
        Some(path) => Some(PlannedCgroup { path, files }),
        None => (!files.is_empty()).then(|| PlannedCgroup {
            path: own(id),
            files,
        }),
    })
}

/// Understands `linux.cgroupsPath`: a path below the root, or systemd's `slice:prefix:name`. The
/// root itself is nobody's.
fn locate(asked: &str) -> Result<Option<PathBuf>, PlanError> {
    let refused = |why| PlanError::Bundle {
        what: format!("cgroupsPath \"{asked}\""),
        why,
    };
    let parts: Vec<&str> = asked.split(':').collect();
    if let [slice, prefix, name] = parts.as_slice()
        && !asked.contains('/')
        && (slice.is_empty() || slice.ends_with(".slice"))
    {
        let unit = match name.ends_with(".slice") {
            true => (*name).to_owned(),
            false => format!("{prefix}-{name}.scope"),
        };
        let parent = if slice.is_empty() {
            "system.slice"
        } else {
            slice
        };
        let parent = expand(parent).ok_or_else(|| refused("its slice has no valid name"))?;
        return match name.is_empty() {
            true => Err(refused("it names no unit")),
            false => Ok(Some(parent.join(unit))),
        };
    }
    // What is relative has its place where the runtime says.
    let whole = match asked.starts_with('/') {
        true => asked.to_owned(),
        false => format!("/{OWN}/{asked}"),
    };
    let whole = clean(&whole).ok_or_else(|| refused("it is no path"))?;
    let path = whole.trim_start_matches('/');
    Ok((!path.is_empty() && path != OWN).then(|| PathBuf::from(path)))
}

/// The path of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let (mut path, mut whole) = (PathBuf::new(), String::new());
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !whole.is_empty() {
            whole.push('-');
        }
        whole.push_str(part);
        path.push(format!("{whole}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_spellings_of_a_cgroups_path_are_understood() {
        for (asked, path) in [
            ("/a/b", Some("a/b")),
            ("/a/../../b/./c/", Some("b/c")),
            ("relative", Some("hull/relative")),
            ("../../etc", Some("etc")),
            (
                "system.slice:docker:1234",
                Some("system.slice/docker-1234.scope"),
            ),
            (":runc:c", Some("system.slice/runc-c.scope")),
            ("-.slice:x:c", Some("x-c.scope")),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:ab",
                Some(
                    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-ab.scope",
                ),
            ),
            ("user.slice:x:own.slice", Some("user.slice/own.slice")),
            ("", None),
            ("/", None),
            ("/..", None),
        ] {
            assert_eq!(locate(asked).unwrap(), path.map(PathBuf::from), "{asked}");
        }
        for bad in ["a--b.slice:x:c", "a.slice:x:", ".slice:x:c"] {
            assert!(locate(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_hierarchy(asked in "[a-z./:\\-]{0,40}") {
            if let Ok(Some(path)) = locate(&asked) {
                let plain = |part| matches!(part, std::path::Component::Normal(_));
                prop_assert!(path.components().all(plain), "{path:?}");
                prop_assert!(path.components().next().is_some());
            }
        }
    }
}
