//! Numbers with units: memory, processors, durations, moments.

use jiff::{SignedDuration, Timestamp};

use super::Invalid;

/// Reads bytes with Docker's suffixes: `b`, `k`, `m`, `g`, `t`, `p`, each also as `kb` or `kib`,
/// in either case, all of them powers of 1024.
pub(crate) fn memory(text: &str) -> Result<u64, Invalid> {
    let unit_at = text
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(Invalid::new(format!("invalid suffix: '{unit}'"))),
    };
    let wrong = || Invalid::new(format!("invalid size: '{text}'"));
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let size = number.parse::<f64>().map_err(|_| wrong())? * f64::from(1_u32 << (shift % 30));
    let size = if shift >= 30 {
        size * f64::from(1_u32 << 30)
    } else {
        size
    };
    if !size.is_finite() || size >= 9.2e18 {
        return Err(wrong());
    }
    // In range by the check above; a fraction of a byte is cut off as Docker does.
    Ok(size as u64)
}

/// Reads a number of processors: more than 0, at most nine digits after the point.
pub(crate) fn cpus(text: &str) -> Result<f64, Invalid> {
    let plain = !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.');
    let count = text.parse::<f64>().ok().filter(|_| plain);
    let count = count.ok_or_else(|| Invalid::new(format!("'{text}' is not a number of CPUs")))?;
    if text
        .split_once('.')
        .is_some_and(|(_, digits)| digits.len() > 9)
    {
        return Err(Invalid::new("value is too precise"));
    }
    if count <= 0.0 || !count.is_finite() {
        return Err(Invalid::new("expected more than 0 CPUs"));
    }
    Ok(count)
}

/// Reads a number of whole seconds.
pub(crate) fn whole_seconds(text: &str) -> Result<u32, Invalid> {
    text.parse()
        .map_err(|_| Invalid::new("expected a number of whole seconds"))
}

/// Reads a point in time: an RFC 3339 timestamp, seconds since the epoch, or a duration before
/// `now` (`10m`, `1h30m`, `2.5s`).
pub(crate) fn moment(text: &str, now: Timestamp) -> Result<Timestamp, Invalid> {
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    let wrong = || {
        Invalid::new("expected a duration (10m), a timestamp (RFC 3339) or seconds since the epoch")
    };
    if let Ok(seconds) = text.parse::<f64>() {
        let since = SignedDuration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
        return Timestamp::from_duration(since).map_err(|_| wrong());
    }
    now.checked_sub(duration(text).ok_or_else(wrong)?)
        .map_err(|_| wrong())
}

/// Go's durations: one or more of `<number><unit>`.
fn duration(text: &str) -> Option<SignedDuration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, tail) = rest.split_at(unit_at);
        let unit_end = tail
            .find(|letter: char| letter.is_ascii_digit() || letter == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        seconds += number.parse::<f64>().ok()?
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = tail;
    }
    (!text.is_empty())
        .then(|| SignedDuration::try_from_secs_f64(seconds).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_has_dockers_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("32", 32),
            ("32b", 32),
            ("32B", 32),
            ("32k", 32 << 10),
            ("32K", 32 << 10),
            ("32kb", 32 << 10),
            ("32Kib", 32 << 10),
            ("512m", 512 << 20),
            ("512 MB", 512 << 20),
            ("1.5g", 3 << 29),
            ("2t", 2 << 40),
            ("1p", 1 << 50),
        ] {
            assert_eq!(memory(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        for text in [
            "", "m", "-1", "12x", "1mm", "1kbb", "1  m", "1.2.3m", "99999p", "hello", "1bb",
        ] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_are_positive_decimals() {
        assert_eq!(cpus("2"), Ok(2.0));
        assert_eq!(cpus(".5"), Ok(0.5));
        for text in ["", "0", "-1", "1e3", "inf", "NaN", "two", "0.1234567891"] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_are_stamps_epochs_or_ages() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        for (text, expected) in [
            ("1h30m", "2026-01-02T01:34:05Z"),
            ("2.5s", "2026-01-02T03:04:02.5Z"),
            ("2025-12-31T00:00:00Z", "2025-12-31T00:00:00Z"),
            ("1700000000", "2023-11-14T22:13:20Z"),
        ] {
            assert_eq!(moment(text, now), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in ["", "h", "1", "1x", "soon", "5m3"] {
            assert_eq!(moment(text, now).is_ok(), text == "1", "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,24}") {
            let _ = (memory(&text), cpus(&text), moment(&text, Timestamp::UNIX_EPOCH));
        }

        #[test]
        fn whole_sizes_are_exact(number in 0_u64..(1 << 13), unit in 0_usize..6) {
            let text = format!("{number}{}", ["b", "k", "m", "g", "t", "p"][unit]);
            prop_assert_eq!(memory(&text), Ok(number << (10 * unit)));
        }
    }
}
