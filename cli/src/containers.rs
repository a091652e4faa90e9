//! `hull ps | stop | kill | rm | wait`.

use std::io::{Write, stdout};
use std::time::Duration;

use hull_sandbox::{Container, Engine, EngineError, PlannedRoot, Status, parse_signal};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::args::{KillArgs, NamesArgs, PsArgs, RmArgs, StopArgs};
use crate::failure::{Coded, report_one};
use crate::format::{self, Column, Layout, Row, printable, shorten};

const COLUMNS: [Column; 6] = [
    ("CONTAINER ID", "ID"),
    ("IMAGE", "Image"),
    ("COMMAND", "Command"),
    ("CREATED", "RunningFor"),
    ("STATUS", "Status"),
    ("NAMES", "Names"),
];

/// Digits of an id that people see.
const SHORT_ID: usize = 12;

/// Characters of a command that a table shows.
const SHORT_COMMAND: usize = 20;

/// `hull ps`.
pub(crate) fn ps(engine: &Engine, args: &PsArgs) -> anyhow::Result<u8> {
    // What killed monitors were to take with them shouldn't be shown. A sweep that fails is
    // tried again by the next command.
    let _ = engine.sweep();
    let layout = match args.quiet {
        true => Layout::parse(Some("{{.ID}}"), &COLUMNS)?,
        false => Layout::parse(args.format.as_deref(), &COLUMNS)?,
    };
    let filters = args
        .filter
        .iter()
        .map(|(key, value)| Filter::read(key, value));
    let filters = filters.collect::<Result<Vec<_>, _>>()?;
    // Asking for a state asks for the containers in it, running or not.
    let all = args.all || filters.iter().any(Filter::is_about_state);
    let now = Timestamp::now();
    let mut rows = Vec::new();
    for container in engine.list()? {
        let status = match container.status() {
            Ok(status) => status,
            // It went while we looked.
            Err(EngineError::Store(error)) if error.is_missing() => continue,
            Err(error) => return Err(error.into()),
        };
        let live = matches!(status, Status::Starting | Status::Running(_));
        let known = Known {
            container: &container,
            status: &status,
        };
        if (all || live) && filters.iter().all(|filter| filter.lets(&known)) {
            rows.push(row(&container, &status, now, args.no_trunc));
        }
    }
    layout.write(rows, &mut stdout())?;
    Ok(0)
}

fn row(container: &Container, status: &Status, now: Timestamp, whole: bool) -> Row {
    let plan = container.plan();
    let command = format!("\"{}\"", printable(&plan.command().join(" ")));
    let image = match (&plan.image, &plan.root) {
        (Some(image), _) => image.reference.clone(),
        (None, PlannedRoot::Directory(path)) => path.display().to_string(),
        (None, PlannedRoot::Layers(_)) => String::new(),
    };
    let labels: Vec<String> = plan
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let fields = json!({
        "ID": if whole { container.id() } else { short_id(container.id()) },
        "Image": image,
        "Command": if whole { command } else { shorten(&command, SHORT_COMMAND) },
        "CreatedAt": plan.created_at.to_string(),
        "RunningFor": format!("{} ago", format::age(now.duration_since(plan.created_at))),
        "State": state(status),
        "Status": status_words(status, now),
        "Names": container.name(),
        "Labels": labels.join(","),
    });
    match fields {
        Value::Object(row) => row,
        _ => Row::new(),
    }
}

fn short_id(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

/// The state in one word, as filters have it.
fn state(status: &Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Starting => "starting",
        Status::Running(_) => "running",
        Status::Exited(_) => "exited",
    }
}

fn status_words(status: &Status, now: Timestamp) -> String {
    match status {
        Status::Created => "Created".to_owned(),
        Status::Starting => "Starting".to_owned(),
        Status::Running(running) => {
            format!("Up {}", format::age(now.duration_since(running.started_at)))
        }
        Status::Exited(exit) => {
            let age = format::age(now.duration_since(exit.finished_at));
            format!("Exited ({}) {age} ago", exit.code)
        }
    }
}

/// What a filter looks at.
#[derive(Debug)]
struct Known<'a> {
    container: &'a Container,
    status: &'a Status,
}

/// One `--filter`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Filter {
    Id(String),
    Name(String),
    Status(String),
    Exited(u8),
    Label(String, Option<String>),
}

