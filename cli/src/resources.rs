//! `hull stats | top | update`: what running containers use and may use.

use std::collections::HashMap;
use std::io::{IsTerminal, Write, stdout};
use std::thread;
use std::time::{Duration, Instant};

use hull_sandbox::control::InterfaceStats;
use hull_sandbox::{CgroupStats, Container, Engine, EngineError, PS_HEADINGS, Status, ps_row};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::args::{StatsArgs, TopArgs, UpdateArgs};
use crate::containers::each;
use crate::failure::report_one;
use crate::format::{self, Column, Layout, Row, write_table};

const COLUMNS: [Column; 8] = [
    ("CONTAINER ID", "ID"),
    ("NAME", "Name"),
    ("CPU %", "CPUPerc"),
    ("MEM USAGE / LIMIT", "MemUsage"),
    ("MEM %", "MemPerc"),
    ("NET I/O", "NetIO"),
    ("BLOCK I/O", "BlockIO"),
    ("PIDS", "PIDs"),
];

/// The time over which a share of processors is measured, and between tables.
const INTERVAL: Duration = Duration::from_secs(1);

/// Digits of an id that people see.
const SHORT_ID: usize = 12;

/// Processors' period when a number of them is asked for, in microseconds.
const PERIOD_US: u32 = 100_000;

/// A container's statistics at a moment.
struct Sample {
    at: Instant,
    stats: CgroupStats,
    interfaces: Vec<InterfaceStats>,
}

/// `hull stats`.
pub(crate) fn stats(engine: &Engine, args: &StatsArgs) -> anyhow::Result<u8> {
    let layout = Layout::parse(args.format.as_deref(), &COLUMNS)?;
    let mut before = samples(&watched(engine, args)?)?;
    loop {
        #[expect(
            clippy::disallowed_methods,
            reason = "what passes is the interval itself"
        )]
        thread::sleep(INTERVAL);
        let containers = watched(engine, args)?;
        let now = samples(&containers)?;
        let row = |container: &Container| {
            let id = container.id();
            row(container, before.get(id), now.get(id), args.no_trunc)
        };
        let rows = containers.iter().map(row).collect();
        let mut out = Vec::new();
        if !args.no_stream && stdout().is_terminal() {
            out.extend_from_slice(b"\x1b[2J\x1b[H");
        }
        layout.write(rows, &mut out)?;
        stdout().write_all(&out)?;
        if args.no_stream {
            return Ok(0);
        }
        before = now;
    }
}

/// What containers use now, by their ids.
fn samples(containers: &[Container]) -> anyhow::Result<HashMap<String, Sample>> {
    let mut samples = HashMap::new();
    for container in containers {
        if let Some(sample) = sample(container)? {
            samples.insert(container.id().to_owned(), sample);
        }
    }
    Ok(samples)
}

/// The containers that are named, or those that run.
fn watched(engine: &Engine, args: &StatsArgs) -> anyhow::Result<Vec<Container>> {
    if !args.names.is_empty() {
        let found = args.names.iter().map(|name| engine.find(name));
        return Ok(found.collect::<Result<_, _>>()?);
    }
    let mut all = engine.list()?;
    all.retain(|container| args.all || matches!(container.status(), Ok(Status::Running(_))));
    Ok(all)
}

