//! The words of a monitor's control socket: one JSON object a line, one request a connection.
//!
//! ```text
//! client ► {generation, request}   monitor ► {reply}       Ping, Inspect, Signal, Resize, Pause, Resume
//!                                  … ► {reply: ended}      Wait, Stop: when the container ends
//!                                  ► {reply: ok} frames …  Attach: both speak frames from here on
//!                                  ► {reply: ok} + fd      Exec: the fd is a process stream
//!                                  … ► {reply: ok}         Release: when the command runs
//!                                  … ► {reply}             Stats, Processes, Update: the agent's answer
//! {…} + fd                         … ► {reply: ok}         Checkpoint: the guest is saved in the file fd and
//!                                                          stands still until the client hangs up (it goes
//!                                                          on) or sends a byte (it is ended)
//!                                  … ► {reply: oom_killed} AwaitOom: when memory ran out (or ended)
//!        ► + fds                   ► {reply: ok} lines …   Join: both go on as monitor and agent do;
//!                                                          its end ends the container
//! ```
//!
//! Owns the words and their framing on either side. Refuses long lines.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use hull_proto::{CgroupStats, ProcessPage};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state::ExitRecord;
use crate::sys;

/// Version of everything in this module.
pub const GENERATION: u32 = 1;

/// Longest line, in bytes.
pub(crate) const MAX_LINE: usize = 64 * 1024;

/// A request with its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`GENERATION`] of the client.
    pub generation: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What a client asks of a monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Nothing but an answer.
    Ping,
    /// What the monitor knows of itself.
    Inspect,
    /// The container's end.
    Wait,
    /// A signal for the first process, or for every process of the container.
    Signal {
        /// The signal's number.
        signal: u8,
        /// Whether every process is meant.
        all: bool,
    },
    /// A new size of the first process's terminal.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters a line.
        cols: u16,
    },
    /// The container's end: by its stop signal, by SIGKILL later.
    Stop {
        /// The signal; the container's own when absent.
        signal: Option<u8>,
        /// Milliseconds until SIGKILL; the container's own when absent.
        timeout_ms: Option<u64>,
    },
    /// The first process's stream.
    Attach {
        /// Whether this client is the one that gives stdin.
        stdin: bool,
    },
    /// A stream to a process that the client will spawn.
    Exec,
    /// A held container's command; answered when it runs.
    Release,
    /// Stillness of the guest.
    Pause,
    /// Its end.
    Resume,
    /// What the container has used in the guest.
    Stats,
    /// The container's processes in the guest.
    Processes {
        /// Only those with higher ids than this.
        after: u32,
    },
    /// Other limits of the container in the guest.
    Update {
        /// Those that change, as the OCI runtime spec has `linux.resources`.
        resources: Value,
    },
    /// Room in a pod's sandbox for another container. The directories that it sees come as
    /// descriptors with the request, in the order of their names.
    Join {
        /// The container's id.
        id: String,
        /// The directories.
        shares: Vec<JoiningShare>,
        /// What its processes may use, if they have a limit.
        #[serde(default)]
        memory_bytes: Option<u64>,
    },
    /// The guest in a file, which comes with this line; it stands still from the answer on, until
    /// the client hangs up, and never goes on if it sends a byte before.
    Checkpoint {
        /// What the guest stands on here, for the file.
        ground: Value,
    },
    /// Processes that are killed because the container's memory ran out.
    AwaitOom {
        /// How many of them the client knows of.
        seen: u32,
    },
}

/// A directory that a container brings into its pod's sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoiningShare {
    /// Its name in the tree that the guest sees.
    pub name: String,
    /// Refuses writes.
    pub read_only: bool,
}

/// What a monitor answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// Done.
    Ok,
    /// Not done, and why.
    Error {
        /// What failed.
        message: String,
    },
    /// The container has ended.
    Ended(ExitRecord),
    /// What the monitor knows of itself.
    Inspect(Report),
    /// What the container has used in the guest.
    Stats(Box<CgroupStats>),
    /// Some of the container's processes in the guest.
    Processes(ProcessPage),
    /// Memory ran out.
    OomKilled {
        /// How many processes were killed for it so far.
        count: u32,
    },
}