impl Filter {
    fn read(key: &str, value: &str) -> Result<Self, Coded> {
        let value = value.to_owned();
        Ok(match key {
            "id" => Self::Id(value),
            "name" => Self::Name(value.trim_start_matches('/').to_owned()),
            "status" if ["created", "starting", "running", "exited"].contains(&&*value) => {
                Self::Status(value)
            }
            "status" => {
                return Err(Coded::hull(format!(
                    "invalid filter 'status={value}': expected created, starting, running or exited"
                )));
            }
            "exited" => Self::Exited(value.parse().map_err(|_| {
                Coded::hull(format!(
                    "invalid filter 'exited={value}': expected an exit code"
                ))
            })?),
            "label" => match value.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(value, None),
            },
            _ => return Err(Coded::hull(format!("invalid filter '{key}'"))),
        })
    }

    fn is_about_state(&self) -> bool {
        matches!(self, Self::Status(_) | Self::Exited(_))
    }

    fn lets(&self, known: &Known<'_>) -> bool {
        match self {
            Self::Id(id) => known.container.id().starts_with(id),
            Self::Name(part) => known.container.name().contains(part),
            Self::Status(word) => state(known.status) == word,
            Self::Exited(code) => {
                matches!(known.status, Status::Exited(exit) if exit.code == *code)
            }
            Self::Label(key, wanted) => {
                let value = known.container.plan().labels.get(key);
                value.is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
            }
        }
    }
}

/// `hull stop`.
pub(crate) fn stop(engine: &Engine, args: &StopArgs) -> anyhow::Result<u8> {
    let signal = args.signal.as_deref().map(parse_signal).transpose()?;
    let timeout = args
        .time
        .map(|seconds| Duration::from_secs(u64::from(seconds)));
    each(&args.containers.names, |name| {
        engine.find(name)?.stop(signal, timeout)?;
        Ok(Some(name.to_owned()))
    })
}

/// `hull kill`.
pub(crate) fn kill(engine: &Engine, args: &KillArgs) -> anyhow::Result<u8> {
    let signal = parse_signal(&args.signal)?;
    each(&args.containers.names, |name| {
        engine.find(name)?.signal(signal)?;
        Ok(Some(name.to_owned()))
    })
}

/// `hull rm`.
pub(crate) fn rm(engine: &Engine, args: &RmArgs) -> anyhow::Result<u8> {
    let code = each(&args.containers.names, |name| match engine.find(name) {
        // What is asked for is so already, which force takes for success.
        Err(EngineError::Store(error)) if error.is_missing() && args.force => {
            report_one(&error.into());
            Ok(None)
        }
        found => {
            found?.remove(args.force)?;
            Ok(Some(name.to_owned()))
        }
    });
    // What others left behind goes along; a sweep that fails is tried again.
    let _ = engine.sweep();
    code
}

/// `hull wait`.
pub(crate) fn wait(engine: &Engine, args: &NamesArgs) -> anyhow::Result<u8> {
    each(&args.names, |name| {
        Ok(Some(engine.find(name)?.wait()?.code.to_string()))
    })
}

/// Does something to each, prints what it says, and goes on when one fails.
pub(crate) fn each(
    names: &[String],
    act: impl Fn(&str) -> anyhow::Result<Option<String>>,
) -> anyhow::Result<u8> {
    let mut code = 0;
    for name in names {
        match act(name) {
            Ok(None) => {}
            Ok(Some(line)) => writeln!(stdout(), "{line}")?,
            Err(error) => {
                report_one(&error);
                code = 1;
            }
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use hull_sandbox::{ExitRecord, Phase, Running};

    use super::*;

    #[test]
    fn states_are_said_as_docker_says_them() {
        let now: Timestamp = "2026-01-01T00:10:00Z".parse().unwrap();
        let begin: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let running = Status::Running(Running {
            monitor_pid: 1,
            guest_pid: 1,
            started_at: begin,
            phase: Phase::Running,
            kernel: "6.12".into(),
        });
        let exited = Status::Exited(ExitRecord {
            code: 137,
            signal: Some(9),
            oom: true,
            started_at: Some(begin),
            finished_at: begin,
            error: None,
        });
        assert_eq!(status_words(&running, now), "Up 10 minutes");
        assert_eq!(status_words(&exited, now), "Exited (137) 10 minutes ago");
        assert_eq!(status_words(&Status::Created, now), "Created");
        assert_eq!(state(&exited), "exited");
    }

    #[test]
    fn filters_are_read_or_refused() {
        assert_eq!(
            Filter::read("name", "/x").ok(),
            Some(Filter::Name("x".into()))
        );
        assert_eq!(
            Filter::read("label", "a=b").ok(),
            Some(Filter::Label("a".into(), Some("b".into())))
        );
        for (key, value) in [("color", "red"), ("status", "sleepy"), ("exited", "x")] {
            assert!(Filter::read(key, value).is_err(), "{key}={value}");
        }
    }
}
