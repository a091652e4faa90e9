//! Capabilities, new privileges, what of the kernel is kept away.

use super::{Case, Expect, case, sh};

/// The capability sets of process 1: inheritable, permitted, effective, bounding, ambient.
const SETS: [&str; 4] = ["sed", "-n", "s/^Cap.*:\\t//p", "/proc/self/status"];

fn sets(name: &'static str, expected: [&str; 5]) -> Case {
    case(name, &SETS).prints(expected.map(|set| format!("{set:0>16}\n")).concat())
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        sets("capabilities_are_dockers", ["0", "a80425fb", "a80425fb", "a80425fb", "0"]),
        sets("all_can_be_dropped", ["0", "0", "0", "0", "0"])
            .with(|setup| setup.cap_drop = vec!["ALL"]),
        sets("one_can_be_added", ["0", "a80435fb", "a80435fb", "a80435fb", "0"])
            .with(|setup| setup.cap_add = vec!["NET_ADMIN"]),
        sets(
            "all_but_one_can_be_added",
            ["0", "1ffffdfffff", "1ffffdfffff", "1ffffdfffff", "0"],
        )
        .with(|setup| {
            setup.cap_add = vec!["ALL"];
            setup.cap_drop = vec!["SYS_ADMIN"];
        }),
        sets("a_user_has_none_in_effect", ["0", "0", "0", "a80425fb", "0"])
            .user("alice", 1000, 1000, &[29, 60]),
        sh("without_chown_nobody_is_given_files", "touch /f; chown 1000 /f 2>/dev/null || echo refused")
            .with(|setup| setup.cap_drop = vec!["CAP_CHOWN"])
            .prints("refused\n"),
        sh("without_sys_admin_nothing_is_mounted", "mount -t tmpfs none /tmp 2>/dev/null || echo refused")
            .prints("refused\n"),
        case("new_privileges_are_possible", &["grep", "NoNewPrivs", "/proc/self/status"])
            .prints("NoNewPrivs:\t0\n"),
        case("new_privileges_can_be_forbidden", &["grep", "NoNewPrivs", "/proc/self/status"])
            .with(|setup| setup.no_new_privileges = true)
            .prints("NoNewPrivs:\t1\n"),
        sh(
            "the_kernels_own_files_are_masked_or_read_only",
            "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls /sys/firmware | wc -l
             for f in /proc/sys/kernel/msgmax /proc/sysrq-trigger /sys/kernel/x /sys/fs/cgroup/x; do
               (echo 1 > $f) 2>/dev/null && echo wrote $f; done; cat /proc/self/cgroup",
        )
        .prints("0\n0\n0::/\n"),
        case("no_mount_is_shared_with_others", &["grep", "-c", "shared:", "/proc/self/mountinfo"])
            .ends(1)
            .stdout(Expect::Is(b"0\n".into())),
    ]
}
