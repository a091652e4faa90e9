//! The table of `run` cases, on Hull and on crun as its control.

use hull_tests::adapters::{CrunAdapter, HullAdapter};
use hull_tests::cases::{self, run_all};
use hull_tests::hull::Hull;

/// A test on each engine for every subject of the table.
macro_rules! subjects {
    ($($subject:ident)*) => {
        mod on_hull {
            use super::*;
            $(
                #[test]
                fn $subject() {
                    let Some(hull) = Hull::new() else { return };
                    run_all(stringify!($subject), &HullAdapter::new(&hull));
                }
            )*
        }

        mod on_crun {
            use super::*;
            $(
                #[test]
                fn $subject() {
                    // The control runs where Hull does, so that both see the same host.
                    let Some(_host) = Hull::new() else { return };
                    run_all(stringify!($subject), &CrunAdapter::new());
                }
            )*
        }

        const SUBJECTS: &[&str] = &[$(stringify!($subject)),*];
    };
}

subjects! {
    process environment identity streams terminal signals rights limits mounts files devices config
}

#[test]
fn every_subject_is_tested_and_every_case_has_its_own_name() {
    let table = cases::all();
    let subjects: Vec<&str> = table.iter().map(|(subject, _)| *subject).collect();
    assert_eq!(subjects, SUBJECTS);
    let mut names: Vec<&str> = table
        .iter()
        .flat_map(|(_, cases)| cases)
        .map(|case| case.name)
        .collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(count >= 40, "{count} cases");
}
