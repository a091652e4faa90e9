//! `-e NAME[=VALUE]` and `--env-file FILE`.

use super::Invalid;

/// A variable for the command; without a value it is taken away from what the image sets.
pub(crate) type Variable = (String, Option<String>);

/// Reads `NAME=VALUE`, or `NAME` alone, which takes the value from `outer` if it is set there.
pub(crate) fn variable(
    text: &str,
    outer: impl Fn(&str) -> Option<String>,
) -> Result<Variable, Invalid> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, outer(text)),
    };
    if name.is_empty() {
        return Err(Invalid::new(format!(
            "invalid environment variable: {text}"
        )));
    }
    Ok((name.to_owned(), value))
}

/// Reads a file of variables: one `NAME=VALUE` a line, the value as it stands; a name alone is
/// taken from `outer` or left out; blank lines and lines that begin with `#` are skipped.
pub(crate) fn env_file(
    contents: &str,
    outer: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Variable>, Invalid> {
    let contents = contents.strip_prefix('\u{feff}').unwrap_or(contents);
    let mut variables = Vec::new();
    for (index, line) in contents.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = index + 1;
        let name = line.split_once('=').map_or(line, |(name, _)| name);
        if name.is_empty() {
            return Err(Invalid::new(format!(
                "line {at}: no variable name on line '{line}'"
            )));
        }
        if name.contains(char::is_whitespace) {
            return Err(Invalid::new(format!(
                "line {at}: variable '{name}' contains whitespaces"
            )));
        }
        if line.contains('\0') {
            return Err(Invalid::new(format!(
                "line {at}: variable '{name}' contains a zero byte"
            )));
        }
        let (name, value) = variable(line, &outer)?;
        if value.is_some() {
            variables.push((name, value));
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn outer(name: &str) -> Option<String> {
        (name == "HOME").then(|| "/root".to_owned())
    }

    fn set(name: &str, value: &str) -> Variable {
        (name.to_owned(), Some(value.to_owned()))
    }

    #[test]
    fn a_bare_name_passes_the_outer_value_or_removes() {
        assert_eq!(variable("A=b=c", outer), Ok(set("A", "b=c")));
        assert_eq!(variable("A=", outer), Ok(set("A", "")));
        assert_eq!(variable("HOME", outer), Ok(set("HOME", "/root")));
        assert_eq!(variable("NOPE", outer), Ok(("NOPE".to_owned(), None)));
        assert!(variable("=x", outer).is_err());
        assert!(variable("", outer).is_err());
    }

    #[test]
    fn a_file_has_comments_blanks_and_bare_names() {
        let text = "\u{feff}# c\n\n  A=1 \r\nB= two = 2\nHOME\nNOPE\nQ=\"x\"\n#=z\n";
        assert_eq!(
            env_file(text, outer).unwrap(),
            [
                set("A", "1 "),
                set("B", " two = 2"),
                set("HOME", "/root"),
                set("Q", "\"x\"")
            ]
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = env_file("A=1\nB C=2\n", outer).unwrap_err();
        assert_eq!(
            error.to_string(),
            "line 2: variable 'B C' contains whitespaces"
        );
        assert!(env_file("=x", outer).is_err());
        assert!(env_file("A=\0", outer).is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_written_comes_back(
            pairs in proptest::collection::vec(("[A-Za-z_][A-Za-z0-9_.]{0,8}", "[^\r\n\0]{0,20}"), 0..8),
        ) {
            let text: String = pairs.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
            let expected: Vec<_> = pairs.iter().map(|(name, value)| set(name, value)).collect();
            prop_assert_eq!(env_file(&text, outer).unwrap(), expected);
        }

        #[test]
        fn any_file_is_read_or_refused(text in "(?s).{0,200}") {
            if let Ok(variables) = env_file(&text, outer) {
                for (name, _) in variables {
                    prop_assert!(!name.is_empty() && !name.contains(['=', ' ', '\n']));
                }
            }
        }
    }
}
