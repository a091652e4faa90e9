//! The words between a caller and the emulated machine's init: one TCP stream per command.
//!
//! Owns: their encoding, for both ends. Refuses: the product's own frames (`hull-proto`), on
//! purpose: a warm machine must not restart because the product's words changed.
//!
//! A message is its payload's length (4 bytes, little endian), its kind (1 byte), the payload.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Largest payload either side accepts, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Bytes of stdin that may be on their way without a [`Message::StdinAck`].
pub const STDIN_WINDOW: usize = 256 * 1024;

/// TCP port on which the machine's init listens.
pub const PORT: u16 = 7000;

/// The tag of the live directories' file system.
pub const LIVE_TAG: &str = "live";

/// The file server's socket, in the machine's own directory.
pub const LIVE_SOCKET: &str = "live.sock";

/// What the caller says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The machine's secret: a stranger on the loopback must not run commands in it.
    pub token: String,
    /// The command, found by `PATH` of `env` if its name holds no slash.
    pub argv: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Its current directory.
    pub cwd: PathBuf,
    /// Outer directories to be seen as they are now, writable, at the same path.
    pub live: Vec<PathBuf>,
    /// Changes when the outer machine's packages do: what the machine remembers of the rest of
    /// the outer root is then dropped.
    pub packages: u64,
    /// Rows and columns of the terminal to give it, or none.
    pub terminal: Option<(u16, u16)>,
}

/// What the outer side hands the machine's init, in its initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// What a caller must show.
    pub token: String,
    /// The machine's name.
    pub hostname: String,
    /// The outer directory that holds the kernel's `lib/modules`.
    pub kernel_dir: PathBuf,
    /// Modules of the initramfs, in the order to load them.
    pub modules: Vec<String>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Caller, first.
    Open(Open),
    /// Caller: bytes for stdin.
    Stdin(Vec<u8>),
    /// Caller: stdin has ended.
    StdinEof,
    /// Caller: the terminal's new rows and columns.
    Resize(u16, u16),
    /// Caller: a signal for the command.
    Signal(u8),
    /// Caller: is the machine still there?
    Ping,
    /// Machine: bytes of stdout, or of the terminal.
    Stdout(Vec<u8>),
    /// Machine: bytes of stderr.
    Stderr(Vec<u8>),
    /// Machine: this many bytes of stdin were written or dropped.
    StdinAck(u32),
    /// Machine: the answer to a [`Message::Ping`].
    Pong,
    /// Machine, last: the exit code.
    Exited(u8),
    /// Machine, last: the signal that ended it.
    Signaled(u8),
    /// Machine, last: it never ran; the code to report (125, 126, 127) and why.
    Failed(u8, String),
}

/// Writes one message.
///
/// # Errors
/// Those of `to`, and a payload above [`MAX_PAYLOAD`].
pub fn write(to: &mut impl Write, message: &Message) -> io::Result<()> {
    let (kind, payload) = match message {
        Message::Open(open) => (1, serde_json::to_vec(open)?),
        Message::Stdin(data) => (2, data.clone()),
        Message::StdinEof => (3, Vec::new()),
        Message::Resize(rows, cols) => (4, [rows.to_le_bytes(), cols.to_le_bytes()].concat()),
        Message::Signal(signal) => (5, vec![*signal]),
        Message::Ping => (6, Vec::new()),
        Message::Stdout(data) => (16, data.clone()),
        Message::Stderr(data) => (17, data.clone()),
        Message::StdinAck(count) => (18, count.to_le_bytes().to_vec()),
        Message::Exited(code) => (19, vec![*code]),
        Message::Signaled(signal) => (20, vec![*signal]),
        Message::Failed(code, why) => (21, [&[*code], why.as_bytes()].concat()),
        Message::Pong => (22, Vec::new()),
    };
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or_else(|| invalid(format!("a message of {} bytes", payload.len())))?;
    let mut bytes = Vec::with_capacity(payload.len() + 5);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.push(kind);
    bytes.extend_from_slice(&payload);
    to.write_all(&bytes)
}

/// Reads one message; `None` when the stream ended between two.
///
/// # Errors
/// Those of `from`, an end within a message, and bytes that aren't one.
pub fn read(from: &mut impl Read) -> io::Result<Option<Message>> {
    let mut header = [0; 5];
    let mut have = 0;
    while have < header.len() {
        match from.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let [a, b, c, d, kind] = header;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > MAX_PAYLOAD {
        return Err(invalid(format!("a message of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    parse(kind, payload).map(Some)
}

fn parse(kind: u8, payload: Vec<u8>) -> io::Result<Message> {
    let message = match (kind, payload.as_slice()) {
        (1, json) => Message::Open(serde_json::from_slice(json)?),
        (2, _) => Message::Stdin(payload),
        (3, []) => Message::StdinEof,
        (4, &[a, b, c, d]) => {
            Message::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
        }
        (5, &[signal]) => Message::Signal(signal),
        (6, []) => Message::Ping,
        (16, _) => Message::Stdout(payload),
        (17, _) => Message::Stderr(payload),
        (18, &[a, b, c, d]) => Message::StdinAck(u32::from_le_bytes([a, b, c, d])),
        (19, &[code]) => Message::Exited(code),
        (20, &[signal]) => Message::Signaled(signal),
        (21, [code, why @ ..]) => Message::Failed(*code, String::from_utf8_lossy(why).into_owned()),
        (22, []) => Message::Pong,
        _ => {
            return Err(invalid(format!(
                "kind {kind} with {length} bytes",
                length = payload.len()
            )));
        }
    };
    Ok(message)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> impl Strategy<Value = Message> {
        let data = || proptest::collection::vec(any::<u8>(), 0..200);
        prop_oneof![
            data().prop_map(Message::Stdin),
            Just(Message::StdinEof),
            any::<(u16, u16)>().prop_map(|(rows, cols)| Message::Resize(rows, cols)),
            any::<u8>().prop_map(Message::Signal),
            Just(Message::Ping),
            Just(Message::Pong),
            data().prop_map(Message::Stdout),
            data().prop_map(Message::Stderr),
            any::<u32>().prop_map(Message::StdinAck),
            any::<u8>().prop_map(Message::Exited),
            any::<u8>().prop_map(Message::Signaled),
            (any::<u8>(), ".{0,20}").prop_map(|(code, why)| Message::Failed(code, why)),
        ]
    }

    proptest! {
        #[test]
        fn messages_round_trip(sent in proptest::collection::vec(messages(), 0..8)) {
            let mut stream = Vec::new();
            for message in &sent {
                write(&mut stream, message).unwrap();
            }
            let mut rest = stream.as_slice();
            let mut seen = Vec::new();
            while let Some(message) = read(&mut rest).unwrap() {
                seen.push(message);
            }
            prop_assert_eq!(sent, seen);
        }

        #[test]
        fn any_bytes_end_in_messages_or_an_error(noise in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut rest = noise.as_slice();
            while let Ok(Some(_)) = read(&mut rest) {}
        }
    }

    #[test]
    fn a_stream_cut_within_a_message_is_an_error() {
        let mut stream = Vec::new();
        write(&mut stream, &Message::Exited(3)).unwrap();
        stream.pop();
        assert!(read(&mut stream.as_slice()).is_err());
    }
}
