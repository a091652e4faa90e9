//! Who talks to the guest: a web server, a sink for uploads, a name server; and a web client.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::wire::Wire;

/// Large enough for segments of many packets, small enough for a machine that is emulated.
pub(crate) const PAYLOAD_BYTES: usize = 2 << 20;
/// How long any of this may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Bytes without a pattern that a lost or doubled packet would keep.
pub(crate) fn payload() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(PAYLOAD_BYTES);
    while bytes.len() < PAYLOAD_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// The servers; each ends after what the test asks of it.
pub(crate) struct Peer {
    upload: JoinHandle<Vec<u8>>,
}

impl Peer {
    /// Starts them; they listen when this returns.
    pub(crate) fn start(wire: &Wire) -> Self {
        let web = wire.as_peer(|| TcpListener::bind("[::]:8080").unwrap());
        let sink = wire.as_peer(|| TcpListener::bind("10.7.0.1:8081").unwrap());
        let names = wire.as_peer(|| UdpSocket::bind("10.7.0.1:53").unwrap());
        let (web, sink, names) = (web.join(), sink.join(), names.join());
        let (web, sink, names) = (web.unwrap(), sink.unwrap(), names.unwrap());
        std::thread::spawn(move || web.incoming().for_each(|client| serve(client.unwrap())));
        std::thread::spawn(move || answer(&names));
        let upload = std::thread::spawn(move || {
            let (mut client, _) = sink.accept().unwrap();
            let mut bytes = Vec::new();
            client.read_to_end(&mut bytes).unwrap();
            bytes
        });
        Self { upload }
    }

    /// What was uploaded, once it is whole.
    pub(crate) fn uploaded(self) -> Vec<u8> {
        self.upload.join().unwrap()
    }
}

fn serve(mut client: TcpStream) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && client.read(&mut byte).unwrap() == 1 {
        request.push(byte[0]);
    }
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {PAYLOAD_BYTES}\r\n\r\n");
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(&payload()).unwrap();
}

/// Answers every question with one address, whatever is asked (RFC 1035).
fn answer(socket: &UdpSocket) {
    let mut packet = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut packet).unwrap();
        let mut reply = packet[..length].to_vec();
        reply[2..4].copy_from_slice(&[0x81, 0x80]);
        reply[6..8].copy_from_slice(&[0, 1]);
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 7]);
        socket.send_to(&reply, from).unwrap();
    }
}

/// Fetches a page, head and all.
pub(crate) fn fetch(address: &str, path: &str) -> String {
    let address = address.parse().unwrap();
    let mut server = TcpStream::connect_timeout(&address, LIMIT).unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    write!(server, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    server.read_to_string(&mut page).unwrap();
    page
}

/// Waits for what the kernel does when it comes to it, and says nothing of.
pub(crate) fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "it took too long");
        std::thread::yield_now();
    }
}
