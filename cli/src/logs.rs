//! `hull logs`: what a container wrote, or what its machine's console did.

use std::collections::VecDeque;
use std::io::{self, Write, stderr, stdout};

use hull_sandbox::{Container, Engine, LogEntry, LogOptions};
use jiff::Timestamp;

use crate::args::{LogsArgs, Tail};

/// Prints a container's output to the streams where it was written.
pub(crate) fn logs(engine: &Engine, args: &LogsArgs) -> anyhow::Result<u8> {
    let container = engine.find(&args.name)?;
    if args.boot {
        let console = container.boot_log()?;
        stdout().write_all(last_lines(&console, args.tail))?;
        return Ok(0);
    }
    let mut printer = Printer {
        timestamps: args.timestamps,
        stdout: stdout().lock(),
        stderr: stderr().lock(),
        begun: [true; 2],
    };
    match args.since {
        Some(since) => print_since(&container, args, since, &mut printer)?,
        None => {
            let options = LogOptions {
                follow: args.follow,
                tail: args.tail.0,
            };
            for entry in container.logs(&options)? {
                printer.print(&entry?)?;
            }
        }
    }
    Ok(0)
}

/// The lines of the tail are counted among those that are new enough.
fn print_since(
    container: &Container,
    args: &LogsArgs,
    since: Timestamp,
    printer: &mut Printer<impl Write, impl Write>,
) -> anyhow::Result<()> {
    let mut last: VecDeque<LogEntry> = VecDeque::new();
    if let Some(count) = args.tail.0 {
        for entry in container.logs(&LogOptions::default())? {
            let entry = entry?;
            if entry.time >= since {
                last.push_back(entry);
            }
            if last.len() > count {
                last.pop_front();
            }
        }
        for entry in &last {
            printer.print(entry)?;
        }
        if !args.follow {
            return Ok(());
        }
    }
    let options = LogOptions {
        follow: args.follow,
        tail: args.tail.0.map(|_| 0),
    };
    for entry in container.logs(&options)? {
        let entry = entry?;
        if entry.time >= since {
            printer.print(&entry)?;
        }
    }
    Ok(())
}

struct Printer<O, E> {
    timestamps: bool,
    stdout: O,
    stderr: E,
    /// Whether each stream is at the beginning of a line.
    begun: [bool; 2],
}

impl<O: Write, E: Write> Printer<O, E> {
    fn print(&mut self, entry: &LogEntry) -> io::Result<()> {
        let at_line_start = &mut self.begun[usize::from(entry.stderr)];
        let out: &mut dyn Write = match entry.stderr {
            true => &mut self.stderr,
            false => &mut self.stdout,
        };
        if self.timestamps && *at_line_start {
            write!(out, "{:.9} ", entry.time)?;
        }
        *at_line_start = entry.log.ends_with(b"\n");
        out.write_all(&entry.log)?;
        out.flush()
    }
}

fn last_lines(text: &[u8], tail: Tail) -> &[u8] {
    let Some(count) = tail.0 else {
        return text;
    };
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    match count {
        0 => &[],
        _ => breaks
            .map(|(at, _)| at + 1)
            .nth(count - 1)
            .map_or(text, |start| &text[start..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        let text = b"a\nb\nc\n";
        for (count, expected) in [
            (0, ""),
            (1, "c\n"),
            (2, "b\nc\n"),
            (3, "a\nb\nc\n"),
            (9, "a\nb\nc\n"),
        ] {
            assert_eq!(
                last_lines(text, Tail(Some(count))),
                expected.as_bytes(),
                "{count}"
            );
        }
        assert_eq!(last_lines(text, Tail(None)), text);
        assert_eq!(last_lines(b"a\nb", Tail(Some(1))), b"b");
    }

    #[test]
    fn streams_stay_apart_and_lines_are_stamped_once() {
        let entry = |log: &str, stderr| LogEntry {
            log: log.as_bytes().to_vec(),
            stderr,
            time: "2026-01-01T00:00:00Z".parse().unwrap(),
        };
        let mut printer = Printer {
            timestamps: true,
            stdout: Vec::new(),
            stderr: Vec::new(),
            begun: [true; 2],
        };
        for entry in [
            entry("a", false),
            entry("e\n", true),
            entry("b\n", false),
            entry("c\n", false),
        ] {
            printer.print(&entry).unwrap();
        }
        let stamp = "2026-01-01T00:00:00.000000000Z";
        assert_eq!(
            String::from_utf8(printer.stdout).unwrap(),
            format!("{stamp} ab\n{stamp} c\n")
        );
        assert_eq!(
            String::from_utf8(printer.stderr).unwrap(),
            format!("{stamp} e\n")
        );
    }
}
