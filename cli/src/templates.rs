//! `hull template`: the booted guests that starts are copied from.

use std::io::{Write, stdout};

use hull_sandbox::{Engine, TemplateInfo};
use jiff::Timestamp;
use serde_json::json;

use crate::args::{TemplateBuildArgs, TemplateCommand, TemplateLsArgs, TemplateRmArgs};
use crate::containers::each;
use crate::format::{self, Column, Layout, Row};

const COLUMNS: &[Column] = &[
    ("TEMPLATE ID", "ID"),
    ("CPUS", "CPUs"),
    ("MEMORY", "Memory"),
    ("CARDS", "Cards"),
    ("DISK", "Disk"),
    ("SIZE", "Size"),
    ("KERNEL", "Kernel"),
    ("USED", "UsedSince"),
    ("STATUS", "Status"),
];

/// Does what is asked of templates.
pub(crate) fn template(engine: &Engine, command: &TemplateCommand) -> anyhow::Result<u8> {
    match command {
        TemplateCommand::Ls(args) => list(engine, args),
        TemplateCommand::Build(args) => build(engine, args),
        TemplateCommand::Rm(args) => remove(engine, args),
    }
}

fn list(engine: &Engine, args: &TemplateLsArgs) -> anyhow::Result<u8> {
    let format = match args.quiet {
        true => Some("{{.ID}}"),
        false => args.format.as_deref(),
    };
    let layout = Layout::parse(format, COLUMNS)?;
    let now = Timestamp::now();
    let all = engine.templates().list()?;
    let rows = all.iter().map(|template| row(template, now)).collect();
    layout.write(rows, &mut stdout())?;
    Ok(0)
}

fn row(template: &TemplateInfo, now: Timestamp) -> Row {
    let used = format::age(now.duration_since(template.used_at));
    let disk = match template.scratch_bytes {
        0 => "none".to_owned(),
        bytes => format!("{}MiB", bytes >> 20),
    };
    let mut row = Row::new();
    for (field, value) in [
        ("ID", json!(template.name)),
        ("CPUs", json!(template.vcpus)),
        (
            "Memory",
            json!(format!("{}MiB", template.memory_bytes >> 20)),
        ),
        ("Cards", json!(template.cards)),
        ("Disk", json!(disk)),
        ("Size", json!(format::size(template.size_bytes))),
        ("Kernel", json!(template.kernel)),
        ("CreatedAt", json!(template.created_at.to_string())),
        ("UsedAt", json!(template.used_at.to_string())),
        ("UsedSince", json!(format!("{used} ago"))),
        (
            "Status",
            json!(template.stale.as_deref().unwrap_or("usable")),
        ),
    ] {
        row.insert(field.to_owned(), value);
    }
    row
}

fn build(engine: &Engine, args: &TemplateBuildArgs) -> anyhow::Result<u8> {
    let name = engine.build_template(args.cpus, args.memory.filter(|&bytes| bytes > 0))?;
    writeln!(stdout(), "{name}")?;
    Ok(0)
}

fn remove(engine: &Engine, args: &TemplateRmArgs) -> anyhow::Result<u8> {
    let templates = engine.templates();
    let mut names = args.names.clone();
    if args.all {
        names.extend(templates.list()?.into_iter().map(|template| template.name));
    }
    each(&names, |name| {
        templates.remove(name)?;
        Ok(Some(name.to_owned()))
    })
}
