//! `--detach-keys`: the bytes that end an attachment.

use super::Invalid;

/// Reads `ctrl-p,ctrl-q`: a list of characters and `ctrl-<value>`, with `a-z`, `@`, `[`, `\`,
/// `]`, `^`, `_`. An empty text means that no keys detach.
pub(crate) fn detach_keys(text: &str) -> Result<Vec<u8>, Invalid> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(',').map(key).collect()
}

fn key(text: &str) -> Result<u8, Invalid> {
    let unknown = || Invalid::new(format!("unknown key: '{text}'"));
    if let [byte] = text.as_bytes() {
        return byte.is_ascii().then_some(*byte).ok_or_else(unknown);
    }
    let control = text.to_ascii_lowercase();
    match control.strip_prefix("ctrl-").map(str::as_bytes) {
        Some([letter @ b'a'..=b'z']) => Ok(letter - b'a' + 1),
        Some(b"@") => Ok(0),
        Some([sign @ b'['..=b'_']) => Ok(sign - b'@'),
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_characters_or_controls() {
        for (text, bytes) in [
            ("ctrl-p,ctrl-q", &[16, 17][..]),
            ("ctrl-A,x", &[1, b'x']),
            (
                "ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_",
                &[0, 27, 28, 29, 30, 31],
            ),
            ("", &[]),
        ] {
            assert_eq!(detach_keys(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn other_keys_are_refused() {
        for text in ["ctrl-", "ctrl-1", "ctrl-pp", "shift-a", ",", "ä", "ctrl-p,"] {
            assert!(detach_keys(text).is_err(), "{text}");
        }
    }
}
