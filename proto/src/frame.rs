//! Framing of process streams: a 5-byte header (payload length, little endian, then the kind)
//! and the payload.

use crate::process::{ExitStatus, Failure, Spawn};

const HEADER: usize = 5;

/// One frame of a process stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// Host to guest, first: what to run.
    Spawn(Spawn),
    /// Host to guest: bytes for stdin, at most [`crate::STDIN_WINDOW`] unacknowledged.
    Stdin(Vec<u8>),
    /// Host to guest: stdin has ended.
    StdinEof,
    /// Host to guest: the terminal's new size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters a line.
        cols: u16,
    },
    /// Host to guest: a signal for the process.
    Signal {
        /// The signal's number.
        signal: u8,
        /// Whether every process of the container is meant.
        all: bool,
    },
    /// Host to guest: a container that was held is to run its command.
    Go,
    /// Guest to host: everything is made, the command waits for [`Frame::Go`].
    Prepared {
        /// The process's id in the guest's first namespace.
        pid: u32,
    },
    /// Guest to host: the process runs.
    Started {
        /// Its process id in the guest's first namespace.
        pid: u32,
    },
    /// Guest to host: bytes of its stdout, or of its terminal.
    Stdout(Vec<u8>),
    /// Guest to host: bytes of its stderr.
    Stderr(Vec<u8>),
    /// Guest to host: this many bytes of stdin were written or dropped.
    StdinAck(u32),
    /// Guest to host: the guest's kernel killed processes of the container because its memory ran
    /// out. Said on the stream of the container's first process, before its end.
    OomKilled {
        /// How many it has killed so far.
        count: u32,
    },
    /// Guest to host, last: it ended, and all its output was sent.
    Exited(ExitStatus),
    /// Guest to host, last: it was never started.
    Failed(Failure),
}

/// A process stream that broke its rules.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A payload larger than the receiver allows.
    #[error("frame of {length} bytes, more than the {limit} allowed")]
    TooLarge {
        /// The payload's length in bytes.
        length: usize,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// A kind that this generation doesn't have.
    #[error("frame of unknown kind {0}")]
    UnknownKind(u8),
    /// A payload of the wrong length for its kind.
    #[error("frame of kind {kind} with {length} bytes")]
    WrongLength {
        /// The frame's kind.
        kind: u8,
        /// The payload's length in bytes.
        length: usize,
    },
    /// A structured payload that isn't the expected JSON.
    #[error("frame payload is not the expected object")]
    Malformed(#[from] serde_json::Error),
}

/// Appends the bytes of `frame` to `out`.
///
/// # Errors
/// Only if a structured payload cannot be written as JSON or is past 4 GiB.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    let kind = match frame {
        Frame::Spawn(spawn) => json(1, spawn, out)?,
        Frame::Stdin(data) => bytes(2, data, out),
        Frame::StdinEof => 3,
        Frame::Resize { rows, cols } => {
            out.extend_from_slice(&rows.to_le_bytes());
            bytes(4, &cols.to_le_bytes(), out)
        }
        Frame::Signal { signal, all } => bytes(5, &[*signal, u8::from(*all)], out),
        Frame::Go => 6,
        Frame::Prepared { pid } => bytes(22, &pid.to_le_bytes(), out),
        Frame::Started { pid } => bytes(16, &pid.to_le_bytes(), out),
        Frame::Stdout(data) => bytes(17, data, out),
        Frame::Stderr(data) => bytes(18, data, out),
        Frame::StdinAck(count) => bytes(19, &count.to_le_bytes(), out),
        Frame::OomKilled { count } => bytes(23, &count.to_le_bytes(), out),
        Frame::Exited(status) => json(20, status, out)?,
        Frame::Failed(failure) => json(21, failure, out)?,
    };
    let length = out.len() - start - HEADER;
    let length = u32::try_from(length).map_err(|_| FrameError::TooLarge {
        length,
        limit: u32::MAX as usize,
    })?;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    out[start + 4] = kind;
    Ok(())
}

fn bytes(kind: u8, payload: &[u8], out: &mut Vec<u8>) -> u8 {
    out.extend_from_slice(payload);
    kind
}