/// What a monitor knows of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its process id.
    pub pid: u32,
    /// Clients attached to the first process.
    pub attached: usize,
    /// Defences that are in force, by name.
    pub jail: Vec<String>,
    /// When the start passed each of its stages.
    #[serde(default)]
    pub marks: Marks,
    /// Requests that the guest has made of its shares.
    #[serde(default)]
    pub fs_requests: u64,
    /// What has gone over its VM's cards.
    #[serde(default)]
    pub interfaces: Vec<InterfaceStats>,
}

/// What has gone over a card, as its monitor counts it: received is what the guest got. No frame
/// is broken on this wire.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
#[expect(
    missing_docs,
    reason = "the kernel's names, of its interfaces' statistics"
)]
pub struct InterfaceStats {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_dropped: u64,
}

/// When a start passed each of its stages, in nanoseconds of the host's `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Marks {
    /// The monitor's `main`.
    pub monitor: u64,
    /// The VM is built and its guest about to run.
    pub built: u64,
    /// The agent's first instructions: the guest's first user space.
    pub agent: u64,
    /// The agent's hello: it takes requests from here on.
    pub ready: u64,
    /// The container's first process runs.
    pub started: u64,
}

/// A control connection that broke.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("the monitor's control socket failed")]
    Io(#[from] io::Error),
    /// A line that isn't what it should be.
    #[error("the monitor's control socket carries what is no control line")]
    Malformed(#[from] serde_json::Error),
    /// A line longer than the limit.
    #[error("a control line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The monitor hung up.
    #[error("the monitor is gone")]
    Gone,
    /// The monitor said no.
    #[error("{0}")]
    Refused(String),
}

/// `value` as a line.
pub(crate) fn line<T: Serialize>(value: &T) -> Result<Vec<u8>, ControlError> {
    let mut bytes = serde_json::to_vec(value)?;
    if bytes.len() > MAX_LINE {
        return Err(ControlError::TooLong);
    }
    bytes.push(b'\n');
    Ok(bytes)
}

/// Sends a request.
pub(crate) fn ask(mut socket: &UnixStream, request: Request) -> Result<(), ControlError> {
    socket.write_all(&request_line(request)?).map_err(broken)
}

/// A request as this generation writes it.
pub(crate) fn request_line(request: Request) -> Result<Vec<u8>, ControlError> {
    line(&Envelope {
        generation: GENERATION,
        request,
    })
}

/// Where the control socket in a run directory is reached: by descriptor, as a socket's address
/// holds but 107 bytes.
pub(crate) fn address(run_directory: &OwnedFd) -> PathBuf {
    Path::new(&sys::descriptor_path(run_directory)).join("control.sock")
}

/// A monitor that is gone shows in either way.
fn broken(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Gone,
        _ => ControlError::Io(error),
    }
}

/// Waits for the reply, and not a byte more: what follows may be frames.
pub(crate) fn answer(mut socket: &UnixStream) -> Result<Reply, ControlError> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match socket.read(&mut byte) {
            Ok(0) => return Err(ControlError::Gone),
            Ok(_) if byte[0] == b'\n' => return checked(serde_json::from_slice(&line)?),
            Ok(_) if line.len() == MAX_LINE => return Err(ControlError::TooLong),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
}

fn checked(reply: Reply) -> Result<Reply, ControlError> {
    match reply {
        Reply::Error { message } => Err(ControlError::Refused(message)),
        reply => Ok(reply),
    }
}

/// Most descriptors that go with one message (`SCM_MAX_FD` of Linux).
pub(crate) const MAX_DESCRIPTORS: usize = 253;

