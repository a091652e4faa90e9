//! What the guest's kernel says of a container's processes (proc(5)).
//!
//! Owns: reading /proc, and the size of what is answered. Refuses: nothing; a process that has
//! gone meanwhile isn't listed.

use std::fs;
use std::os::unix::fs::MetadataExt;

use hull_proto::{ProcessInfo, ProcessPage};

/// Longest command line that is told, in bytes.
const MAX_COMMAND: usize = 4096;

/// A page's processes take this much as JSON at most, in bytes, so that it fits a control line.
const MAX_PAGE: usize = 48 * 1024;

/// `USER_HZ`: what times in /proc are counted in, on every x86-64 Linux.
const TICKS_PER_SECOND: u64 = 100;

/// Pages of the guest's memory, in bytes.
const PAGE: u64 = 4096;

/// Tells of those of these processes whose ids are above `after`, as far as a page goes.
pub(crate) fn page(mut pids: Vec<i32>, after: u32) -> ProcessPage {
    pids.sort_unstable();
    pids.dedup();
    let booted_s = boot_time();
    let mut page = ProcessPage::default();
    let mut room = MAX_PAGE;
    for pid in pids.into_iter().filter_map(|pid| u32::try_from(pid).ok()) {
        if pid <= after {
            continue;
        }
        let Some(process) = look_at(pid, booted_s) else {
            continue;
        };
        let size = serde_json::to_vec(&process).map_or(0, |json| json.len() + 1);
        if size > room {
            page.more = true;
            break;
        }
        room -= size;
        page.processes.push(process);
    }
    page
}

/// When the guest's kernel began, in seconds since the epoch.
fn boot_time() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let value = |line: &str| line.strip_prefix("btime ")?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

fn look_at(pid: u32, booted_s: u64) -> Option<ProcessInfo> {
    let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    // A process has named itself: any bytes.
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut process = parse(&String::from_utf8_lossy(&stat), booted_s)?;
    (process.pid, process.uid) = (pid, uid);
    if let Some(command) = command_line(&arguments) {
        process.command = command;
    }
    Some(process)
}

/// Reads a line of `/proc/PID/stat`: the name is in parentheses and may hold any of them.
fn parse(stat: &str, booted_s: u64) -> Option<ProcessInfo> {
    let (before, after) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    // By proc(5)'s numbers; the state, after the name, is its third.
    let number = |field: usize| -> Option<u64> { fields.get(field - 3)?.parse().ok() };
    Some(ProcessInfo {
        parent: u32::try_from(number(4)?).ok()?,
        terminal: fields
            .get(4)
            .and_then(|device| terminal(device.parse().ok()?)),
        started_at_s: booted_s + number(22)? / TICKS_PER_SECOND,
        cpu_ms: number(14)?.saturating_add(number(15)?).saturating_mul(1000) / TICKS_PER_SECOND,
        resident_bytes: number(24)?.saturating_mul(PAGE),
        command: format!("[{name}]"),
        ..ProcessInfo::default()
    })
}

/// The number of a pseudoterminal by its device number as /proc writes it.
fn terminal(device: i32) -> Option<u32> {
    /// Majors of the Unix98 pseudoterminals.
    const MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
    let device = u32::try_from(device).ok()?;
    let (major, minor) = (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & 0xf_ff00),
    );
    MAJORS
        .contains(&major)
        .then(|| (major - MAJORS.start()) * 256 + minor)
}

fn command_line(arguments: &[u8]) -> Option<String> {
    let arguments = arguments.get(..MAX_COMMAND.min(arguments.len()))?;
    let words: Vec<_> = arguments
        .split(|&byte| byte == 0)
        .map(String::from_utf8_lossy)
        .collect();
    let line = words.join(" ").trim_end().to_owned();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_any_name() {
        let rest = "S 7 1 1 34816 1 4194560 1 2 3 4 250 50 0 0 20 0 1 0 1200 8192 25 1 2";
        let process = parse(&format!("42 (a) (b) {rest}"), 1000).unwrap();
        assert_eq!((process.parent, process.terminal), (7, Some(0)));
        assert_eq!((process.cpu_ms, process.started_at_s), (3000, 1012));
        assert_eq!(process.resident_bytes, 25 * 4096);
        assert_eq!(process.command, "[a) (b]");
        for bad in ["", "42", "42 (a) S", "42 (a S 1 2"] {
            assert!(parse(bad, 0).is_none(), "{bad}");
        }
    }

    #[test]
    fn terminals_have_numbers() {
        assert_eq!(terminal(0), None);
        assert_eq!(terminal(34816), Some(0));
        assert_eq!(terminal(34816 + 300 % 256 + (1 << 20)), Some(44 + 256));
        assert_eq!(terminal(1025), None);
    }

    #[test]
    fn this_process_is_seen_as_it_was_called() {
        let own = i32::try_from(std::process::id()).unwrap();
        let page = page(vec![own, own, -1], 0);
        let [process] = page.processes.as_slice() else {
            panic!("{page:?}");
        };
        assert!(process.command.contains("hull_agent"), "{process:?}");
        assert!(process.resident_bytes > 0 && process.parent > 0 && !page.more);
    }

    #[test]
    fn command_lines_are_bounded_words() {
        assert_eq!(command_line(b"sh\0-c\0x y\0"), Some("sh -c x y".into()));
        assert_eq!(command_line(b""), None);
        assert_eq!(command_line(&[b'x'; 9000]).unwrap().len(), MAX_COMMAND);
    }
}
