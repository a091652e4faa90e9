//! The relay against a scripted other side, over socket pairs and a real pseudo-terminal.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hull_proto::{MAX_FROM_GUEST, MAX_FROM_HOST};
use rustix::process::{Pid, Signal, getpid, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::*;
use crate::terminal::RawTerminal;

/// Long enough for a loaded machine, short enough to see a hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// The agent's side of a stream.
struct Far {
    socket: UnixStream,
    decoder: Decoder,
    /// Whether signals are shown. They are the whole process's, so those that one test sends
    /// reach the relays of all.
    signals: bool,
}

impl Far {
    fn hear(&mut self) -> Option<Frame> {
        let mut chunk = [0; 8192];
        loop {
            match self.decoder.take().unwrap() {
                Some(Frame::Signal { .. }) if !self.signals => continue,
                Some(frame) => return Some(frame),
                None => {}
            }
            match self.socket.read(&mut chunk).unwrap() {
                0 => return None,
                count => self.decoder.feed(&chunk[..count]),
            }
        }
    }

    fn say(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        encode(frame, &mut bytes).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    fn exit(mut self, code: u8) {
        self.say(&Frame::Exited(ExitStatus::Exited(code)));
    }
}

fn far() -> (UnixStream, Far) {
    let (near, socket) = UnixStream::pair().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let decoder = Decoder::new(MAX_FROM_HOST);
    (
        near,
        Far {
            socket,
            decoder,
            signals: false,
        },
    )
}

/// What a test's caller holds: its stdin's writing end, its outputs' reading ends.
struct Caller {
    stdin: Option<PipeWriter>,
    stdout: PipeReader,
    stderr: PipeReader,
}

struct Setting {
    stdin: bool,
    sig_proxy: bool,
    detach_keys: Vec<u8>,
}

/// Starts a relay on a thread with pipes for the caller; the result comes by the channel.
fn start(near: UnixStream, setting: Setting) -> (Caller, mpsc::Receiver<End>) {
    let (stdin, stdin_writer) = pipe().unwrap();
    let (stdout_reader, stdout) = pipe().unwrap();
    let (stderr_reader, stderr) = pipe().unwrap();
    let (report, result) = mpsc::channel();
    thread::spawn(move || {
        let mut signals = Signals::catch().unwrap();
        let ends = Ends {
            stdin: if setting.stdin {
                Stdin::From(stdin.as_fd())
            } else {
                Stdin::AtEnd
            },
            stdout: stdout.as_fd(),
            stderr: stderr.as_fd(),
            terminal: None,
            signals: &mut signals,
            sig_proxy: setting.sig_proxy,
            detach_keys: setting.detach_keys,
        };
        let end = relay(&near, Decoder::new(MAX_FROM_GUEST), ends).unwrap();
        report.send(end).unwrap();
    });
    let caller = Caller {
        stdin: Some(stdin_writer),
        stdout: stdout_reader,
        stderr: stderr_reader,
    };
    (caller, result)
}

fn plain() -> Setting {
    Setting {
        stdin: true,
        sig_proxy: true,
        detach_keys: Vec::new(),
    }
}

#[test]
fn outputs_stay_apart_and_the_code_comes_through() {
    let (near, mut far) = far();
    let (mut caller, result) = start(near, plain());
    far.say(&Frame::Started { pid: 1 });
    far.say(&Frame::Stdout(b"out".to_vec()));
    far.say(&Frame::Stderr(b"err".to_vec()));
    far.say(&Frame::Stdout(b"put".to_vec()));
    far.exit(7);
    let end = result.recv_timeout(PATIENCE).unwrap();
    assert_eq!(end, End::Exited(ExitStatus::Exited(7)));
    let (mut out, mut err) = (String::new(), String::new());
    caller.stdout.read_to_string(&mut out).unwrap();
    caller.stderr.read_to_string(&mut err).unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("output", "err"));
}

#[test]
fn a_reader_that_is_late_gets_every_byte_and_then_the_end() {
    let (near, mut far) = far();
    let (mut caller, result) = start(near, plain());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|index| index as u8).collect();
    let expected = sent.clone();
    let agent = thread::spawn(move || {
        for piece in sent.chunks(MAX_DATA) {
            far.say(&Frame::Stdout(piece.to_vec()));
        }
        far.exit(0);
    });
    assert!(result.try_recv().is_err());
    let mut seen = Vec::new();
    caller.stdout.read_to_end(&mut seen).unwrap();
    agent.join().unwrap();
    assert!(seen == expected);
    assert_eq!(
        result.recv_timeout(PATIENCE).unwrap(),
        End::Exited(ExitStatus::Exited(0))
    );
}

