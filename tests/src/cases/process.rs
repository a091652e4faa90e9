//! Programs, arguments, exit codes, process 1.

use super::{Case, Expect, case, sh};

/// Longest argument of the table, in bytes; the kernel takes 128 KiB (`MAX_ARG_STRLEN`).
const LONG: usize = 100 * 1024;

/// Runs the machine's own perl: with `/usr` shared, its loader named.
pub(super) const PERL: [&str; 4] = [
    "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "--library-path",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/bin/perl",
];

pub(super) fn cases() -> Vec<Case> {
    let long = "x".repeat(LONG);
    let many: Vec<&str> = ["sh", "-c", "echo $#", "sh"]
        .into_iter()
        .chain(std::iter::repeat_n("word", 2000))
        .collect();
    let mut cases = vec![
        case(
            "arguments_are_passed_as_they_are",
            &[
                "printf",
                "[%s]\n",
                "a b",
                "",
                "it's",
                "\"q\"",
                "$HOME",
                "*",
                "é漢🙂",
                "back\\slash",
                "two\nlines",
                "-n",
                "--rm",
            ],
        )
        .prints(
            "[a b]\n[]\n[it's]\n[\"q\"]\n[$HOME]\n[*]\n[é漢🙂]\n[back\\slash]\n[two\nlines]\n[-n]\n\
             [--rm]\n",
        ),
        case(
            "one_argument_can_be_100_kib",
            &["sh", "-c", "echo ${#1}", "sh", &long],
        )
        .prints(format!("{LONG}\n")),
        case("there_can_be_2000_arguments", &many).prints("2000\n"),
        sh("exit_code_1", "exit 1").ends(1),
        sh("exit_code_42", "exit 42").ends(42),
        sh("exit_code_255", "exit 255").ends(255),
        case("success_is_quiet", &["true"]),
        case(
            "a_program_is_found_by_the_containers_path",
            &["script", "one", "two"],
        )
        .env("PATH", "/srv:/bin")
        .prints("script one two\n"),
        sh(
            "the_command_is_process_1_and_alone",
            "echo $$ /proc/[0-9]*; read name < /proc/1/comm; echo $name",
        )
        .prints("1 /proc/1\nsh\n"),
        sh(
            "a_shell_that_lost_its_child_to_a_signal_says_137",
            "sh -c 'kill -9 $$'; exit $?",
        )
        .ends(137)
        .stderr(Expect::Any),
    ];
    cases.extend(endings());
    cases
}

fn endings() -> Vec<Case> {
    let codes = "crun tells all these apart only in its message";
    vec![
        case("no_such_program_is_127", &["no-such-program", "x"])
            .only_hull(codes)
            .ends(127)
            .stderr(Expect::Has(vec!["no-such-program", "not found"])),
        case("no_such_path_is_127", &["/no/such/path"])
            .only_hull(codes)
            .ends(127)
            .stderr(Expect::Has(vec!["/no/such/path"])),
        case("a_file_that_is_no_program_is_126", &["/srv/plain"])
            .only_hull(codes)
            .ends(126)
            .stderr(Expect::Has(vec!["/srv/plain"])),
        case("a_directory_is_126", &["/srv"])
            .only_hull(codes)
            .ends(126)
            .stderr(Expect::Has(vec!["/srv"])),
        case("a_script_without_its_interpreter_is_127", &["/srv/lost"])
            .only_hull(codes)
            .ends(127)
            .stderr(Expect::Has(vec!["/srv/lost"])),
        perl("a_fault_is_139", "unpack('p', pack('Q', 8))").ends(139),
        sh(
            "an_init_reaps_orphans",
            "read init < /proc/1/comm; test $init != sh || exit 9
             pid=$(sh -c 'true & echo $!')
             while test -d /proc/$pid; do :; done; echo reaped",
        )
        .only_hull("crun has no init of its own")
        .with(|setup| setup.init = true)
        .prints("reaped\n"),
        sh("an_init_ends_as_its_command", "kill -ABRT $$")
            .only_hull("crun has no init of its own")
            .with(|setup| setup.init = true)
            .ends(134),
    ]
}

/// A case that runs a script of the machine's perl.
pub(super) fn perl(name: &'static str, script: &str) -> Case {
    let mut command = PERL.to_vec();
    command.extend(["-e", script]);
    case(name, &command).share(super::Share {
        source: "/usr".into(),
        target: "/usr",
        read_only: true,
        files: Vec::new(),
    })
}
