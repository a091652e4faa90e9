//! Directories and files of the host, memory file systems, the read-only root.

#![expect(
    clippy::expect_used,
    reason = "a case whose files aren't there doesn't hold"
)]

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Act, Case, Expect, Share, directory, sh};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        sh(
            "a_read_only_root_refuses_writes",
            "for f in /x /etc/x /tmp/x /srv/plain; do (echo > $f) 2>&1 | grep -o 'Read-only file system'; done
             echo x > /dev/shm/x && cat /dev/shm/x",
        )
        .with(|setup| setup.read_only = true)
        .prints("Read-only file system\n".repeat(4) + "x\n"),
        sh(
            "a_memory_file_system_has_its_size",
            "dd if=/dev/zero of=/scratch/f bs=64k count=32 2>&1 | grep -o 'No space left on device'
             stat -c %s /scratch/f; stat -c %a /scratch; rm /scratch/f; echo '#!/bin/sh' > /scratch/x; chmod 755 /scratch/x
             /scratch/x 2>/dev/null || echo noexec",
        )
        .with(|setup| setup.tmpfs = vec![("/scratch", "size=1m,mode=1770")])
        .prints("No space left on device\n1048576\n1770\nnoexec\n"),
        sh("a_memory_file_system_on_a_read_only_root", "echo y > /tmp/y && cat /tmp/y; (echo > /y) 2>/dev/null || echo no")
            .with(|setup| {
                setup.read_only = true;
                setup.tmpfs = vec![("/tmp", "")];
            })
            .prints("y\nno\n"),
    ];
    cases.extend(shares());
    cases.extend(more_shares());
    cases.extend(files());
    cases
}

fn shares() -> Vec<Case> {
    vec![
        sh(
            "a_directory_is_shared_both_ways",
            "cat given; echo more >> given; echo made > made; chmod 640 made; mkdir sub; ln -s made link
             ln made hard; mv hard sub/moved; stat -c %h made",
        )
        .with(|setup| setup.cwd = Some("/vol"))
        .user("alice", 1000, 1000, &[29, 60])
        .share(directory("/vol", &[("shared/given", "from the host\n")]))
        .prints("from the host\n2\n")
        .after(|case| {
            let read = |name: &str| fs::read_to_string(case.join("shared").join(name)).expect(name);
            assert_eq!(read("given"), "from the host\nmore\n");
            assert_eq!(read("sub/moved"), "made\n");
            let made = fs::symlink_metadata(case.join("shared/made")).expect("made");
            assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (1000, 1000, 0o640));
            let link = fs::read_link(case.join("shared/link")).expect("link");
            assert_eq!(link.to_str(), Some("made"));
        }),
        sh(
            "a_read_only_directory_refuses_writes",
            "cat /vol/given; (echo > /vol/given) 2>&1 | grep -o 'Read-only file system'
             rm -f /vol/given 2>&1 | grep -o 'Read-only file system'; touch /vol/new 2>/dev/null || echo no",
        )
        .share(directory("/vol", &[("shared/given", "kept\n")]).read_only())
        .prints("kept\nRead-only file system\nRead-only file system\nno\n")
        .after(|case| {
            let kept = fs::read_to_string(case.join("shared/given")).expect("given");
            assert_eq!(kept, "kept\n");
            assert!(!case.join("shared/new").exists());
        }),
    ]
}

fn more_shares() -> Vec<Case> {
    vec![
        sh("a_mount_point_is_made", "cat /new/nested/path/given")
            .share(directory("/new/nested/path", &[("shared/given", "deep\n")]))
            .prints("deep\n"),
        // A name that is gone may be remembered for a second (`CachePolicy::Auto`).
        sh(
            "what_the_host_changes_is_seen",
            "cat f; ls | wc -l; echo ready; read x; cat f new; ls | wc -l; while test -e gone; do :; done; echo gone",
        )
        .with(|setup| setup.cwd = Some("/vol"))
        .share(directory("/vol", &[("shared/f", "old\n"), ("shared/gone", "")]))
        .step(
            "ready\n",
            Act::Host(
                |case| {
                    let at = |name: &str| case.join("shared").join(name);
                    fs::write(at("f"), "other\n").expect("change a file");
                    fs::write(at("new"), "new\n").expect("make a file");
                    fs::remove_file(at("gone")).expect("remove a file");
                },
                "go\n",
            ),
        )
        .prints("old\n2\nready\nother\nnew\n2\ngone\n"),
        sh("a_share_inside_a_share", "cat /vol/outer /vol/in/inner; ls /vol | wc -l")
            .share(directory("/vol", &[("shared/outer", "outer\n")]))
            .share(Share {
                source: "second".into(),
                target: "/vol/in",
                read_only: false,
                files: vec![("second/inner", "inner\n")],
            })
            .prints("outer\ninner\n2\n"),
    ]
}

fn file(target: &'static str) -> Share {
    Share {
        source: "alone".into(),
        target,
        read_only: false,
        files: vec![("alone", "one file\n"), ("neighbour", "not for it\n")],
    }
}

fn files() -> Vec<Case> {
    vec![
        sh(
            "a_single_file_is_shared",
            "cat /etc/motd; echo more >> /etc/motd; ls /etc | grep -c neighbour",
        )
        .share(file("/etc/motd"))
        .ends(1)
        .prints("one file\n0\n")
        .after(|case| {
            let text = fs::read_to_string(case.join("alone")).expect("alone");
            assert_eq!(text, "one file\nmore\n");
        }),
        sh(
            "a_single_file_can_be_read_only",
            "cat /some/where; echo more >> /some/where",
        )
        .share(file("/some/where").read_only())
        .ends(1)
        .prints("one file\n")
        .stderr(Expect::Has(vec!["Read-only file system"])),
    ]
}