#[test]
fn stdin_never_passes_the_window_and_ends() {
    let (near, mut far) = far();
    let (mut caller, result) = start(near, plain());
    let total = 3 * STDIN_WINDOW + 1000;
    let mut stdin = caller.stdin.take().unwrap();
    let writer = thread::spawn(move || stdin.write_all(&vec![b'x'; total]).unwrap());
    let (mut seen, mut unacknowledged, mut most) = (0, 0, 0);
    loop {
        match far.hear().unwrap() {
            Frame::Stdin(bytes) => {
                seen += bytes.len();
                unacknowledged += bytes.len();
                most = most.max(unacknowledged);
            }
            Frame::StdinEof => break,
            other => panic!("{other:?}"),
        }
        // Silent until the window is full: a relay that ignores it would go on.
        if unacknowledged == STDIN_WINDOW || seen == total {
            far.say(&Frame::StdinAck(u32::try_from(unacknowledged).unwrap()));
            unacknowledged = 0;
        }
    }
    writer.join().unwrap();
    assert_eq!((seen, most), (total, STDIN_WINDOW));
    far.exit(0);
    result.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn output_flows_while_stdin_is_stuck() {
    let (near, mut far) = far();
    let (mut caller, result) = start(near, plain());
    let mut stdin = caller.stdin.take().unwrap();
    let writer = thread::spawn(move || drop(stdin.write_all(&vec![0; 4 * STDIN_WINDOW])));
    let mut seen = 0;
    while seen < STDIN_WINDOW {
        let Some(Frame::Stdin(bytes)) = far.hear() else {
            panic!()
        };
        seen += bytes.len();
    }
    far.say(&Frame::Stdout(b"still here".to_vec()));
    let mut text = [0; 10];
    caller.stdout.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still here");
    far.exit(0);
    result.recv_timeout(PATIENCE).unwrap();
    writer.join().unwrap();
}

#[test]
fn no_stdin_is_at_its_end_from_the_start() {
    let (near, mut far) = far();
    let (_caller, result) = start(
        near,
        Setting {
            stdin: false,
            ..plain()
        },
    );
    assert_eq!(far.hear(), Some(Frame::StdinEof));
    far.exit(0);
    result.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn detach_keys_leave_and_what_was_typed_before_arrives() {
    let (near, mut far) = far();
    let (mut caller, result) = start(
        near,
        Setting {
            detach_keys: vec![16, 17],
            ..plain()
        },
    );
    caller
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"ls\n\x10\x11rm")
        .unwrap();
    assert_eq!(result.recv_timeout(PATIENCE).unwrap(), End::Detached);
    assert_eq!(far.hear(), Some(Frame::Stdin(b"ls\n".to_vec())));
    assert_eq!(far.hear(), None);
}

#[test]
fn a_stream_that_ends_without_a_word_is_lost() {
    let (near, far) = far();
    let (_caller, result) = start(near, plain());
    drop(far);
    assert_eq!(result.recv_timeout(PATIENCE).unwrap(), End::Lost);
}

#[test]
fn what_was_said_before_the_other_side_left_is_still_read() {
    let (near, mut far) = far();
    let (mut caller, result) = start(near, plain());
    far.say(&Frame::Stdout(b"bye".to_vec()));
    far.exit(3);
    // Too late to be sent anywhere; must neither end nor hide the exit.
    let _ = caller.stdin.as_mut().unwrap().write_all(&[0; 100]);
    assert_eq!(
        result.recv_timeout(PATIENCE).unwrap(),
        End::Exited(ExitStatus::Exited(3))
    );
}

#[test]
fn stdout_without_a_reader_ends_it_and_stderr_without_one_does_not() {
    let (near, mut far) = far();
    let (caller, result) = start(near, plain());
    let Caller {
        stdin: _stdin,
        stdout,
        stderr,
    } = caller;
    drop(stderr);
    far.say(&Frame::Stderr(b"unheard".to_vec()));
    far.say(&Frame::Stderr(b"again".to_vec()));
    assert!(result.recv_timeout(Duration::from_millis(50)).is_err());
    drop(stdout);
    far.say(&Frame::Stdout(b"y\n".to_vec()));
    assert_eq!(result.recv_timeout(PATIENCE).unwrap(), End::OutputClosed);
}

#[test]
fn noise_on_the_stream_is_an_error() {
    let (near, mut far) = far();
    let (mut stdout_reader, stdout) = pipe().unwrap();
    far.socket.write_all(&[0, 0, 0, 0, 99]).unwrap();
    let mut signals = Signals::catch().unwrap();
    let ends = Ends {
        stdin: Stdin::Absent,
        stdout: stdout.as_fd(),
        stderr: stdout.as_fd(),
        terminal: None,
        signals: &mut signals,
        sig_proxy: true,
        detach_keys: Vec::new(),
    };
    let result = relay(&near, Decoder::new(MAX_FROM_GUEST), ends);
    assert!(matches!(
        result,
        Err(RelayError::Frame(FrameError::UnknownKind(99)))
    ));
    drop(stdout);
    assert_eq!(stdout_reader.read(&mut [0]).unwrap(), 0);
}

/// One test for everything that needs signals, so that no other sends them.
#[test]
fn signals_and_window_sizes_reach_the_process() {
    let myself: Pid = getpid();
    let (controller, terminal) = pseudo_terminal();
    set_size(&controller, 24, 80);
    let (near, mut far) = far();
    far.signals = true;
    let (report, result) = mpsc::channel();
    let line = terminal.try_clone().unwrap();
    let relaying = thread::spawn(move || {
        let mut signals = Signals::catch().unwrap();
        report.send(()).unwrap();
        let ends = Ends {
            stdin: Stdin::Absent,
            stdout: line.as_fd(),
            stderr: line.as_fd(),
            terminal: Some(line.as_fd()),
            signals: &mut signals,
            sig_proxy: true,
            detach_keys: Vec::new(),
        };
        relay(&near, Decoder::new(MAX_FROM_GUEST), ends).unwrap()
    });
    result.recv_timeout(PATIENCE).unwrap();
    assert_eq!(far.hear(), Some(Frame::Resize { rows: 24, cols: 80 }));
    set_size(&controller, 50, 132);
    kill_process(myself, Signal::WINCH).unwrap();
    assert_eq!(
        far.hear(),
        Some(Frame::Resize {
            rows: 50,
            cols: 132
        })
    );
    for (signal, number) in [(Signal::USR1, 10), (Signal::TERM, 15), (Signal::HUP, 1)] {
        kill_process(myself, signal).unwrap();
        assert_eq!(
            far.hear(),
            Some(Frame::Signal {
                signal: number,
                all: false
            })
        );
    }
    far.exit(143);
    assert_eq!(
        relaying.join().unwrap(),
        End::Exited(ExitStatus::Exited(143))
    );

    // Without the proxy a signal ends us, and only us.
    let (near, mut far) = self::far();
    let (_caller, result) = start(
        near,
        Setting {
            stdin: false,
            sig_proxy: false,
            ..plain()
        },
    );
    assert_eq!(far.hear(), Some(Frame::StdinEof));
    kill_process(myself, Signal::INT).unwrap();
    assert_eq!(result.recv_timeout(PATIENCE).unwrap(), End::Interrupted(2));
    assert_eq!(far.hear(), None);
}

#[test]
fn a_terminal_is_raw_while_needed_and_then_as_before() {
    let (_controller, terminal) = pseudo_terminal();
    let cooked = |terminal: &OwnedFd| {
        let modes = tcgetattr(terminal).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    };
    assert!(cooked(&terminal));
    let raw = RawTerminal::enter(&terminal).unwrap();
    assert!(
        !tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    );
    drop(raw);
    assert!(cooked(&terminal));
    // A panic on any thread restores it before the process can die of it.
    let raw = RawTerminal::enter(&terminal).unwrap();
    assert!(thread::spawn(|| panic!("on purpose")).join().is_err());
    assert!(cooked(&terminal));
    drop(raw);
    assert!(RawTerminal::enter(File::open("/dev/null").unwrap()).is_err());
}

fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
    (controller, terminal)
}

fn set_size(controller: &OwnedFd, rows: u16, cols: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(controller, size).unwrap();
}