fn json<T: serde::Serialize>(kind: u8, value: &T, out: &mut Vec<u8>) -> Result<u8, FrameError> {
    serde_json::to_writer(out, value)?;
    Ok(kind)
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    pending: Vec<u8>,
    consumed: usize,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses payloads above `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            pending: Vec::new(),
            consumed: 0,
            limit,
        }
    }

    /// Takes bytes as they arrive. Call [`Self::take`] until it has no more between feeds, and
    /// no more than one limit and one feed is ever held.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.drain(..self.consumed);
        self.consumed = 0;
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// The stream cannot be used after an error.
    pub fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.pending[self.consumed..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [a, b, c, d, kind] = *header;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > self.limit {
            return Err(FrameError::TooLarge {
                length,
                limit: self.limit,
            });
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = parse(kind, payload)?;
        self.consumed += HEADER + length;
        Ok(Some(frame))
    }

    /// The bytes that were fed and are not yet part of a frame that was returned.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.pending[self.consumed..]
    }

    /// As [`Self::rest`], for whoever decodes no more.
    #[must_use]
    pub fn into_rest(mut self) -> Vec<u8> {
        self.pending.split_off(self.consumed)
    }
}

fn parse(kind: u8, payload: &[u8]) -> Result<Frame, FrameError> {
    let wrong = || FrameError::WrongLength {
        kind,
        length: payload.len(),
    };
    let number = || {
        payload
            .try_into()
            .map(u32::from_le_bytes)
            .map_err(|_| wrong())
    };
    Ok(match kind {
        1 => Frame::Spawn(serde_json::from_slice(payload)?),
        2 => Frame::Stdin(payload.to_vec()),
        3 if payload.is_empty() => Frame::StdinEof,
        3 => return Err(wrong()),
        4 => {
            let [a, b, c, d] = payload.try_into().map_err(|_| wrong())?;
            Frame::Resize {
                rows: u16::from_le_bytes([a, b]),
                cols: u16::from_le_bytes([c, d]),
            }
        }
        5 => match payload {
            &[signal, all @ (0 | 1)] => Frame::Signal {
                signal,
                all: all == 1,
            },
            _ => return Err(wrong()),
        },
        6 if payload.is_empty() => Frame::Go,
        6 => return Err(wrong()),
        16 => Frame::Started { pid: number()? },
        17 => Frame::Stdout(payload.to_vec()),
        18 => Frame::Stderr(payload.to_vec()),
        19 => Frame::StdinAck(number()?),
        20 => Frame::Exited(serde_json::from_slice(payload)?),
        21 => Frame::Failed(serde_json::from_slice(payload)?),
        22 => Frame::Prepared { pid: number()? },
        23 => Frame::OomKilled { count: number()? },
        unknown => return Err(FrameError::UnknownKind(unknown)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::process::FailureKind;

    fn frames() -> impl Strategy<Value = Frame> {
        let data = || proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            data().prop_map(Frame::Stdin),
            Just(Frame::StdinEof),
            any::<(u16, u16)>().prop_map(|(rows, cols)| Frame::Resize { rows, cols }),
            any::<(u8, bool)>().prop_map(|(signal, all)| Frame::Signal { signal, all }),
            Just(Frame::Go),
            any::<u32>().prop_map(|pid| Frame::Prepared { pid }),
            any::<u32>().prop_map(|count| Frame::OomKilled { count }),
            any::<u32>().prop_map(|pid| Frame::Started { pid }),
            data().prop_map(Frame::Stdout),
            data().prop_map(Frame::Stderr),
            any::<u32>().prop_map(Frame::StdinAck),
            any::<u8>().prop_map(|code| Frame::Exited(ExitStatus::Exited(code))),
            any::<(u8, bool)>()
                .prop_map(|(signal, oom)| Frame::Exited(ExitStatus::Signaled { signal, oom })),
            ".{0,40}".prop_map(|message| Frame::Failed(Failure {
                kind: FailureKind::NotFound,
                message
            })),
        ]
    }

    proptest! {
        #[test]
        fn frames_round_trip_however_the_stream_is_cut(
            sent in proptest::collection::vec(frames(), 0..12), cut in 1usize..64,
        ) {
            let mut stream = Vec::new();
            for frame in &sent {
                encode(frame, &mut stream).unwrap();
            }
            let mut decoder = Decoder::new(4096);
            let mut seen = Vec::new();
            for piece in stream.chunks(cut) {
                decoder.feed(piece);
                while let Some(frame) = decoder.take().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(sent, seen);
            prop_assert!(decoder.into_rest().is_empty());
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(noise in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut decoder = Decoder::new(256);
            decoder.feed(&noise);
            while let Ok(Some(_)) = decoder.take() {}
        }
    }

    #[test]
    fn a_length_past_the_limit_is_refused_before_its_bytes_arrive() {
        let mut decoder = Decoder::new(16);
        decoder.feed(&[17, 0, 0, 0, 17]);
        assert!(matches!(
            decoder.take(),
            Err(FrameError::TooLarge {
                length: 17,
                limit: 16
            })
        ));
    }

    #[test]
    fn a_spawn_round_trips_with_its_spec() {
        let spawn = Spawn::Container(Box::new(crate::ContainerStart {
            id: "c".into(),
            spec: crate::OciJson::write(&["a spec"]).unwrap(),
            init: true,
            hold: true,
        }));
        let mut bytes = Vec::new();
        encode(&Frame::Spawn(spawn.clone()), &mut bytes).unwrap();
        let mut decoder = Decoder::new(crate::MAX_FROM_HOST);
        decoder.feed(&bytes);
        assert_eq!(decoder.take().unwrap(), Some(Frame::Spawn(spawn)));
    }
}
