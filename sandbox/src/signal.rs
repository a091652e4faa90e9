//! Signals by name and number, as people and image configurations write them.

/// Lowest real-time signal that programs may use (glibc keeps 32 and 33 for itself; signal(7)).
const RTMIN: u8 = 34;
/// Highest signal of Linux on x86-64.
const RTMAX: u8 = 64;

/// Numbers of x86-64 Linux, signal(7).
const NAMES: [(&str, u8); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("IOT", 6),
    ("POLL", 29),
];

/// A signal that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid signal: {0}")]
pub struct SignalError(String);

/// Reads `SIGTERM`, `term`, `15`, `RTMIN+3`, `SIGRTMAX-1`.
///
/// # Errors
/// If there is no such signal.
pub fn parse_signal(text: &str) -> Result<u8, SignalError> {
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = if let Some(offset) = name.strip_prefix("RTMIN") {
        real_time(offset, '+').and_then(|offset| RTMIN.checked_add(offset))
    } else if let Some(offset) = name.strip_prefix("RTMAX") {
        real_time(offset, '-').and_then(|offset| RTMAX.checked_sub(offset))
    } else if let Ok(number) = upper.parse::<u8>() {
        return (1..=RTMAX)
            .contains(&number)
            .then_some(number)
            .ok_or_else(|| SignalError(text.to_owned()));
    } else {
        return NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|&(_, number)| number)
            .ok_or_else(|| SignalError(text.to_owned()));
    };
    number
        .filter(|number| (RTMIN..=RTMAX).contains(number))
        .ok_or_else(|| SignalError(text.to_owned()))
}

fn real_time(offset: &str, sign: char) -> Option<u8> {
    if offset.is_empty() {
        return Some(0);
    }
    let digits = offset.strip_prefix(sign)?;
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// The signal's name with `SIG`, or its number when it has none.
#[must_use]
pub fn signal_name(number: u8) -> String {
    match NAMES.iter().find(|&&(_, known)| known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if (RTMIN..=RTMAX).contains(&number) => format!("SIGRTMIN+{}", number - RTMIN),
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_signal() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("rtmin", 34),
            ("SIGIOT", 6),
        ] {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for text in [
            "", "0", "65", "SIG", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMIN++1", "-9",
        ] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_come_back() {
        assert_eq!(signal_name(15), "SIGTERM");
        assert_eq!(signal_name(37), "SIGRTMIN+3");
        for number in (1..=31).chain(34..=64) {
            assert_eq!(parse_signal(&signal_name(number)), Ok(number));
        }
    }
}
