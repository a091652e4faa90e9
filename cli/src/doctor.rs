//! `hull doctor`: the engine's findings about this host, for people or as JSON.

use std::io::{IsTerminal, Write, stdout};

use hull_sandbox::Engine;
use hull_sandbox::doctor::{Finding, Health, examine};
use serde_json::json;

use crate::args::DoctorArgs;

/// Prints what was found; 0 if containers can start here, else 1.
pub(crate) fn doctor(engine: &Engine, args: &DoctorArgs) -> anyhow::Result<u8> {
    let findings = examine(engine.settings());
    let broken = findings
        .iter()
        .any(|finding| finding.health == Health::Broken);
    let mut out = stdout().lock();
    if args.json {
        let report = json!({ "ready": !broken, "findings": findings });
        writeln!(out, "{report:#}")?;
    } else {
        out.write_all(describe(&findings, stdout().is_terminal()).as_bytes())?;
        match broken {
            true => writeln!(out, "\nContainers cannot start on this host.")?,
            false => writeln!(out, "\nContainers can start on this host.")?,
        }
    }
    Ok(u8::from(broken))
}

fn describe(findings: &[Finding], colored: bool) -> String {
    let widest = |finding: &Finding| finding.subject.chars().count();
    let width = findings.iter().map(widest).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, color) = match finding.health {
            Health::Good => ("ok", "32"),
            Health::Limited => ("warning", "33"),
            Health::Broken => ("problem", "31"),
        };
        let word = format!("{word:7}");
        let word = match colored {
            true => format!("\x1b[{color}m{word}\x1b[0m"),
            false => word,
        };
        text.push_str(&format!(
            "{word}  {:width$}  {}\n",
            finding.subject, finding.seen
        ));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("{:9}{:width$}  → {remedy}\n", "", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_and_a_remedy_another() {
        let finding = |subject: &str, health, remedy: Option<&str>| Finding {
            subject: subject.into(),
            health,
            seen: "seen".into(),
            remedy: remedy.map(str::to_owned),
        };
        let findings = [
            finding("kvm", Health::Broken, Some("load it")),
            finding("kernel", Health::Good, None),
        ];
        assert_eq!(
            describe(&findings, false),
            "problem  kvm     seen\n                 → load it\nok       kernel  seen\n"
        );
        assert!(describe(&findings, true).contains("\x1b[31mproblem\x1b[0m"));
    }
}