/// What a container uses now; nothing if it doesn't run, or can't say, which is told.
fn sample(container: &Container) -> anyhow::Result<Option<Sample>> {
    let both = container
        .stats()
        .and_then(|stats| Ok((stats, container.interfaces()?)));
    match both {
        Ok((stats, interfaces)) => Ok(Some(Sample {
            at: Instant::now(),
            stats,
            interfaces,
        })),
        Err(EngineError::NotRunning(_)) => Ok(None),
        Err(error @ EngineError::Monitor { .. }) => {
            report_one(&error.into());
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn row(container: &Container, before: Option<&Sample>, now: Option<&Sample>, whole: bool) -> Row {
    let id = container.id();
    let shown = if whole {
        id
    } else {
        id.get(..SHORT_ID).unwrap_or(id)
    };
    let mut row = Row::new();
    for (field, value) in [
        ("ID", shown),
        ("Container", shown),
        ("Name", container.name()),
    ] {
        row.insert(field.to_owned(), json!(value));
    }
    let most = container.plan().vm.memory_bytes;
    let numbers = now.map(|now| numbers(before, now, most));
    let numbers = numbers.unwrap_or_else(|| {
        let none = |text: &str| text.to_owned();
        [
            none("--"),
            none("-- / --"),
            none("--"),
            none("--"),
            none("--"),
            none("--"),
        ]
    });
    let fields = ["CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"];
    for (field, value) in fields.into_iter().zip(numbers) {
        row.insert(field.to_owned(), json!(value));
    }
    row
}

/// The columns of numbers, of a container whose guest has `most` bytes of memory.
fn numbers(before: Option<&Sample>, now: &Sample, most: u64) -> [String; 6] {
    let share = before.map_or(0.0, |before| {
        let used = now
            .stats
            .cpu
            .usage_usec
            .saturating_sub(before.stats.cpu.usage_usec);
        let time = now.at.duration_since(before.at).as_micros().max(1);
        // Far below what a float holds exactly.
        used as f64 * 100.0 / time as f64
    });
    let memory = &now.stats.memory;
    // What the kernel takes back at once isn't in use.
    let used = memory.usage.saturating_sub(memory.stat.inactive_file);
    let limit = memory.limit.unwrap_or(most).min(most);
    let sum = |bytes: fn(&InterfaceStats) -> u64| now.interfaces.iter().map(bytes).sum();
    let (mut read, mut written) = (0_u64, 0_u64);
    for device in &now.stats.io {
        read = read.saturating_add(device.rbytes);
        written = written.saturating_add(device.wbytes);
    }
    [
        format!("{share:.2}%"),
        format!("{} / {}", binary(used), binary(limit)),
        format!("{:.2}%", used as f64 * 100.0 / limit.max(1) as f64),
        format!(
            "{} / {}",
            format::size(sum(|card| card.rx_bytes)),
            format::size(sum(|card| card.tx_bytes))
        ),
        format!("{} / {}", format::size(read), format::size(written)),
        now.stats.pids.current.to_string(),
    ]
}

/// Bytes in powers of 1024, with four digits, as Docker shows memory.
fn binary(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while value >= 1024.0
        && let Some(next) = units.next()
    {
        value /= 1024.0;
        unit = next;
    }
    let digits = match value {
        value if value < 10.0 => 3,
        value if value < 100.0 => 2,
        value if value < 1000.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text}{unit}")
}

/// `hull top`.
pub(crate) fn top(engine: &Engine, args: &TopArgs) -> anyhow::Result<u8> {
    let processes = engine.find(&args.name)?.processes()?;
    let now = Timestamp::now();
    let mut lines = vec![PS_HEADINGS.map(str::to_owned).to_vec()];
    lines.extend(
        processes
            .iter()
            .map(|process| ps_row(process, now).to_vec()),
    );
    write_table(&lines, &mut stdout())?;
    Ok(0)
}

/// `hull update`.
pub(crate) fn update(engine: &Engine, args: &UpdateArgs) -> anyhow::Result<u8> {
    let resources = serde_json::from_value(resources(args))?;
    each(&args.containers.names, |name| {
        engine.find(name)?.update(&resources)?;
        Ok(Some(name.to_owned()))
    })
}

/// The limits that are asked for, as the OCI runtime specification has them.
fn resources(args: &UpdateArgs) -> Value {
    let whole = args
        .cpus
        .map(|cpus| (cpus * f64::from(PERIOD_US)).round() as i64);
    let period = args.cpu_period.or(whole.map(|_| i64::from(PERIOD_US)));
    let memory = [
        ("limit", args.memory.map(Value::from)),
        ("reservation", args.memory_reservation.map(Value::from)),
    ];
    let cpu = [
        ("quota", args.cpu_quota.or(whole).map(Value::from)),
        ("period", period.map(Value::from)),
        ("shares", args.cpu_shares.map(Value::from)),
        ("cpus", args.cpuset_cpus.clone().map(Value::from)),
        ("mems", args.cpuset_mems.clone().map(Value::from)),
    ];
    let pids = [("limit", args.pids_limit.map(Value::from))];
    let mut all = Map::new();
    for (name, group) in [("memory", &memory[..]), ("cpu", &cpu), ("pids", &pids)] {
        let there = group.iter();
        let there = there.filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
        let object: Map<String, Value> = there.collect();
        if !object.is_empty() {
            all.insert(name.to_owned(), Value::Object(object));
        }
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, Hull};

    #[test]
    fn memory_is_shown_with_four_digits() {
        for (bytes, shown) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1KiB"),
            (1_572_864, "1.5MiB"),
            (123_456_789, "117.7MiB"),
            (512 << 20, "512MiB"),
            (u64::MAX, "16EiB"),
        ] {
            assert_eq!(binary(bytes), shown);
        }
    }

    #[test]
    fn numbers_are_those_since_the_last_look() {
        let at = Instant::now();
        let sample = |seconds, usage_usec| {
            let mut stats = CgroupStats::default();
            stats.cpu.usage_usec = usage_usec;
            stats.memory.usage = 96 << 20;
            stats.memory.stat.inactive_file = 32 << 20;
            stats.pids.current = 3;
            let card = InterfaceStats {
                rx_bytes: 1000,
                tx_bytes: 600,
                ..InterfaceStats::default()
            };
            Sample {
                at: at + Duration::from_secs(seconds),
                stats,
                interfaces: vec![card.clone(), card],
            }
        };
        let (before, now) = (sample(0, 500), sample(2, 1_000_500));
        let shown = [
            "50.00%",
            "64MiB / 128MiB",
            "50.00%",
            "2kB / 1.2kB",
            "0B / 0B",
            "3",
        ];
        assert_eq!(numbers(Some(&before), &now, 128 << 20), shown);
        assert_eq!(numbers(None, &now, 128 << 20)[0], "0.00%");
    }

    #[test]
    fn update_understands_dockers_flags() {
        let words = "hull update --cpus 1.5 -m 64m --cpu-shares 9 --pids-limit -1 a b";
        let Command::Update(args) = Hull::try_parse_from(words.split(' ')).unwrap().command else {
            panic!("another command");
        };
        assert_eq!(
            resources(&args),
            json!({"memory": {"limit": 64 << 20}, "pids": {"limit": -1},
                "cpu": {"quota": 150_000, "period": 100_000, "shares": 9}})
        );
        let both = "hull update --cpus 1 --cpu-quota 5 a";
        assert!(Hull::try_parse_from(both.split(' ')).is_err());
    }
}
