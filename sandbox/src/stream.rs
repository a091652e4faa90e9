//! A process stream from the client's side: frames over a socket, and the window that keeps
//! stdin from drowning everything else.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hull_proto::{Decoder, Frame, FrameError, MAX_DATA, MAX_FROM_GUEST, STDIN_WINDOW, encode};

const READ_CHUNK: usize = 16 * 1024;

/// A stream that broke.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The socket failed.
    #[error("the process stream failed")]
    Io(#[from] io::Error),
    /// The other side broke the framing.
    #[error("the process stream carries what is no frame")]
    Frame(#[from] FrameError),
    /// The other side is gone.
    #[error("the process stream has ended")]
    Ended,
}

/// The stream of one process.
#[derive(Debug)]
pub struct ProcessStream {
    sender: StreamSender,
    receiver: StreamReceiver,
}

impl ProcessStream {
    /// Takes a connected socket whose next byte begins a frame.
    ///
    /// # Errors
    /// If the descriptor can't be duplicated.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        let window = Arc::new(Window::default());
        Ok(Self {
            receiver: StreamReceiver {
                socket: socket.try_clone()?,
                decoder: Decoder::new(MAX_FROM_GUEST),
                window: Arc::clone(&window),
            },
            sender: StreamSender {
                socket: Arc::new(Mutex::new(socket)),
                window,
            },
        })
    }

    /// See [`StreamSender::send`].
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn send(&self, frame: &Frame) -> Result<(), StreamError> {
        self.sender.send(frame)
    }

    /// See [`StreamReceiver::receive`].
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn receive(&mut self) -> Result<Option<Frame>, StreamError> {
        self.receiver.receive()
    }

    /// Another hold on the half that talks to the process.
    #[must_use]
    pub fn sender(&self) -> StreamSender {
        self.sender.clone()
    }

    /// One half for each direction, to be used from different threads.
    #[must_use]
    pub fn split(self) -> (StreamSender, StreamReceiver) {
        (self.sender, self.receiver)
    }

    /// The socket, and the bytes already read from it, for a caller that polls and keeps the
    /// window of stdin itself.
    #[must_use]
    pub fn into_parts(self) -> (UnixStream, Decoder) {
        (self.receiver.socket, self.receiver.decoder)
    }
}

/// The half that talks to the process. Clones share one stream; frames never interleave.
#[derive(Debug, Clone)]
pub struct StreamSender {
    socket: Arc<Mutex<UnixStream>>,
    window: Arc<Window>,
}

impl StreamSender {
    /// Sends one frame; may wait for the other side to read. Stdin goes by [`Self::stdin`].
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn send(&self, frame: &Frame) -> Result<(), StreamError> {
        let mut bytes = Vec::new();
        encode(frame, &mut bytes)?;
        Ok(lock(&self.socket).write_all(&bytes)?)
    }

    /// Sends bytes of stdin. Waits while a full window is unacknowledged, which needs somebody
    /// to go on receiving.
    ///
    /// # Errors
    /// [`StreamError::Ended`] once the receiver has seen the stream's end.
    pub fn stdin(&self, data: &[u8]) -> Result<(), StreamError> {
        for piece in data.chunks(MAX_DATA) {
            self.window.take(piece.len())?;
            self.send(&Frame::Stdin(piece.to_vec()))?;
        }
        Ok(())
    }

    /// Says that stdin has ended.
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn stdin_eof(&self) -> Result<(), StreamError> {
        self.send(&Frame::StdinEof)
    }

    /// Ends the stream in both directions; the receiver sees its end.
    pub fn close(&self) {
        // A socket that is already gone is as closed as it can be.
        let _ = lock(&self.socket).shutdown(Shutdown::Both);
    }
}

/// The half that hears the process.
#[derive(Debug)]
pub struct StreamReceiver {
    socket: UnixStream,
    decoder: Decoder,
    window: Arc<Window>,
}

impl StreamReceiver {
    /// Waits for the next frame; `None` is the stream's end. Acknowledgements of stdin are kept
    /// and not shown.
    ///
    /// # Errors
    /// If the stream is broken.
    pub fn receive(&mut self) -> Result<Option<Frame>, StreamError> {
        let result = self.next();
        if !matches!(result, Ok(Some(_))) {
            self.window.end();
        }
        result
    }

    fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        let mut chunk = [0; READ_CHUNK];
        loop {
            match self.decoder.take()? {
                Some(Frame::StdinAck(count)) => self.window.give(count as usize),
                Some(frame) => return Ok(Some(frame)),
                None => match self.socket.read(&mut chunk) {
                    Ok(0) => return Ok(None),
                    Ok(count) => self.decoder.feed(&chunk[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                        return Ok(None);
                    }
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }
}

impl AsFd for StreamReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Bytes of stdin on their way.
#[derive(Debug, Default)]
struct Window {
    state: Mutex<WindowState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct WindowState {
    unacknowledged: usize,
    ended: bool,
}

impl Window {
    fn take(&self, count: usize) -> Result<(), StreamError> {
        let mut state = lock(&self.state);
        while !state.ended && state.unacknowledged + count > STDIN_WINDOW {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ended {
            return Err(StreamError::Ended);
        }
        state.unacknowledged += count;
        Ok(())
    }

    fn give(&self, count: usize) {
        let mut state = lock(&self.state);
        state.unacknowledged = state.unacknowledged.saturating_sub(count);
        self.changed.notify_all();
    }

    fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use hull_proto::ExitStatus;

    use super::*;

    #[test]
    fn stdin_waits_for_acknowledgements() {
        let (near, far) = UnixStream::pair().unwrap();
        let (sender, mut receiver) = ProcessStream::new(near).unwrap().split();
        let agent = thread::spawn(move || {
            let mut decoder = Decoder::new(hull_proto::MAX_FROM_HOST);
            let mut far = far;
            let (mut total, mut unacknowledged, mut most) = (0, 0, 0);
            let mut chunk = [0; 4096];
            while total < 4 * STDIN_WINDOW {
                let count = far.read(&mut chunk).unwrap();
                decoder.feed(&chunk[..count]);
                while let Some(frame) = decoder.take().unwrap() {
                    let Frame::Stdin(data) = frame else { panic!() };
                    total += data.len();
                    unacknowledged += data.len();
                    most = most.max(unacknowledged);
                }
                if unacknowledged == STDIN_WINDOW || total == 4 * STDIN_WINDOW {
                    let mut bytes = Vec::new();
                    let count = u32::try_from(unacknowledged).unwrap();
                    encode(&Frame::StdinAck(count), &mut bytes).unwrap();
                    encode(&Frame::Stdout(vec![1]), &mut bytes).unwrap();
                    far.write_all(&bytes).unwrap();
                    unacknowledged = 0;
                }
            }
            let mut bytes = Vec::new();
            encode(&Frame::Exited(ExitStatus::Exited(3)), &mut bytes).unwrap();
            far.write_all(&bytes).unwrap();
            most
        });
        let writer = thread::spawn(move || sender.stdin(&vec![7; 4 * STDIN_WINDOW]));
        let mut last = None;
        while let Some(frame) = receiver.receive().unwrap() {
            last = Some(frame);
        }
        writer.join().unwrap().unwrap();
        assert_eq!(agent.join().unwrap(), STDIN_WINDOW);
        assert_eq!(last, Some(Frame::Exited(ExitStatus::Exited(3))));
    }

    #[test]
    fn a_stream_that_ends_wakes_a_waiting_writer() {
        let (near, far) = UnixStream::pair().unwrap();
        let (sender, mut receiver) = ProcessStream::new(near).unwrap().split();
        let reader = thread::spawn(move || {
            let mut far = far;
            let mut left = STDIN_WINDOW;
            let mut chunk = [0; 4096];
            while left > 0 {
                left = left.saturating_sub(far.read(&mut chunk).unwrap());
            }
        });
        let writer = thread::spawn(move || sender.stdin(&vec![7; 2 * STDIN_WINDOW]));
        reader.join().unwrap();
        assert!(receiver.receive().unwrap().is_none());
        assert!(writer.join().unwrap().is_err());
    }
}
