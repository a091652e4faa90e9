//! Docker's `daemon.json`: a runtime beside runc.

use anyhow::{Context, bail};
use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstObject, CstRootNode};
use serde_json::Value;

use super::file::{self, Change};
use super::{Host, NAME, Planned, Wish};

const CONFIG: &str = "/etc/docker/daemon.json";

pub(super) fn plan(host: &Host, wish: Wish) -> Planned {
    let path = host.at(CONFIG);
    let before = file::read(&path)?;
    let is_there = before.is_some() || host.has_program("dockerd");
    if !is_there || (before.is_none() && wish == Wish::Forgotten) {
        return Ok(None);
    }
    let text = match before.as_deref().map(str::trim) {
        None | Some("") => "{\n}\n",
        Some(_) => before.as_deref().unwrap_or_default(),
    };
    // Docker's own parser is as strict.
    let strict: Value =
        serde_json::from_str(text).with_context(|| format!("\"{}\" is no JSON", path.display()))?;
    let left_alone = || format!("\"{}\" is left alone", path.display());
    let document = CstRootNode::parse(text, &ParseOptions::default()).with_context(left_alone)?;
    let object = document.object_value();
    let object = object
        .context("it holds no object")
        .with_context(left_alone)?;
    if let Some(there) = strict.pointer("/runtimes/hull") {
        check(there).with_context(left_alone)?;
    }
    match wish {
        Wish::Known if strict.pointer("/runtimes/hull").is_some() => {}
        Wish::Known => {
            let runtimes = object.object_value_or_create("runtimes");
            let runtimes = runtimes.context("its \"runtimes\" is no object");
            runtimes.with_context(left_alone)?.append(NAME, entry(host));
        }
        Wish::Forgotten => take(&object),
    }
    Ok(Some(Change {
        path,
        after: Some(document.to_string()),
        before,
    }))
}

/// The runtime as Docker has it: by containerd's shim, else by the OCI command line.
fn entry(host: &Host) -> CstInputValue {
    let (key, program) = match host.has_shim {
        true => ("runtimeType", host.shim()),
        false => ("path", host.program("hull-oci")),
    };
    CstInputValue::Object(vec![(key.to_owned(), CstInputValue::String(program))])
}

fn take(object: &CstObject) {
    let Some(runtimes) = object.object_value("runtimes") else {
        return;
    };
    if let Some(own) = runtimes.get(NAME) {
        own.remove();
        if runtimes.properties().is_empty()
            && let Some(all) = object.get("runtimes")
        {
            all.remove();
        }
    }
}

fn check(runtime: &Value) -> anyhow::Result<()> {
    let is_ours = |key: &str| {
        let program = runtime[key]
            .as_str()
            .and_then(|path| path.rsplit('/').next());
        matches!(
            program,
            Some("containerd-shim-hull-v2" | "hull-oci" | "io.containerd.hull.v2")
        )
    };
    if !is_ours("runtimeType") && !is_ours("path") {
        bail!("its runtime \"{NAME}\" is another program");
    }
    Ok(())
}
