//! Signals to the engine's command are the container's.

use rustix::process::Signal;

use super::{Act, Case, sh};

/// Tells which of several signals came, each with an exit code of its own.
const CATCHER: &str = "for s in HUP:2 INT:3 TERM:4 USR1:5 USR2:6; do
     trap \"echo caught ${s%:*}; exit ${s#*:}\" ${s%:*}; done
     echo ready; sleep 1000 & wait";

pub(super) fn cases() -> Vec<Case> {
    let caught = |name, signal, code, word: &str| {
        sh(name, CATCHER)
            .step("ready\n", Act::Signal(signal))
            .ends(code)
            .prints(format!("ready\ncaught {word}\n"))
    };
    vec![
        caught("term_is_passed_on", Signal::TERM, 4, "TERM"),
        caught("int_is_passed_on", Signal::INT, 3, "INT"),
        caught("hup_is_passed_on", Signal::HUP, 2, "HUP"),
        caught("usr1_is_passed_on", Signal::USR1, 5, "USR1"),
        sh(
            "a_signal_does_not_end_who_handles_it",
            "trap 'echo once' USR2; trap 'echo twice; exit 8' TERM
             echo ready; sleep 1000 & while :; do wait; done",
        )
        .step("ready\n", Act::Signal(Signal::USR2))
        .step("once\n", Act::Signal(Signal::TERM))
        .ends(8)
        .prints("ready\nonce\ntwice\n"),
        sh("an_init_passes_signals_on", CATCHER)
            .only_hull("crun has no init of its own")
            .with(|setup| setup.init = true)
            .step("ready\n", Act::Signal(Signal::TERM))
            .ends(4)
            .prints("ready\ncaught TERM\n"),
    ]
}
