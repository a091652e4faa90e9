//! What programs expect of their root file system.

use super::process::perl;
use super::{Case, sh};

/// Calls that busybox has no applet for, by number (x86-64's `unistd_64.h`).
const POSIX: &str = r#"
$| = 1;
use Fcntl ':flock'; use Socket;
sub ok { my ($what, $held) = @_; print "$what\n" if $held; print "NOT $what: $!\n" unless $held; $held }
my $f = "/data/f\0";
open(my $w, '+>', '/data/f'); syswrite($w, "first page"); truncate($w, 8192);
ok('fsync', syscall(74, fileno $w) == 0);
ok('fdatasync', syscall(75, fileno $w) == 0);
ok('flock', flock($w, LOCK_EX | LOCK_NB));
open(my $other, '<', '/data/f');
ok('flock excludes', !flock($other, LOCK_EX | LOCK_NB));
my $map = syscall(9, 0, 4096, 3, 1, fileno $w, 0);
ok('mmap', $map > 0);
open(my $motd, '<', '/etc/motd');
ok('read into the map', syscall(0, fileno $motd, $map, 5) == 5);
ok('msync', syscall(26, $map, 4096, 4) == 0);
sysseek($other, 0, 0); sysread($other, my $seen, 10);
ok('mapped writes are read', $seen eq 'a bus page');
ok('mapped reads', unpack('P10', pack('Q', $map)) eq 'a bus page');
my $value = 'some value';
my ($path, $name) = ("/data/f\0", "user.test\0");
ok('setxattr', syscall(188, $path, $name, $value, 10, 0) == 0);
my $got = "\0" x 64;
ok('getxattr', syscall(191, $path, $name, $got, 64) == 10 && substr($got, 0, 10) eq $value);
open(my $a, '>>', '/data/f'); syswrite($a, 'end'); sysseek($a, 0, 0); syswrite($a, 'more');
ok('append', -s '/data/f' == 8199);
my ($old, $new) = ("/data/f\0", "/data/g\0");
open(my $g, '>', '/data/g');
ok('renameat2 no replace', syscall(316, -100, $old, -100, $new, 1) == -1 && $!{EEXIST});
ok('rename over', rename('/data/f', '/data/g') && -s '/data/g' == 8199);
ok('fallocate', syscall(285, fileno $g, 0, 0, 65536) == 0);
unlink '/data/g'; ok('unlinked but open', syswrite($w, 'x') == 1);
opendir(D, '/data'); my @names = grep { !/^\./ } readdir D;
ok('unlinked is out of sight', "@names" eq 'seed');
ok('socket', socket(my $s, AF_UNIX, SOCK_STREAM, 0));
ok('bind', bind($s, pack_sockaddr_un('/data/s')) && -S '/data/s');
ok('listen', listen($s, 1));
socket(my $c, AF_UNIX, SOCK_STREAM, 0);
ok('connect', connect($c, pack_sockaddr_un('/data/s'))) or exit 1;
ok('accept', accept(my $p, $s)) or exit 1;
my $hi; ok('sent', syswrite($p, 'hi') == 2 && sysread($c, $hi, 2) == 2 && $hi eq 'hi');
"#;

/// What it says when all holds, in its order.
const HOLDS: [&str; 23] = [
    "fsync",
    "fdatasync",
    "flock",
    "flock excludes",
    "mmap",
    "read into the map",
    "msync",
    "mapped writes are read",
    "mapped reads",
    "setxattr",
    "getxattr",
    "append",
    "renameat2 no replace",
    "rename over",
    "fallocate",
    "unlinked but open",
    "unlinked is out of sight",
    "socket",
    "bind",
    "listen",
    "connect",
    "accept",
    "sent",
];

pub(super) fn cases() -> Vec<Case> {
    vec![
        sh(
            "links_names_and_times",
            "cd /data; echo a > f; ln f hard; ln -s f soft; ln -s /no/where lost; mv f g; echo b >> hard
             cat g; cat soft 2>/dev/null || echo dangling; readlink lost; stat -c '%h %s' g
             touch -d '2020-02-02 02:02:02' g; stat -c %Y hard; chmod 4751 g; chown 7:8 g; chmod 4751 g
             stat -c '%u:%g %a' g; mkdir -p d/e; mv d dd; rmdir dd/e dd; ls -A",
        )
        .env("TZ", "UTC")
        .prints("a\nb\ndangling\n/no/where\n2 4\n1580608922\n7:8 4751\ng\nhard\nlost\nseed\nsoft\n"),
        sh(
            "the_images_files_can_be_changed_and_removed",
            "cd /etc; echo more >> motd; cat motd; sed -i s/busybox/box/ motd; cat motd; rm motd
             test -e motd || echo gone; rm -r /srv; mkdir /srv; ls -A /srv | wc -l; mv /home /house; ls /house",
        )
        .prints("a busybox for tests\nmore\na box for tests\nmore\ngone\n0\nalice\n"),
        sh(
            "a_thousand_small_files",
            "mkdir /many; cd /many; i=0; while [ $i -lt 1000 ]; do echo $i > f$i; i=$((i+1)); done
             ls | wc -l; cat f* | wc -l; cat f999; rm -r /many; test -e /many || echo gone",
        )
        .prints("1000\n1000\n999\ngone\n"),
        sh(
            "a_file_can_have_holes",
            "dd if=/dev/zero of=/holes bs=1 count=1 seek=1G 2>/dev/null; stat -c %s /holes
             test $(stat -c %b /holes) -lt 1000 && echo holes; truncate -s 10 /holes; wc -c < /holes",
        )
        .prints("1073741825\nholes\n10\n"),
        sh("a_pipe_has_a_name", "mkfifo -m 600 /p; (echo through > /p) & cat /p; stat -c '%F %a' /p")
            .prints("through\nfifo 600\n"),
        sh(
            "megabytes_are_read_back_as_they_were_written",
            "yes 0123456789abcde | head -c 8388608 > /big; sync; md5sum < /big; cp /big /copy; cmp /big /copy && echo same",
        )
        .prints("8ebf0332e3591347bb3384aaf4842625  -\nsame\n"),
        perl("the_root_is_a_posix_file_system", POSIX).prints(HOLDS.map(|word| format!("{word}\n")).concat()),
    ]
}
