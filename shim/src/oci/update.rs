//! `update`: other limits for a container that runs, by runc's flags or from a document.

use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use hull_sandbox::{Engine, EngineError};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use crate::args::UpdateArgs;
use crate::manage;

/// Largest document of limits that is read, in bytes.
const MAX_RESOURCES: u64 = 1 << 20;

/// Changes a container's limits.
pub(crate) fn update(engine: &Engine, args: &UpdateArgs) -> anyhow::Result<u8> {
    let container = manage::find(engine, &args.id)?;
    let resources = match &args.resources {
        Some(path) => read(path)?,
        None => resources(args)?,
    };
    match container.update(&resources) {
        Err(EngineError::NotRunning(_)) => bail!("container not running"),
        updated => updated?,
    }
    Ok(0)
}

fn read(path: &Path) -> anyhow::Result<LinuxResources> {
    let mut text = Vec::new();
    let read = match path == Path::new("-") {
        true => stdin().take(MAX_RESOURCES).read_to_end(&mut text),
        false => File::open(path).and_then(|file| file.take(MAX_RESOURCES).read_to_end(&mut text)),
    };
    read.with_context(|| format!("cannot read \"{}\"", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("\"{}\" holds no resources", path.display()))
}

/// The limits that flags ask for.
fn resources(args: &UpdateArgs) -> anyhow::Result<LinuxResources> {
    let refused = [
        ("blkio-weight", args.blkio_weight.is_some()),
        ("cpu-rt-period", args.cpu_rt_period.is_some()),
        ("cpu-rt-runtime", args.cpu_rt_runtime.is_some()),
        ("l3-cache-schema", args.l3_cache_schema.is_some()),
        ("mem-bw-schema", args.mem_bw_schema.is_some()),
    ];
    if let Some((flag, _)) = refused.iter().find(|(_, is_set)| *is_set) {
        bail!("--{flag} is refused: a virtual machine can't be limited so");
    }
    let memory = group([
        ("limit", size(args.memory.as_deref())?),
        ("reservation", size(args.memory_reservation.as_deref())?),
    ]);
    let number = |value: Option<i64>| value.map(Value::from);
    let cpu = group([
        ("period", number(args.cpu_period)),
        ("quota", number(args.cpu_quota)),
        ("burst", number(args.cpu_burst)),
        ("shares", number(args.cpu_share)),
        ("idle", number(args.cpu_idle)),
        ("cpus", args.cpuset_cpus.clone().map(Value::from)),
        ("mems", args.cpuset_mems.clone().map(Value::from)),
    ]);
    let pids = args.pids_limit.map(|limit| json!({"limit": limit}));
    let all = group([("memory", memory), ("cpu", cpu), ("pids", pids)]);
    serde_json::from_value(all.unwrap_or_else(|| json!({}))).context("a limit is out of range")
}

/// An object of those fields that are there, or nothing.
fn group<const N: usize>(fields: [(&str, Option<Value>); N]) -> Option<Value> {
    let there = fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let object: Map<String, Value> = there.collect();
    (!object.is_empty()).then_some(Value::Object(object))
}

/// Bytes as runc reads them: a number, with `b`, `k`, `m`, `g` or `t` for powers of 1024; -1 is
/// no limit.
fn size(text: Option<&str>) -> anyhow::Result<Option<Value>> {
    let Some(text) = text else { return Ok(None) };
    let lower = text.to_ascii_lowercase();
    let plain = lower.trim_end_matches('b').trim_end_matches('i');
    let (digits, shift) = match plain.char_indices().next_back() {
        Some((end, 'k')) => (&plain[..end], 10),
        Some((end, 'm')) => (&plain[..end], 20),
        Some((end, 'g')) => (&plain[..end], 30),
        Some((end, 't')) => (&plain[..end], 40),
        _ => (plain, 0),
    };
    let bytes = match text {
        "-1" => Some(-1),
        // Without a sign.
        _ => digits
            .parse::<u64>()
            .ok()
            .and_then(|number| i64::try_from(number).ok()),
    };
    let bytes = bytes.and_then(|number| number.checked_mul(1_i64 << shift));
    let bytes = bytes.ok_or_else(|| anyhow!("invalid size: '{text}'"))?;
    Ok(Some(bytes.into()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, HullOci};

    fn asked(flags: &[&str]) -> anyhow::Result<Value> {
        let words = ["hull-oci", "update"].iter().chain(flags).chain(&["c"]);
        let Some(Command::Update(args)) = HullOci::try_parse_from(words)?.command else {
            bail!("another command");
        };
        Ok(serde_json::to_value(resources(&args)?)?)
    }

    #[test]
    fn flags_become_resources() {
        let flags = [
            "--memory",
            "32M",
            "--memory-reservation=1g",
            "--memory-swap",
            "-1",
            "--cpu-quota",
            "-1",
            "--cpu-period",
            "1000",
            "--cpu-share=512",
            "--cpuset-cpus",
            "0-1",
            "--pids-limit",
            "9",
        ];
        assert_eq!(
            asked(&flags).unwrap(),
            json!({"memory": {"limit": 32 << 20, "reservation": 1 << 30},
                "cpu": {"quota": -1, "period": 1000, "shares": 512, "cpus": "0-1"},
                "pids": {"limit": 9}})
        );
        assert_eq!(asked(&[]).unwrap(), json!({}));
    }

    #[test]
    fn sizes_are_bytes_or_powers() {
        let sizes = [
            ("1", 1),
            ("4k", 4096),
            ("4KiB", 4096),
            ("5000000000", 5_000_000_000),
            ("-1", -1),
            ("2t", 2_i64 << 40),
        ];
        for (text, bytes) in sizes {
            assert_eq!(size(Some(text)).unwrap(), Some(json!(bytes)), "{text}");
        }
        for bad in ["", "k", "-2", "1x", "1.5", "99999999999t", "-1k"] {
            assert!(size(Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_vm_cannot_do_is_refused_by_name() {
        for flag in [
            "--blkio-weight=5",
            "--cpu-rt-period=1",
            "--l3-cache-schema=x",
        ] {
            let said = asked(&[flag]).unwrap_err().to_string();
            assert!(said.contains("is refused"), "{said}");
        }
        assert!(asked(&["--cpu-share=-5"]).is_err());
    }
}
