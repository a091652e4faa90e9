//! `events` and `ps`: what a container is doing, in runc's words.

use std::io::{Write, stdout};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use hull_sandbox::control::InterfaceStats;
use hull_sandbox::{CgroupStats, Container, Engine, EngineError, PS_HEADINGS, Status, ps_row};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::args::{EventsArgs, PsArgs};
use crate::log::Log;
use crate::manage;

/// Prints what a container uses, once or from time to time, and when its memory runs out, a JSON
/// object a line, until it ends.
pub(crate) fn events(engine: &Engine, args: &EventsArgs, log: &Log) -> anyhow::Result<u8> {
    let interval = interval(&args.interval)?;
    let container = manage::find(engine, &args.id)?;
    if !matches!(container.status()?, Status::Running(_)) {
        bail!("container with id {} is not running", args.id);
    }
    if args.stats {
        say("stats", &args.id, Some(&statistics(&container)?))?;
        return Ok(0);
    }
    let watched = manage::find(engine, &args.id)?;
    let (ran_out, news) = channel();
    // It ends with this process, or with the container.
    thread::spawn(move || {
        let mut seen = 0;
        while let Ok(Some(count)) = watched.await_oom(seen) {
            seen = count;
            if ran_out.send(()).is_err() {
                return;
            }
        }
    });
    loop {
        match news.recv_timeout(interval) {
            Ok(()) => say("oom", &args.id, None)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(0),
            Err(RecvTimeoutError::Timeout) => match statistics(&container) {
                Ok(data) => say("stats", &args.id, Some(&data))?,
                Err(EngineError::NotRunning(_)) => return Ok(0),
                // One that is paused goes on.
                Err(error) => log.warn(&error.into()),
            },
        }
    }
}

fn interval(text: &str) -> anyhow::Result<Duration> {
    let interval: SignedDuration = text
        .parse()
        .with_context(|| format!("invalid interval \"{text}\""))?;
    if !interval.is_positive() {
        bail!("duration interval must be greater than 0");
    }
    Duration::try_from(interval).context("the interval is too long")
}

fn say(kind: &str, id: &str, data: Option<&Value>) -> anyhow::Result<()> {
    let mut event = json!({"type": kind, "id": id});
    if let Some(data) = data {
        event["data"] = data.clone();
    }
    writeln!(stdout(), "{event}").context("cannot write the output")
}

fn statistics(container: &Container) -> Result<Value, EngineError> {
    Ok(data(&container.stats()?, &container.interfaces()?))
}

/// Statistics as runc prints those of cgroup v2: times in nanoseconds, no limit as the largest
/// number (of processes: 0), swap as memory and swap together.
fn data(stats: &CgroupStats, interfaces: &[InterfaceStats]) -> Value {
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    let limit = memory.limit.unwrap_or(u64::MAX);
    let swap_limit = match (memory.swap_limit, memory.limit) {
        (Some(swap), Some(memory)) => swap.saturating_add(memory),
        _ => u64::MAX,
    };
    let entries = |pick: fn(&hull_sandbox::IoStats) -> [(&'static str, u64); 2]| {
        let of = |device: &hull_sandbox::IoStats| {
            let (major, minor) = (device.major, device.minor);
            pick(device).map(
                |(op, value)| json!({"major": major, "minor": minor, "op": op, "value": value}),
            )
        };
        stats.io.iter().flat_map(of).collect::<Vec<Value>>()
    };
    let interfaces = interfaces.iter().map(|interface| {
        let mut shown = json!(interface);
        // A card of a VM's has none.
        (shown["RxErrors"], shown["TxErrors"]) = (json!(0), json!(0));
        shown
    });
    let interfaces: Vec<Value> = interfaces.collect();
    json!({
        "cpu": {
            "usage": {
                "total": cpu.usage_usec.saturating_mul(1000),
                "kernel": cpu.system_usec.saturating_mul(1000),
                "user": cpu.user_usec.saturating_mul(1000),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": cpu.throttled_usec.saturating_mul(1000),
            },
        },
        "cpuset": {},
        "memory": {
            "cache": memory.stat.file,
            "usage": {
                "limit": limit, "usage": memory.usage, "max": memory.peak,
                "failcnt": stats.memory_events.max,
            },
            "swap": {
                "limit": swap_limit, "usage": memory.swap_usage.saturating_add(memory.usage),
                "max": memory.swap_peak, "failcnt": 0,
            },
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": memory.stat,
        },
        "pids": {"current": stats.pids.current, "limit": stats.pids.limit.unwrap_or(0)},
        "blkio": {
            "ioServiceBytesRecursive": entries(|io| [("Read", io.rbytes), ("Write", io.wbytes)]),
            "ioServicedRecursive": entries(|io| [("Read", io.rios), ("Write", io.wios)]),
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": if interfaces.is_empty() { Value::Null } else { interfaces.into() },
    })
}

/// Lists the container's processes: as a table those in its guest, by their ids there; as JSON, for
/// engines, which look for ids on the host, the one that it has there.
pub(crate) fn ps(engine: &Engine, args: &PsArgs) -> anyhow::Result<u8> {
    let container = manage::find(engine, &args.id)?;
    let mut out = stdout().lock();
    match args.format.as_str() {
        "json" => match container.status()? {
            Status::Running(running) => writeln!(out, "{}", json!([running.monitor_pid]))?,
            _ => bail!("container not running"),
        },
        "table" => {
            let processes = match container.processes() {
                Err(EngineError::NotRunning(_)) => bail!("container not running"),
                processes => processes?,
            };
            let now = Timestamp::now();
            writeln!(out, "{}", line(PS_HEADINGS))?;
            for process in &processes {
                writeln!(
                    out,
                    "{}",
                    line(ps_row(process, now).each_ref().map(String::as_str))
                )?;
            }
        }
        _ => bail!("invalid format option"),
    }
    Ok(0)
}

/// A line of `ps -ef`.
fn line([uid, pid, parent, share, began, terminal, time, command]: [&str; 8]) -> String {
    format!("{uid:<8} {pid:>7} {parent:>7} {share:>2} {began:<5} {terminal:<8} {time:>8} {command}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_runcs_shape() {
        let mut stats = CgroupStats::default();
        stats.cpu.usage_usec = 5;
        stats.memory.usage = 7;
        stats.io = vec![hull_sandbox::IoStats {
            major: 254,
            rbytes: 3,
            ..Default::default()
        }];
        let card = InterfaceStats {
            name: "eth0".to_owned(),
            rx_bytes: 3,
            ..InterfaceStats::default()
        };
        let data = data(&stats, &[card]);
        let shown = &data["network_interfaces"][0];
        assert_eq!(
            (&shown["Name"], &shown["RxBytes"]),
            (&json!("eth0"), &json!(3))
        );
        assert_eq!(shown["TxErrors"], 0);
        assert_eq!(data["cpu"]["usage"]["total"], 5000);
        assert_eq!(data["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(data["memory"]["swap"]["usage"], 7);
        assert_eq!(data["memory"]["raw"]["anon"], 0);
        let read = json!({"major": 254, "minor": 0, "op": "Read", "value": 3});
        assert_eq!(data["blkio"]["ioServiceBytesRecursive"][0], read);
    }

    #[test]
    fn intervals_are_gos() {
        assert_eq!(interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(interval("100ms").unwrap(), Duration::from_millis(100));
        assert_eq!(interval("1m30s").unwrap(), Duration::from_secs(90));
        for bad in ["0s", "-1s", "5", "x", ""] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
