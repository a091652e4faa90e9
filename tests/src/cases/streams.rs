//! stdin, stdout, stderr.

use super::{Act, Case, Expect, case, sh};

/// Every byte, in an order without a short period.
fn binary(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(super) fn cases() -> Vec<Case> {
    let bytes = binary(1 << 20);
    let line = b"0123456789abcde\n";
    let flood = line.repeat((5 << 20) / line.len());
    vec![
        sh(
            "stdout_and_stderr_are_apart",
            "echo out; echo err >&2; exit 3",
        )
        .ends(3)
        .prints("out\n")
        .stderr(Expect::Is(b"err\n".into())),
        sh("without_stdin_it_is_at_its_end", "cat; echo $?").prints("0\n"),
        case("stdin_reaches_the_command", &["cat"])
            .stdin("some text")
            .prints("some text"),
        sh("empty_stdin_ends", "wc -c").stdin("").prints("0\n"),
        sh(
            "output_goes_on_after_the_end_of_stdin",
            "cat > /dev/null; echo over; echo too >&2",
        )
        .stdin("text\n")
        .prints("over\n")
        .stderr(Expect::Is(b"too\n".into())),
        case("a_mebibyte_of_any_bytes_is_intact_both_ways", &["cat"])
            .stdin(bytes.clone())
            .prints(bytes),
        case(
            "five_mebibytes_come_out",
            &["sh", "-c", "yes 0123456789abcde | head -c 5242880"],
        )
        .prints(flood),
        sh("a_command_that_reads_no_stdin_ends", "exit 4")
            .stdin(binary(300_000))
            .ends(4),
        sh(
            "a_command_that_closes_its_output_goes_on",
            "exec >&- 2>&-; read x; exit 7",
        )
        .stdin("line\n")
        .ends(7),
        sh(
            "a_line_is_seen_as_soon_as_it_is_written",
            "echo first; read x; echo got $x; read y; echo end $y",
        )
        .step("first\n", Act::Write("one\n"))
        .step("got one\n", Act::Write("two\n"))
        .prints("first\ngot one\nend two\n"),
        sh(
            "a_background_process_does_not_hold_the_end",
            "sleep 1000 & echo done",
        )
        .prints("done\n"),
    ]
}
