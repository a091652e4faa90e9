//! A registry on loopback, in plain HTTP, whose every answer a test decides.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::json;

use super::archive::{config, digest};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What to answer.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// All of it.
    Whole(Vec<u8>),
    /// The first half, then a word to the test, then nothing until the client hangs up.
    Half(Vec<u8>, Sender<()>),
    /// There is no such thing.
    Missing,
}

/// An image of one layer, by the last word of the paths under which a registry serves it.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    by_name: BTreeMap<String, Vec<u8>>,
    /// The layer's digest.
    pub(crate) layer: String,
}

impl Content {
    /// One with the tag `1`.
    pub(crate) fn new(layer: &[u8]) -> Self {
        let mut by_name = BTreeMap::new();
        let mut put = |bytes: &[u8], kind: &str| {
            let digest = digest(bytes);
            by_name.insert(digest.clone(), bytes.to_vec());
            json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
        };
        let layer_digest = digest(layer);
        let config = config(&layer_digest);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": put(config.as_bytes(), "application/vnd.oci.image.config.v1+json"),
            "layers": [put(layer, "application/vnd.oci.image.layer.v1.tar")],
        });
        let manifest = manifest.to_string().into_bytes();
        by_name.insert(digest(&manifest), manifest.clone());
        by_name.insert("1".to_owned(), manifest);
        Self {
            by_name,
            layer: layer_digest,
        }
    }

    /// What an honest registry answers.
    pub(crate) fn honest(&self, path: &str) -> Answer {
        let name = path.rsplit('/').next().unwrap_or_default();
        match self.by_name.get(name) {
            _ if path == "/v2/" => Answer::Whole(b"{}".to_vec()),
            Some(bytes) => Answer::Whole(bytes.clone()),
            None => Answer::Missing,
        }
    }
}

/// A running registry. It ends with the process: its threads only ever wait for connections.
#[derive(Debug)]
pub(crate) struct Registry(SocketAddr);

impl Registry {
    pub(crate) fn serve(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || {
                    // A client that hangs up early is part of what is tested.
                    let _gone = stream.and_then(|stream| talk(stream, &*answer));
                });
            }
        });
        Self(address)
    }

    /// A name in this registry.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.0)
    }
}

fn talk(mut stream: TcpStream, answer: &dyn Fn(&str) -> Answer) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let kind = match path.contains("/manifests/") {
        true => MANIFEST,
        false => "application/octet-stream",
    };
    let head = |status: &str, length: usize| {
        format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}\r\n\r\n"
        )
    };
    match answer(path) {
        Answer::Whole(bytes) => {
            stream.write_all(head("200 OK", bytes.len()).as_bytes())?;
            stream.write_all(&bytes)?;
        }
        Answer::Half(bytes, told) => {
            stream.write_all(head("200 OK", bytes.len()).as_bytes())?;
            stream.write_all(&bytes[..bytes.len() / 2])?;
            let _nobody = told.send(());
            while reader.read(&mut [0; 64])? > 0 {}
        }
        Answer::Missing => {
            let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not here"}]}"#;
            stream.write_all(head("404 Not Found", body.len()).as_bytes())?;
            stream.write_all(body.as_bytes())?;
        }
    }
    stream.shutdown(Shutdown::Write)
}
