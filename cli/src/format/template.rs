//! The part of Go's templates that people use with `--format`: text, `{{.Field}}`,
//! `{{.Field.Below}}`, `{{json .Field}}`.

use serde_json::Value;

use super::Column;

/// A template that cannot be read or filled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TemplateError {
    /// An action other than a field or `json`.
    #[error(
        "template action {{{{{0}}}}} is not supported: only {{{{.Field}}}} and {{{{json .Field}}}} are"
    )]
    Unsupported(String),
    /// `{{` without `}}`.
    #[error("template has an action that doesn't end: {0}")]
    Open(String),
    /// A field that the object doesn't have.
    #[error("template field .{0} is not known here")]
    UnknownField(String),
}

/// A template that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Field(Vec<String>),
    Json(Vec<String>),
}

impl Template {
    /// A template of one field.
    pub(crate) fn field(name: &str) -> Self {
        Self(vec![Piece::Field(vec![name.to_owned()])])
    }

    /// Reads a template; `\t` and `\n` in its text are a tab and a newline.
    pub(crate) fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (action, after) = after
                .split_once("}}")
                .ok_or_else(|| TemplateError::Open(after.to_owned()))?;
            push_text(&mut pieces, before);
            pieces.push(read_action(action)?);
            rest = after;
        }
        push_text(&mut pieces, rest);
        Ok(Self(pieces))
    }

    /// Fills it with an object's fields.
    pub(crate) fn render(&self, value: &Value) -> Result<String, TemplateError> {
        let mut text = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(piece) => text.push_str(piece),
                Piece::Json(path) => text.push_str(&find(value, path)?.to_string()),
                Piece::Field(path) => match find(value, path)? {
                    Value::String(string) => text.push_str(string),
                    Value::Null => text.push_str("<no value>"),
                    other => text.push_str(&other.to_string()),
                },
            }
        }
        Ok(text)
    }

    /// The heading of a column that shows this: that of the field in `columns`, or its name.
    pub(super) fn heading(&self, columns: &[Column]) -> String {
        let name = |piece: &Piece| match piece {
            Piece::Text(_) => None,
            Piece::Field(path) | Piece::Json(path) => path.last().cloned(),
        };
        let Some(name) = self.0.iter().find_map(name) else {
            return String::new();
        };
        let known = columns.iter().find(|(_, field)| *field == name);
        known.map_or_else(|| name.to_uppercase(), |(heading, _)| (*heading).to_owned())
    }
}

fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    if !text.is_empty() {
        pieces.push(Piece::Text(text.replace("\\t", "\t").replace("\\n", "\n")));
    }
}

fn read_action(action: &str) -> Result<Piece, TemplateError> {
    let unsupported = || TemplateError::Unsupported(action.to_owned());
    let action_text = action.trim();
    let (json, path) = match action_text.strip_prefix("json ") {
        Some(path) => (true, path.trim()),
        None => (false, action_text),
    };
    let names = path.strip_prefix('.').ok_or_else(unsupported)?;
    let path: Vec<String> = match names {
        "" => Vec::new(),
        _ => names.split('.').map(str::to_owned).collect(),
    };
    let plain = |name: &String| {
        !name.is_empty()
            && name
                .chars()
                .all(|letter| letter.is_alphanumeric() || letter == '_')
    };
    if !path.iter().all(plain) {
        return Err(unsupported());
    }
    Ok(if json {
        Piece::Json(path)
    } else {
        Piece::Field(path)
    })
}

fn find<'a>(value: &'a Value, path: &[String]) -> Result<&'a Value, TemplateError> {
    path.iter().try_fold(value, |value, name| {
        value
            .get(name)
            .ok_or_else(|| TemplateError::UnknownField(path.join(".")))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn render(text: &str) -> Result<String, TemplateError> {
        let value = json!({"Id": "abc", "State": {"Pid": 7, "OOMKilled": false}, "Error": null});
        Template::parse(text)?.render(&value)
    }

    #[test]
    fn fields_are_filled_in() {
        for (template, text) in [
            ("{{.Id}}", "abc"),
            ("a {{ .Id }}\\t{{.State.Pid}} b", "a abc\t7 b"),
            ("{{.State.OOMKilled}}{{.Error}}", "false<no value>"),
            (
                "{{json .Id}}{{json .State}}",
                "\"abc\"{\"OOMKilled\":false,\"Pid\":7}",
            ),
            ("", ""),
        ] {
            assert_eq!(render(template).unwrap(), text, "{template}");
        }
    }

    #[test]
    fn what_cannot_be_filled_is_said() {
        assert_eq!(
            render("{{.State.Nope}}"),
            Err(TemplateError::UnknownField("State.Nope".into()))
        );
        for template in [
            "{{range .A}}{{end}}",
            "{{len .A}}",
            "{{if .A}}",
            "{{}}",
            "{{.A b}}",
        ] {
            let error = render(template).unwrap_err();
            assert!(matches!(error, TemplateError::Unsupported(_)), "{template}");
        }
        assert!(matches!(render("{{.Id"), Err(TemplateError::Open(_))));
    }

    proptest! {
        #[test]
        fn any_text_is_a_template_or_refused(text in "[{}. a-zA-Z\\\\]{0,40}") {
            let _ = render(&text);
        }
    }
}
