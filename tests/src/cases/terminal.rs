//! Containers with a terminal.

use super::{Act, Case, Expect, sh};

pub(super) fn cases() -> Vec<Case> {
    vec![
        sh(
            "a_terminal_is_on_all_streams_with_its_size",
            "test -t 0 && test -t 1 && test -t 2 && echo yes; stty size; tty; echo $TERM; echo err >&2",
        )
        .tty(33, 99)
        .prints("yes\r\n33 99\r\n/dev/pts/0\r\nxterm\r\nerr\r\n"),
        sh("without_one_there_is_none", "test -t 0 || test -t 1 || test -t 2 || echo none; tty")
            .ends(1)
            .prints("none\nnot a tty\n"),
        sh("a_terminal_is_the_controlling_one", "echo x > /dev/tty; ps -o tty= >/dev/null; test -c /dev/console && echo console")
            .tty(24, 80)
            .prints("x\r\nconsole\r\n"),
        sh("what_is_typed_arrives_and_is_echoed", "echo ask; read x; echo \"got $x\"")
            .tty(24, 80)
            .step("ask\r\n", Act::Write("typed\r"))
            .stdout(Expect::Has(vec!["ask\r\n", "typed\r\n", "got typed\r\n"])),
        sh("control_c_interrupts", "trap 'echo caught; exit 5' INT; echo ready; sleep 1000 & wait")
            .tty(24, 80)
            .step("ready\r\n", Act::Write("\u{3}"))
            .ends(5)
            .stdout(Expect::Has(vec!["ready\r\n", "caught\r\n"])),
        sh("control_d_is_the_end_of_input", "echo ready; cat; echo over")
            .tty(24, 80)
            .step("ready\r\n", Act::Write("\u{4}"))
            .stdout(Expect::Has(vec!["ready\r\n", "over\r\n"])),
        sh(
            "a_new_size_arrives",
            "trap 'test \"$(stty size)\" = \"50 120\" && echo new && exit 6' WINCH
             echo ready; sleep 1000 & while :; do wait; done",
        )
        .only_hull("crun 1.8 passes the signal on, and not the size")
            .tty(24, 80)
            .step("ready\r\n", Act::Resize(50, 120))
            .ends(6)
            .prints("ready\r\nnew\r\n"),
    ]
}
