//! Users, groups, home, umask.

use super::{Case, sh};

/// Numbers of user, group and all groups in order.
const NUMBERS: &str = "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n)";
/// The same, and the home.
const WHO: &str = "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n) $HOME";

pub(super) fn cases() -> Vec<Case> {
    vec![
        sh("the_user_is_root", WHO).prints("0 0 0 /root\n"),
        sh("a_user_by_name_has_its_groups", WHO)
            .user("alice", 1000, 1000, &[29, 60])
            .prints("1000 1000 29 60 1000 /home/alice\n"),
        sh("a_user_by_number_is_looked_up", WHO)
            .user("1001", 1001, 50, &[60])
            .prints("1001 50 50 60 /home/bob\n"),
        sh("an_unknown_number_is_a_user_too", NUMBERS)
            .user("4242", 4242, 0, &[])
            .prints("4242 0 0\n"),
        sh("user_and_group_by_number", NUMBERS)
            .user("4242:77", 4242, 77, &[])
            .prints("4242 77 77\n"),
        sh("a_group_by_name_replaces_the_users", WHO)
            .user("alice:staff", 1000, 50, &[])
            .prints("1000 50 50 /home/alice\n"),
        sh("additional_groups_are_added", WHO)
            .user("alice", 1000, 1000, &[29, 60])
            .with(|setup| setup.groups = vec![777])
            .prints("1000 1000 29 60 777 1000 /home/alice\n"),
        sh(
            "files_are_the_users_and_the_umask_is_022",
            "umask; cd /tmp; touch f; mkdir d; stat -c '%u:%g %a' f d; test -w /etc/passwd || echo safe
             cat /data/seed; ls /root 2>/dev/null || echo hidden",
        )
        .user("alice", 1000, 1000, &[29, 60])
        .prints("0022\n1000:1000 644\n1000:1000 755\nsafe\nfrom the image\nhidden\n"),
        sh("an_unknown_user_has_a_home_too", "echo $HOME")
            .only_hull("crun sets none")
            .user("4242", 4242, 0, &[])
            .prints("/\n"),
        sh("a_home_that_is_set_stays", "echo $HOME").env("HOME", "/srv").prints("/srv\n"),
    ]
}
