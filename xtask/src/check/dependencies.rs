//! The dependency policy: which crate may know which, where crates come from, under what
//! licences, and one version of each.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand, Package};

/// What each crate of the workspace may know of the others (ARCHITECTURE.md, "Code map").
const ARROWS: &[(&str, &[&str])] = &[
    ("hull-proto", &[]),
    ("hull-netlink", &["hull-proto"]),
    ("hull-vmm", &[]),
    ("hull-images", &[]),
    ("hull-agent", &["hull-netlink", "hull-proto"]),
    (
        "hull-sandbox",
        &["hull-netlink", "hull-proto", "hull-vmm", "hull-images"],
    ),
    ("hull", &["hull-sandbox", "hull-images", "hull-proto"]),
    ("hull-shim", &["hull-sandbox", "hull-proto"]),
    ("hull-tests", &["hull-sandbox", "hull-images", "hull-proto"]),
    ("hull-fuzz", &["hull-proto", "hull-vmm", "hull-images"]),
    ("xtask", &["hull-tests"]),
];

/// Crates that must stay out of rooms where they would change what the room is.
const BANNED: &[(&str, &[&str])] = &[
    ("hull-vmm", &["tokio", "anyhow", "oci-spec", "clap"]),
    (
        "hull-agent",
        &["tokio", "anyhow", "clap", "kvm-ioctls", "vm-memory"],
    ),
    ("hull-proto", &["tokio", "anyhow", "libc", "rustix"]),
];

const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Largest number of crates the agent may be made of, itself included.
const AGENT_CRATES: usize = 40;

/// Crates that stand in the lock file in more than one version, each because two of our
/// dependencies disagree. Anything else that doubles is a defect to mend here.
const DOUBLED: &[&str] = &[
    "base64",         // docker_credential, and reqwest
    "bitflags",       // fuse-backend-rs is a major version behind everybody
    "getrandom",      // ring, and tempfile with proptest
    "hashbrown",      // the build of kubelets' protocol, and everybody
    "linux-raw-sys",  // rustix's own, twice as it is
    "memoffset",      // nix's own, twice as it is
    "mio",            // fuse-backend-rs, and tokio
    "nix",            // fuse-backend-rs, and ttrpc
    "rustix",         // the search for protoc in ttrpc's build, which needs none, and everybody
    "syn",            // older derive macros, and newer ones
    "thiserror",      // ttrpc is a major version behind everybody
    "thiserror-impl", // thiserror's own, twice as it is
];

pub(super) fn check() -> Result<()> {
    let metadata = MetadataCommand::new()
        .other_options(vec![
            "--locked".into(),
            "--filter-platform=x86_64-unknown-linux-gnu".into(),
        ])
        .exec()
        .context("cannot read the workspace (is Cargo.lock up to date?)")?;
    let mut faults = arrows(&metadata);
    faults.extend(sources_and_licences(&metadata));
    faults.extend(doubles(&metadata));
    faults.extend(agent_size(&metadata));
    if !faults.is_empty() {
        bail!("{} faults:\n  {}", faults.len(), faults.join("\n  "));
    }
    Ok(())
}

fn arrows(metadata: &Metadata) -> Vec<String> {
    let members: BTreeSet<&str> = metadata
        .workspace_packages()
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let mut faults = Vec::new();
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let Some((_, allowed)) = ARROWS.iter().find(|(of, _)| *of == name) else {
            faults.push(format!("{name} has no row in ARROWS"));
            continue;
        };
        let banned = BANNED
            .iter()
            .find(|(of, _)| *of == name)
            .map_or(&[][..], |(_, names)| names);
        for dependency in &package.dependencies {
            let on = dependency.name.as_str();
            if members.contains(on) && !allowed.contains(&on) {
                faults.push(format!("{name} may not know {on}"));
            }
            if banned.contains(&on) {
                faults.push(format!("{name} must not depend on {on}"));
            }
        }
    }
    faults
}

fn sources_and_licences(metadata: &Metadata) -> Vec<String> {
    let foreign = metadata
        .packages
        .iter()
        .filter(|package| package.source.is_some());
    foreign
        .filter_map(|package| {
            let crates_io = package
                .source
                .as_ref()
                .is_some_and(|source| source.is_crates_io());
            if !crates_io {
                return Some(format!("{} does not come from crates.io", package.name));
            }
            if !licence_allowed(package) {
                return Some(format!(
                    "{} has licence {:?}",
                    package.name, package.license
                ));
            }
            None
        })
        .collect()
}

/// An `OR` needs one allowed side; an `AND` needs all.
fn licence_allowed(package: &Package) -> bool {
    let Some(expression) = &package.license else {
        return false;
    };
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    plain.split(" OR ").any(|side| {
        side.split(" AND ")
            .all(|licence| LICENCES.contains(&licence.trim()))
    })
}

fn doubles(metadata: &Metadata) -> Vec<String> {
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let built: BTreeSet<_> = metadata
        .resolve
        .iter()
        .flat_map(|graph| &graph.nodes)
        .map(|n| &n.id)
        .collect();
    for package in metadata
        .packages
        .iter()
        .filter(|package| built.contains(&package.id))
    {
        versions
            .entry(package.name.as_str())
            .or_default()
            .insert(package.version.to_string());
    }
    let doubled = |name: &str| versions.get(name).is_some_and(|found| found.len() > 1);
    let new = versions
        .iter()
        .filter(|(name, found)| found.len() > 1 && !DOUBLED.contains(name));
    let mut faults: Vec<String> = new
        .map(|(name, found)| format!("{name} stands in several versions: {found:?}"))
        .collect();
    let gone = DOUBLED.iter().filter(|name| !doubled(name));
    faults.extend(gone.map(|name| format!("{name} is doubled no more: drop it from DOUBLED")));
    faults
}

fn agent_size(metadata: &Metadata) -> Vec<String> {
    let Some(resolve) = &metadata.resolve else {
        return vec!["no dependency graph".into()];
    };
    let names: BTreeMap<_, _> = metadata.packages.iter().map(|p| (&p.id, p)).collect();
    let mut queue: Vec<_> = metadata
        .packages
        .iter()
        .filter(|p| p.name.as_str() == "hull-agent")
        .map(|p| &p.id)
        .collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = queue.pop() {
        if !seen.insert(id) {
            continue;
        }
        let Some(node) = resolve.nodes.iter().find(|node| &node.id == id) else {
            continue;
        };
        let normal = node.deps.iter().filter(|dep| {
            dep.dep_kinds
                .iter()
                .any(|kind| kind.kind == cargo_metadata::DependencyKind::Normal)
        });
        let linked = normal.filter(|dep| !names.get(&dep.pkg).is_some_and(|p| is_macro(p)));
        queue.extend(linked.map(|dep| &dep.pkg));
    }
    if seen.len() > AGENT_CRATES {
        return vec![format!(
            "hull-agent is made of {} crates, over {AGENT_CRATES}",
            seen.len()
        )];
    }
    Vec::new()
}

fn is_macro(package: &Package) -> bool {
    package
        .targets
        .iter()
        .any(|target| target.kind.contains(&cargo_metadata::TargetKind::ProcMacro))
}
