//! `/dev`.

use super::process::perl;
use super::{Case, Expect, sh};

/// A pseudo-terminal made by hand: `TIOCSPTLCK`, `TIOCGPTN` of asm-generic/ioctls.h.
const PTS: &str = r#"
open(my $m, '+<', '/dev/ptmx') or die "ptmx: $!";
my $n = pack('i', 0); ioctl($m, 0x40045431, $n) or die "unlock: $!";
ioctl($m, 0x80045430, $n) or die "number: $!";
my $name = '/dev/pts/' . unpack('i', $n);
open(my $s, '+<', $name) or die "$name: $!";
syswrite($s, "through\n"); my $seen = '';
until ($seen =~ /\n/) { sysread($m, $seen, 100, length $seen) or last }
print -t $s ? "terminal " : "", $seen eq "through\r\n" ? "works\n" : "garbled\n";
"#;

pub(super) fn cases() -> Vec<Case> {
    vec![
        sh(
            "the_usual_devices_are_there",
            "for d in null zero full random urandom tty ptmx; do test -c /dev/$d || echo no $d; done
             for d in pts shm mqueue; do test -d /dev/$d || echo no $d; done
             readlink /dev/fd; readlink /dev/stdout; stat -c %a /dev/shm; stat -c '%a %t:%T' /dev/null
             echo lost > /dev/null; head -c 3 /dev/zero | od -An -tx1; head -c 100 /dev/urandom | wc -c
             (echo x > /dev/full) 2>&1 | grep -o 'No space left on device'",
        )
        .prints(
            "/proc/self/fd\n/proc/self/fd/1\n1777\n666 1:3\n 00 00 00\n100\nNo space left on device\n",
        ),
        sh(
            "no_device_of_the_host_is_there",
            "ls /dev; cat /proc/mounts | grep -c '^/dev/'",
        )
        .ends(1)
        .stdout(Expect::Holds("there is nothing but the usual", |said| {
            let known = [
                "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
                "stderr", "stdin", "stdout", "tty", "urandom", "zero", "0",
            ];
            said.lines().all(|line| known.contains(&line))
        })),
        perl("pseudo_terminals_can_be_made", PTS).prints("terminal works\n"),
        sh("randomness_differs", "a=$(head -c 16 /dev/urandom | od -An -tx1); b=$(head -c 16 /dev/urandom | od -An -tx1); test \"$a\" != \"$b\" && echo differs; cat /proc/sys/kernel/random/uuid | wc -c")
            .prints("differs\n37\n"),
        sh("the_clock_is_the_hosts", "date +%s").stdout(Expect::Holds(
            "it is now, give or take a minute",
            |said| {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let here = now.map(|now| now.as_secs()).unwrap_or_default();
                said.trim().parse::<u64>().is_ok_and(|there| here.abs_diff(there) < 60)
            },
        )),
    ]
}
