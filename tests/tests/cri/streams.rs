//! What a kubelet streams: containerd's channels over WebSocket, one byte of channel before the
//! data (kubelet's `pkg/cri/streaming`).

use std::net::TcpStream;

use hull_tests::process::DEADLINE;
use k8s_cri::v1::{ExecRequest, PortForwardRequest};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use super::node::{Node, Pod};

/// A terminal's new size.
const RESIZE: u8 = 4;
/// How it ended.
const STATUS: u8 = 3;

/// Some channels in one connection.
pub(crate) struct Channels(WebSocket<TcpStream>);

impl Node<'_> {
    /// A command on a terminal in a container.
    pub(crate) fn exec_on_terminal(&self, container: &str, script: &str) -> Channels {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        Channels::open(&self.wait(self.client.clone().exec(request)).url)
    }

    /// A port of a pod.
    pub(crate) fn forward(&self, pod: &Pod<'_>, port: i32) -> Channels {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port],
        };
        let url = self.wait(self.client.clone().port_forward(request)).url;
        Channels::open(&format!("{url}?port={port}"))
    }
}

impl Channels {
    fn open(url: &str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().unwrap();
        let address = request.uri().authority().unwrap().to_string();
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(tungstenite::client(request, stream).unwrap().0)
    }

    /// Sends to the first channel: stdin, or the port.
    pub(crate) fn write(&mut self, text: &str) {
        self.send(0, text);
    }

    pub(crate) fn resize(&mut self, rows: u16, columns: u16) {
        self.send(
            RESIZE,
            &format!("{{\"Width\":{columns},\"Height\":{rows}}}"),
        );
    }

    fn send(&mut self, channel: u8, text: &str) {
        let message = [&[channel], text.as_bytes()].concat();
        self.0.send(Message::binary(message)).unwrap();
    }

    /// What comes on all but the status's channel, until it says this.
    pub(crate) fn until(&mut self, end: &str) -> String {
        let mut said = String::new();
        while !said.contains(end) {
            match self.next() {
                Some((STATUS, status)) => panic!("{status} after {said:?}, not {end:?}"),
                Some((_, text)) => said.push_str(&text),
                None => panic!("{said:?}, not {end:?}"),
            }
        }
        said
    }

    /// What comes on the status's channel.
    pub(crate) fn status(&mut self) -> String {
        loop {
            match self.next() {
                Some((STATUS, status)) if !status.is_empty() => return status,
                Some(_) => {}
                None => panic!("no status"),
            }
        }
    }

    fn next(&mut self) -> Option<(u8, String)> {
        loop {
            match self.0.read() {
                Ok(Message::Binary(bytes)) => {
                    let (channel, data) = bytes.split_first()?;
                    return Some((*channel, String::from_utf8_lossy(data).into_owned()));
                }
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }
}
