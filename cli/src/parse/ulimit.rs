//! `--ulimit type=soft[:hard]`.

use hull_sandbox::Ulimit;

use super::Invalid;

/// The names of `--ulimit`, which are those of getrlimit(2) in small letters.
const NAMES: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Reads `nofile=1024:2048`; `-1` is unlimited, a single value is both limits.
pub(crate) fn ulimit(text: &str) -> Result<Ulimit, Invalid> {
    let (name, values) = text
        .split_once('=')
        .ok_or_else(|| Invalid::new("expected type=soft[:hard]"))?;
    if !NAMES.contains(&name) {
        return Err(Invalid::new(format!("invalid ulimit type: {name}")));
    }
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    if hard.contains(':') {
        return Err(Invalid::new("too many limits, expected soft[:hard]"));
    }
    let (soft, hard) = (limit(soft)?, limit(hard)?);
    if soft > hard {
        return Err(Invalid::new(format!(
            "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
        )));
    }
    Ok(Ulimit {
        name: name.to_owned(),
        soft,
        hard,
    })
}

fn limit(text: &str) -> Result<u64, Invalid> {
    if text == "-1" {
        return Ok(u64::MAX);
    }
    text.parse()
        .map_err(|_| Invalid::new(format!("invalid limit: '{text}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_is_both_limits() {
        let both = |soft, hard| Ulimit {
            name: "nofile".into(),
            soft,
            hard,
        };
        assert_eq!(ulimit("nofile=1024:2048"), Ok(both(1024, 2048)));
        assert_eq!(ulimit("nofile=1024"), Ok(both(1024, 1024)));
        assert_eq!(ulimit("nofile=-1"), Ok(both(u64::MAX, u64::MAX)));
        assert_eq!(ulimit("nofile=5:-1"), Ok(both(5, u64::MAX)));
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for text in [
            "",
            "nofile",
            "nofile=",
            "nofile=x",
            "nofile=1:2:3",
            "nofile=2:1",
            "pets=1",
            "nofile=-1:5",
            "nofile=-2",
        ] {
            assert!(ulimit(text).is_err(), "{text}");
        }
    }
}
