//! A guest's processes in the columns of `ps -ef`, as engines show those of a container.

use hull_proto::ProcessInfo;
use jiff::{SignedDuration, Timestamp};

/// The columns' headings.
pub const PS_HEADINGS: [&str; 8] = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"];

/// The columns of one process at this moment, times in UTC. What it says of itself is shown
/// without what could drive a terminal.
#[must_use]
pub fn ps_row(process: &ProcessInfo, now: Timestamp) -> [String; 8] {
    let began_s = i64::try_from(process.started_at_s).unwrap_or(i64::MAX);
    let began = Timestamp::from_second(began_s).unwrap_or(now);
    let age = now.duration_since(began);
    let today = age < SignedDuration::from_hours(24);
    let seconds = process.cpu_ms / 1000;
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(0).max(1);
    [
        match process.uid {
            0 => "root".to_owned(),
            uid => uid.to_string(),
        },
        process.pid.to_string(),
        process.parent.to_string(),
        (process.cpu_ms.saturating_mul(100) / age_ms)
            .min(99)
            .to_string(),
        began
            .strftime(if today { "%H:%M" } else { "%b%d" })
            .to_string(),
        process
            .terminal
            .map_or_else(|| "?".to_owned(), |number| format!("pts/{number}")),
        format!(
            "{:02}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        ),
        process
            .command
            .chars()
            .map(|letter| if letter.is_control() { '?' } else { letter })
            .collect(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_shown_as_ps_shows_it() {
        let process = ProcessInfo {
            pid: 42,
            parent: 7,
            uid: 1000,
            terminal: Some(3),
            started_at_s: 3600,
            cpu_ms: 3_723_000,
            resident_bytes: 1,
            command: "sh -c \u{1b}[2J".to_owned(),
        };
        let now = |seconds| Timestamp::from_second(seconds).unwrap();
        let row = ps_row(&process, now(2 * 3600));
        let shown = [
            "1000",
            "42",
            "7",
            "99",
            "01:00",
            "pts/3",
            "01:02:03",
            "sh -c ?[2J",
        ];
        assert_eq!(row, shown);
        assert_eq!(ps_row(&process, now(90_000 + 3600))[4], "Jan01");
        // A guest's clock may be anywhere.
        let future = ProcessInfo {
            started_at_s: u64::MAX,
            ..ProcessInfo::default()
        };
        assert_eq!(
            ps_row(&future, now(5))[..2],
            ["root".to_owned(), "0".to_owned()]
        );
    }
}
