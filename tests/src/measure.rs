//! The words between `cargo xtask bench` and the program that measures in the KVM host.
//!
//! Owns: what is asked and what is found, as JSON. Refuses: to measure, and to judge.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What is to be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The directory of inputs, in memory, as `xtask` laid it out.
    pub place: PathBuf,
    /// Samples of each figure.
    pub runs: usize,
    /// Names of figures.
    pub figures: Vec<String>,
    /// Names of programs.
    pub programs: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Figure, program, one value a run.
    pub samples: BTreeMap<String, BTreeMap<String, Vec<f64>>>,
    /// What stands behind a figure, by title: names and values, largest or first ones first.
    pub details: BTreeMap<String, Vec<(String, f64)>>,
    /// What could not be measured.
    pub failures: Vec<Failure>,
}

/// What could not be measured of a program, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The program's name.
    pub program: String,
    /// What was tried, and what came of it.
    pub why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.program, self.why)
    }
}

impl Findings {
    /// Adds one value.
    pub fn add(&mut self, figure: &str, program: &str, value: f64) {
        let programs = self.samples.entry(figure.to_owned()).or_default();
        programs.entry(program.to_owned()).or_default().push(value);
    }

    /// Drops what was found of a program.
    pub fn forget(&mut self, program: &str) {
        for programs in self.samples.values_mut() {
            programs.remove(program);
        }
        self.failures.retain(|failure| failure.program != program);
    }

    /// Takes in what was found elsewhere of other figures or programs.
    pub fn join(&mut self, other: Self) {
        for (figure, programs) in other.samples {
            self.samples.entry(figure).or_default().extend(programs);
        }
        self.details.extend(other.details);
        self.failures.extend(other.failures);
    }

    /// Every program's median of every figure.
    #[must_use]
    pub fn medians(&self) -> BTreeMap<String, BTreeMap<String, f64>> {
        let of = |programs: &BTreeMap<String, Vec<f64>>| {
            let medians = programs.iter();
            medians
                .filter_map(|(name, values)| Some((name.clone(), median(values)?)))
                .collect()
        };
        let figures = self.samples.iter();
        figures
            .map(|(name, programs)| (name.clone(), of(programs)))
            .collect()
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(*upper);
    }
    let lower = sorted.get(middle.checked_sub(1)?)?;
    Some(f64::midpoint(*lower, *upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn findings_keep_figures_and_programs_apart() {
        let mut findings = Findings::default();
        findings.add("exits", "hull", 1.0);
        findings.add("exits", "hull", 3.0);
        findings.add("exits", "other", 7.0);
        findings.add("bytes", "hull", 8.0);
        let medians = findings.medians();
        assert_eq!(medians["exits"]["hull"], 2.0);
        assert_eq!(medians["exits"]["other"], 7.0);
        assert_eq!(medians["bytes"].len(), 1);
    }

    #[test]
    fn what_is_measured_again_takes_the_place_of_what_is_forgotten() {
        let failed = |program: &str| Failure {
            program: program.to_owned(),
            why: "it hangs".to_owned(),
        };
        let mut findings = Findings::default();
        findings.add("exits", "hull", 1.0);
        findings.add("exits", "other", 7.0);
        findings.failures = vec![failed("hull"), failed("other")];
        findings.forget("hull");
        assert_eq!(findings.failures, [failed("other")]);
        let mut again = Findings::default();
        again.add("exits", "hull", 3.0);
        findings.join(again);
        assert_eq!(findings.samples["exits"]["hull"], [3.0]);
        assert_eq!(findings.samples["exits"]["other"], [7.0]);
    }
}
