//! How things look to a person: tables, sizes, ages, templates.
//!
//! Owns: alignment, Docker's wording of sizes and ages, `--format`. Refuses: knowing what the
//! rows are about.

mod human;
mod template;

use std::io::{self, Write};

use serde_json::{Map, Value};

pub(crate) use human::{age, size};
pub(crate) use template::{Template, TemplateError};

/// Spaces between columns, as Docker has them.
const GAP: usize = 3;

/// A column of a listing: its heading and the field it shows.
pub(crate) type Column = (&'static str, &'static str);

/// One row: fields by the names that templates use.
pub(crate) type Row = Map<String, Value>;

/// How a listing is to be shown.
#[derive(Debug)]
pub(crate) enum Layout {
    /// Columns with headings.
    Table(Vec<(String, Template)>),
    /// One JSON object a line.
    Json,
    /// One line per row.
    Lines(Template),
}

impl Layout {
    /// Reads `--format`: nothing or `table` for `columns`, `table TEMPLATE`, `json`, `TEMPLATE`.
    pub(crate) fn parse(format: Option<&str>, columns: &[Column]) -> Result<Self, TemplateError> {
        match format.map(str::trim) {
            None | Some("" | "table") => {
                let column =
                    |&(heading, field): &Column| (heading.to_owned(), Template::field(field));
                Ok(Self::Table(columns.iter().map(column).collect()))
            }
            Some("json") => Ok(Self::Json),
            Some(text) => match text.strip_prefix("table ") {
                None => Ok(Self::Lines(Template::parse(text)?)),
                Some(text) => {
                    let text = text.trim().replace("\\t", "\t");
                    let column = |piece: &str| {
                        let template = Template::parse(piece)?;
                        Ok((template.heading(columns), template))
                    };
                    Ok(Self::Table(
                        text.split('\t').map(column).collect::<Result<_, _>>()?,
                    ))
                }
            },
        }
    }

    /// Writes the rows.
    pub(crate) fn write(&self, rows: Vec<Row>, out: &mut impl Write) -> Result<(), WriteError> {
        let rows = rows.into_iter().map(Value::Object);
        match self {
            Self::Table(columns) => {
                let mut lines = vec![columns.iter().map(|(heading, _)| heading.clone()).collect()];
                for row in rows {
                    let cell = |(_, template): &(String, Template)| template.render(&row);
                    lines.push(columns.iter().map(cell).collect::<Result<Vec<_>, _>>()?);
                }
                write_table(&lines, out)?;
            }
            Self::Json => {
                for row in rows {
                    writeln!(out, "{row}")?;
                }
            }
            Self::Lines(template) => {
                for row in rows {
                    writeln!(out, "{}", template.render(&row)?)?;
                }
            }
        }
        Ok(())
    }
}

/// A listing that could not be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The template asks for what isn't there.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The output failed.
    #[error("cannot write the output")]
    Io(#[from] io::Error),
}

/// Writes lines of cells, each column as wide as its widest cell; the last isn't padded.
pub(crate) fn write_table(lines: &[Vec<String>], out: &mut impl Write) -> io::Result<()> {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let padding = width + GAP - cell.chars().count();
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', padding));
        }
        writeln!(out, "{}", text.trim_end())?;
    }
    Ok(())
}

/// At most `most` characters, with `…` as the last where something was cut.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(most.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// A text from elsewhere in a line of its own: control characters, which could drive the
/// reader's terminal, are shown as escapes.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: [Column; 2] = [("CONTAINER ID", "ID"), ("NAMES", "Names")];

    fn shown(format: Option<&str>) -> String {
        let row = |id: &str, name: &str| {
            let Value::Object(row) = json!({"ID": id, "Names": name}) else {
                panic!()
            };
            row
        };
        let rows = vec![row("0123456789ab", "a"), row("b", "größer")];
        let mut out = Vec::new();
        Layout::parse(format, &COLUMNS)
            .unwrap()
            .write(rows, &mut out)
            .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        assert_eq!(
            shown(None),
            "CONTAINER ID   NAMES\n0123456789ab   a\nb              größer\n"
        );
        assert_eq!(shown(Some("table")), shown(None));
    }

    #[test]
    fn a_table_of_chosen_fields_has_their_headings() {
        assert_eq!(
            shown(Some("table {{.Names}}\\t{{.ID}}")),
            "NAMES    CONTAINER ID\na        0123456789ab\ngrößer   b\n"
        );
    }

    #[test]
    fn json_and_templates_are_one_line_each() {
        assert_eq!(
            shown(Some("{{.ID}}={{.Names}}")),
            "0123456789ab=a\nb=größer\n"
        );
        let lines = shown(Some("json"));
        let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!(first, json!({"ID": "0123456789ab", "Names": "a"}));
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        let layout = Layout::parse(Some("{{.Nope}}"), &COLUMNS).unwrap();
        assert!(layout.write(vec![Row::new()], &mut Vec::new()).is_err());
    }

    #[test]
    fn long_and_hostile_texts_are_tamed() {
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("abcd", 4), "abcd");
        assert_eq!(printable("a\x1b[2Jb\nü"), "a\\u{1b}[2Jb\\nü");
    }
}