/// Sends a line together with descriptors (unix(7), `SCM_RIGHTS`). The line is to fit the socket's
/// buffer, which is to be empty, so that it goes out whole.
///
/// # Errors
/// What sendmsg(2) says; `InvalidInput` for more than 253; `WriteZero` if only a part went out.
pub fn send_with_fds(
    socket: &UnixStream,
    line: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(line)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent == line.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Reads once, and takes what descriptors come along.
///
/// # Errors
/// What recvmsg(2) says.
pub(crate) fn receive_with_fds(
    socket: &UnixStream,
    chunk: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(chunk)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok(received.bytes)
}

/// Waits for a reply that carries a descriptor.
pub(crate) fn answer_with_fd(socket: &UnixStream) -> Result<OwnedFd, ControlError> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let count = match receive_with_fds(socket, &mut chunk, &mut descriptors) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(broken)?,
        };
        if count == 0 {
            return Err(ControlError::Gone);
        }
        line.extend_from_slice(&chunk[..count]);
        if line.len() > MAX_LINE {
            return Err(ControlError::TooLong);
        }
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            checked(serde_json::from_slice(&line[..end])?)?;
            return descriptors.pop().ok_or(ControlError::Gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn requests() -> impl Strategy<Value = Request> {
        prop_oneof![
            Just(Request::Ping),
            Just(Request::Inspect),
            Just(Request::Wait),
            Just(Request::Exec),
            Just(Request::Release),
            Just(Request::Pause),
            Just(Request::Resume),
            any::<(u8, bool)>().prop_map(|(signal, all)| Request::Signal { signal, all }),
            any::<(u16, u16)>().prop_map(|(rows, cols)| Request::Resize { rows, cols }),
            any::<(Option<u8>, Option<u64>)>()
                .prop_map(|(signal, timeout_ms)| Request::Stop { signal, timeout_ms }),
            any::<bool>().prop_map(|stdin| Request::Attach { stdin }),
            Just(Request::Stats),
            any::<u64>().prop_map(|processor| Request::Checkpoint {
                ground: serde_json::json!({"processor": processor}),
            }),
            any::<u32>().prop_map(|after| Request::Processes { after }),
            any::<u32>().prop_map(|seen| Request::AwaitOom { seen }),
            any::<(String, bool, Option<u64>)>().prop_map(|(name, read_only, memory_bytes)| {
                Request::Join {
                    id: name.clone(),
                    shares: vec![JoiningShare { name, read_only }],
                    memory_bytes,
                }
            }),
            any::<u32>().prop_map(|limit| Request::Update {
                resources: serde_json::json!({"pids": {"limit": limit}}),
            }),
        ]
    }

    proptest! {
        #[test]
        fn requests_round_trip(request in requests()) {
            let envelope = Envelope { generation: GENERATION, request };
            let bytes = line(&envelope).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Envelope>(&bytes).unwrap(), envelope);
        }

        #[test]
        fn noise_is_a_request_or_an_error(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Envelope>(&noise);
        }
    }

    #[test]
    fn a_reply_is_read_to_its_newline_and_no_further() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut bytes = line(&Reply::Ok).unwrap();
        bytes.extend_from_slice(b"frames");
        far.write_all(&bytes).unwrap();
        assert_eq!(answer(&near).unwrap(), Reply::Ok);
        let mut rest = [0; 6];
        (&near).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"frames");
        drop(far);
        assert!(matches!(answer(&near), Err(ControlError::Gone)));
        assert!(matches!(ask(&near, Request::Ping), Err(ControlError::Gone)));
    }

    #[test]
    fn a_descriptor_travels_with_its_reply() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        send_with_fds(&far, &line(&Reply::Ok).unwrap(), &[file.as_fd()]).unwrap();
        let received = File::from(answer_with_fd(&near).unwrap());
        assert_eq!(received.metadata().unwrap().len(), 1);
        let refusal = thread::spawn(move || {
            let message = "no".to_owned();
            let line = line(&Reply::Error { message }).unwrap();
            (&far).write_all(&line).unwrap();
        });
        assert!(matches!(
            answer_with_fd(&near),
            Err(ControlError::Refused(why)) if why == "no"
        ));
        refusal.join().unwrap();
    }
}
