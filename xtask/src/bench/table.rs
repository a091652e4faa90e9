//! What was found, for a person: figures by programs, beside what was aimed at.
//!
//! Owns: the targets and the layout. Refuses: to fail on a target.

use std::collections::BTreeMap;
use std::fmt::Write;

use hull_tests::measure::Findings;

/// Figure, program, median.
pub(super) type Medians = BTreeMap<String, BTreeMap<String, f64>>;

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// At most this.
    Most(f64),
    /// At most this share of another program's other figure.
    Share(f64, &'static str, &'static str),
    /// At most so much above another program's other figure.
    Above(f64, &'static str, &'static str),
    /// Nothing.
    None,
}

/// The one figure that takes an image with a large file.
pub(super) const LAYER_COPIES: &str = "layer_copies_at_20";

/// The one figure that takes a hundred guests.
pub(super) const CROWD_BYTES: &str = "sandbox_private_bytes_at_100";

/// Every figure, in the table's order, with what Hull's is held against.
const FIGURES: [(&str, Target); 21] = [
    ("cold_first_user_instructions", Target::None),
    (
        "cold_ready_instructions",
        Target::Share(0.35, "qemu-microvm", "cold_first_user_instructions"),
    ),
    ("first_output_instructions", Target::None),
    ("cold_run_true_instructions", Target::None),
    ("cold_run_true_exits", Target::None),
    ("run_true_instructions", Target::Most(20e6)),
    ("run_true_whole_instructions", Target::None),
    ("run_true_exits", Target::Most(250.0)),
    ("run_true_faults", Target::Most(600.0)),
    ("run_true_pages_copied", Target::Most(200.0)),
    ("restore_instructions", Target::Most(4e6)),
    ("exec_true_instructions", Target::Most(12e6)),
    ("monitor_private_bytes", Target::Most(5.0 * 1024.0 * 1024.0)),
    ("monitor_dirty_bytes", Target::None),
    ("guest_touched_bytes", Target::None),
    ("idle_exits_per_second", Target::Most(2.0)),
    ("fs_second_pass_requests", Target::Most(0.0)),
    (LAYER_COPIES, Target::Most(1.05)),
    (CROWD_BYTES, Target::Most(6.0 * 1024.0 * 1024.0)),
    (
        "ctr_run_true_instructions",
        Target::Share(1.0, "runc", "ctr_run_true_instructions"),
    ),
    (
        "ctr_private_bytes",
        Target::Above(6.0 * 1024.0 * 1024.0, "runc", "ctr_private_bytes"),
    ),
];

/// Every program, in the table's order.
const PROGRAMS: [&str; 4] = ["hull", "qemu-microvm", "crun", "runc"];

/// Names of all figures.
pub(super) fn figures() -> Vec<String> {
    FIGURES.iter().map(|(name, _)| (*name).to_owned()).collect()
}

/// Names of all programs.
pub(super) fn programs() -> Vec<String> {
    PROGRAMS.map(str::to_owned).to_vec()
}

/// The whole report as text.
pub(super) fn render(findings: &Findings) -> String {
    let medians = findings.medians();
    let mut rows = vec![header()];
    for (figure, target) in FIGURES {
        if let Some(values) = medians.get(figure) {
            rows.push(row(figure, values, target, &medians));
        }
    }
    let mut text = columns(&rows);
    for (title, details) in &findings.details {
        let _ = write!(text, "\n{title}\n");
        let lines = details
            .iter()
            .map(|(name, value)| vec![format!("  {name}"), number(*value)]);
        text.push_str(&columns(&lines.collect::<Vec<_>>()));
    }
    for failure in &findings.failures {
        let _ = write!(text, "\nnot measured: {failure}\n");
    }
    text
}

fn header() -> Vec<String> {
    let mut cells = vec!["figure".to_owned()];
    cells.extend(PROGRAMS.map(str::to_owned));
    cells.extend(["target".to_owned(), "met".to_owned()]);
    cells
}

fn row(
    figure: &str,
    values: &BTreeMap<String, f64>,
    target: Target,
    medians: &Medians,
) -> Vec<String> {
    let mut cells = vec![figure.to_owned()];
    for program in PROGRAMS {
        cells.push(values.get(program).map_or("–".to_owned(), |v| number(*v)));
    }
    let most = limit(target, medians);
    cells.push(most.map_or("–".to_owned(), |most| format!("≤ {}", number(most))));
    let met = match (most, values.get("hull")) {
        (Some(most), Some(value)) if *value <= most => "yes",
        (Some(_), Some(_)) => "no",
        _ => "–",
    };
    cells.push(met.to_owned());
    cells
}

fn limit(target: Target, medians: &Medians) -> Option<f64> {
    match target {
        Target::Most(most) => Some(most),
        Target::Share(share, program, figure) => Some(medians.get(figure)?.get(program)? * share),
        Target::Above(more, program, figure) => Some(medians.get(figure)?.get(program)? + more),
        Target::None => None,
    }
}

/// Digits in threes; a decimal only for small numbers.
fn number(value: f64) -> String {
    if value.fract() != 0.0 && value.abs() < 1000.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The first column flush left, the others flush right.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if index == 0 {
                write!(text, "{cell:<width$}")
            } else {
                write!(text, "  {cell:>width$}")
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use hull_tests::measure::Failure;

    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(0.456), "0.46");
        assert_eq!(number(999.0), "999");
        assert_eq!(number(1_234_567.5), "1,234,568");
    }

    #[test]
    fn a_target_may_hang_on_another_program() {
        let mut findings = Findings::default();
        findings.add("cold_first_user_instructions", "qemu-microvm", 100.0);
        findings.add("cold_ready_instructions", "hull", 36.0);
        let seen = render(&findings);
        let line = seen.lines().find(|line| line.starts_with("cold_ready"));
        let line = line.unwrap();
        assert!(line.contains("≤ 35"), "{line}");
        assert!(line.trim_end().ends_with("no"), "{line}");
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let mut findings = Findings::default();
        findings.failures.push(Failure {
            program: "runc".to_owned(),
            why: "cannot start".to_owned(),
        });
        assert!(render(&findings).contains("not measured: runc: cannot start"));
    }
}
