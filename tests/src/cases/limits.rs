//! Limits of processes, memory, processors.

use super::{Case, Expect, case, sh};

/// Takes memory in small pieces, until there is none. (One large piece would be refused, as no
/// machine could give it.)
const HOG: &str = "BEGIN { for (;;) a[n++] = sprintf(\"%50000d\", n) }";

pub(super) fn cases() -> Vec<Case> {
    vec![
        sh(
            "open_files_are_limited",
            "ulimit -Sn; ulimit -Hn; ulimit -c",
        )
        .with(|setup| setup.ulimits = vec![("nofile", 123, 456), ("core", 0, 0)])
        .prints("123\n456\n0\n"),
        case(
            "who_takes_more_memory_than_there_is_gets_killed",
            &["awk", HOG],
        )
        .with(|setup| setup.memory = Some(128))
        .ends(137)
        .stderr(Expect::Any),
        case(
            "a_child_that_takes_too_much_is_killed_alone",
            &["sh", "-c", "awk \"$0\"; echo $?", HOG],
        )
        .with(|setup| setup.memory = Some(128))
        .prints("137\n")
        .stderr(Expect::Any),
        case("one_processor", &["nproc"])
            .with(|setup| setup.cpus = Some(1))
            .prints("1\n"),
        case("two_processors", &["nproc"])
            .with(|setup| setup.cpus = Some(2))
            .prints("2\n"),
        sh(
            "processes_are_limited",
            "n=0; while [ $n -lt 20 ]; do sleep 1000 & n=$((n+1)); done; echo all",
        )
        .with(|setup| setup.pids = Some(8))
        .ends(2)
        .stderr(Expect::Has(vec!["fork"])),
        case(
            "a_kernel_setting_is_made",
            &["cat", "/proc/sys/kernel/msgmax"],
        )
        .with(|setup| setup.sysctls = vec![("kernel.msgmax", "4321")])
        .prints("4321\n"),
    ]
}
