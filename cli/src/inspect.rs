//! `hull inspect`: everything known of containers, in the shape that Docker's has.

mod shape;

use std::io::{Write, stdout};

use hull_sandbox::{Engine, EngineError};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

use crate::args::InspectArgs;
use crate::failure::report_one;
use crate::format::Template;

/// Prints one array of all that were found, or a template's line for each.
pub(crate) fn inspect(engine: &Engine, args: &InspectArgs) -> anyhow::Result<u8> {
    let template = match args.format.as_deref() {
        None | Some("json") => None,
        Some(text) => Some(Template::parse(text)?),
    };
    let mut found = Vec::new();
    let mut code = 0;
    for name in &args.containers.names {
        match look(engine, name) {
            Ok(value) => found.push(value),
            Err(error) => {
                report_one(&error.into());
                code = 1;
            }
        }
    }
    let mut out = stdout().lock();
    match (template, args.format.is_some()) {
        (Some(template), _) => {
            for value in &found {
                writeln!(out, "{}", template.render(value)?)?;
            }
        }
        (None, true) => writeln!(out, "{}", Value::Array(found))?,
        (None, false) => out.write_all(&pretty(&Value::Array(found))?)?,
    }
    Ok(code)
}

fn look(engine: &Engine, name: &str) -> Result<Value, EngineError> {
    let container = engine.find(name)?;
    let known = container.inspect()?;
    let status = container.status()?;
    Ok(shape::describe(
        container.plan(),
        &status,
        &known["monitor"],
        &known["directory"],
    ))
}

/// JSON with four spaces a level, as Docker prints it.
fn pretty(value: &Value) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_indented_as_docker_does() {
        let text = pretty(&serde_json::json!([{"Id": "a"}])).unwrap();
        assert_eq!(text, b"[\n    {\n        \"Id\": \"a\"\n    }\n]\n");
        assert_eq!(pretty(&serde_json::json!([])).unwrap(), b"[]\n");
    }
}
