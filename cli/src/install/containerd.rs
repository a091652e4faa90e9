//! containerd's `config.toml`: a runtime of its CRI plugin, which Kubernetes uses. Its other
//! clients find the shim by the runtime's type.

use std::path::Path;

use anyhow::{Context, bail};
use toml_edit::{DocumentMut, Item, Table, value};

use super::file::{self, Change, OURS};
use super::{Host, NAME, Planned, RUNTIME_TYPE, SERVICE_PATH, Wish};

const CONFIG: &str = "/etc/containerd/config.toml";

/// The runtime that containerd has by default, unless its file names others.
const DEFAULT: (&str, &str) = ("runc", "io.containerd.runc.v2");

/// Stands above the default runtime where it had to be written down.
const REMARK: &str = "\n# By `hull install`: what this list doesn't name, containerd forgets.\n";

pub(super) fn plan(host: &Host, wish: Wish) -> Planned {
    let path = host.at(CONFIG);
    let before = file::read(&path)?;
    if before.is_none() && (wish == Wish::Forgotten || !host.has_program("containerd")) {
        return Ok(None);
    }
    if wish == Wish::Known && !host.has_shim {
        bail!("there is no \"{}\"", host.shim());
    }
    // Both 1.x and 2.x read version 2.
    let new = || format!("{OURS}version = 2\n");
    let text = before.clone().unwrap_or_else(new);
    let mut document: DocumentMut = text
        .parse()
        .with_context(|| format!("\"{}\" is no TOML", path.display()))?;
    let version = document.get("version").and_then(Item::as_integer);
    let plugin = match version {
        Some(2) => "io.containerd.grpc.v1.cri",
        Some(3..) => "io.containerd.cri.v1.runtime",
        _ => bail!(
            "\"{}\" is of version 1: `containerd config migrate` prints it as of a later one",
            path.display()
        ),
    };
    let way = ["plugins", plugin, "containerd", "runtimes"];
    match wish {
        Wish::Known => add(document.as_table_mut(), &way, host),
        Wish::Forgotten => take(document.as_table_mut(), &way),
    }
    .with_context(|| format!("\"{}\" is left alone", path.display()))?;
    let only_version = document.iter().all(|(key, _)| key == "version");
    let after = (!(text.starts_with(OURS) && only_version)).then(|| document.to_string());
    Ok(Some(Change {
        path,
        before,
        after,
    }))
}

fn add(table: &mut Table, way: &[&str], host: &Host) -> anyhow::Result<()> {
    let mut table = table;
    for name in way {
        let next = table.entry(name).or_insert_with(|| {
            let mut made = Table::new();
            made.set_implicit(true);
            Item::Table(made)
        });
        let next = next.as_table_mut();
        table = next.with_context(|| format!("its \"{name}\" is no table of its own"))?;
    }
    if let Some(there) = table.get(NAME) {
        return check(there);
    }
    if table.is_empty() {
        let mut default = Table::new();
        default.insert("runtime_type", value(DEFAULT.1));
        default.decor_mut().set_prefix(REMARK);
        table.insert(DEFAULT.0, Item::Table(default));
    }
    let mut runtime = Table::new();
    runtime.insert("runtime_type", value(RUNTIME_TYPE));
    let is_own = |directory: &str| Path::new(directory) == host.programs;
    if !SERVICE_PATH.into_iter().any(is_own) {
        runtime.insert("runtime_path", value(host.shim()));
    }
    // A privileged container is so in its own machine.
    runtime.insert("privileged_without_host_devices", value(true));
    table.insert(NAME, Item::Table(runtime));
    Ok(())
}

fn take(table: &mut Table, way: &[&str]) -> anyhow::Result<()> {
    let Some((name, rest)) = way.split_first() else {
        if let Some(there) = table.get(NAME) {
            check(there)?;
            table.remove(NAME);
        }
        let default = table.get(DEFAULT.0).and_then(Item::as_table);
        let prefix = default.and_then(|default| default.decor().prefix()?.as_str());
        if table.len() == 1 && prefix == Some(REMARK) {
            table.remove(DEFAULT.0);
        }
        return Ok(());
    };
    let Some(next) = table.get_mut(name).and_then(Item::as_table_mut) else {
        return Ok(());
    };
    take(next, rest)?;
    // What held nothing but that goes with it.
    if next.is_empty() && next.is_implicit() {
        table.remove(name);
    }
    Ok(())
}

fn check(runtime: &Item) -> anyhow::Result<()> {
    let kind = runtime.get("runtime_type").and_then(Item::as_str);
    if kind != Some(RUNTIME_TYPE) {
        bail!("its runtime \"{NAME}\" is not of type {RUNTIME_TYPE}");
    }
    Ok(())
}
