//! Requests to one repository of one registry.
//!
//! Owns: URLs, time limits, and what failures mean. Refuses: keeping what it fetches, and knowing
//! how to be let in (`tokens`). Requests are made here and not by `oci-client`, which reads
//! manifests and tokens of any size into memory and turns a malformed token into a panic.

use std::sync::Mutex;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use serde::Deserialize;

use super::{Auth, PullError, PullOptions};
use crate::Reference;
use crate::digest::Digest;
use crate::manifest;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two reads of one response.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Most of an error's body that is read, in bytes.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// A repository that can be asked for manifests and blobs.
pub(super) struct Client {
    pub(super) http: reqwest::Client,
    reference: Reference,
    pub(super) auth: Auth,
    pub(super) scheme: &'static str,
    /// What `Authorization` says now.
    pub(super) authorization: Mutex<Option<HeaderValue>>,
}

/// A failed request: what to tell people, and whether trying again may help.
pub(super) struct Failure {
    pub(super) error: PullError,
    pub(super) transient: bool,
    /// Credentials or token were not accepted.
    pub(super) unauthorized: bool,
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        Self {
            error,
            transient: false,
            unauthorized: false,
        }
    }
}

impl Client {
    pub(super) fn new(
        reference: &Reference,
        auth: Auth,
        options: &PullOptions<'_>,
    ) -> Result<Self, PullError> {
        let registry = reference.registry_address();
        let loopback = is_loopback(registry);
        let listed = |name: &String| name == registry || *name == host_of(registry);
        let plain = loopback || options.plain_http.iter().any(listed);
        let failed = |reason: String| PullError::Registry {
            registry: registry.to_owned(),
            reason,
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT);
        if loopback {
            builder = builder.no_proxy();
        }
        let http = builder
            .build()
            .map_err(|error| failed(root_cause(&error)))?;
        Ok(Self {
            http,
            reference: reference.clone(),
            auth,
            scheme: if plain { "http" } else { "https" },
            authorization: Mutex::new(None),
        })
    }

    pub(super) fn registry(&self) -> &str {
        self.reference.registry_address()
    }

    pub(super) fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// The bytes of the manifest called `name` (a tag or a digest).
    pub(super) async fn manifest(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let url = self.url("manifests", name);
        let accept = [
            manifest::OCI_MANIFEST,
            manifest::OCI_INDEX,
            manifest::DOCKER_MANIFEST,
            manifest::DOCKER_LIST,
        ]
        .join(", ");
        let request = self.request(&url).header(ACCEPT, accept);
        let mut response = request.send().await.map_err(|error| self.lost(&error))?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let most = usize::try_from(manifest::MAX_BYTES).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.lost(&error))? {
            if bytes.len() + chunk.len() > most {
                let text = format!("the manifest is larger than {most} bytes");
                return Err(self.broken(text));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The blob `digest` from byte `offset` on. The response's status is 200 (all of it) or 206.
    pub(super) async fn blob(&self, digest: &Digest, offset: u64) -> Result<Response, Failure> {
        let url = self.url("blobs", &digest.to_string());
        let mut request = self.request(&url);
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        let response = request.send().await.map_err(|error| self.lost(&error))?;
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if offset > 0 => {
                Ok(response)
            }
            _ => Err(self.refusal(response).await),
        }
    }

    fn request(&self, url: &str) -> reqwest::RequestBuilder {
        let authorization = self
            .authorization
            .lock()
            .ok()
            .and_then(|value| value.clone());
        let request = self.http.get(url);
        match authorization {
            Some(value) => request.header(AUTHORIZATION, value),
            None => request,
        }
    }

    fn url(&self, kind: &str, name: &str) -> String {
        let (scheme, registry) = (self.scheme, self.registry());
        format!(
            "{scheme}://{registry}/v2/{}/{kind}/{name}",
            self.repository()
        )
    }

    /// A response that says no.
    pub(super) async fn refusal(&self, mut response: Response) -> Failure {
        let status = response.status();
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ERROR_BYTES {
                break;
            }
        }
        let said = said(&body).unwrap_or_else(|| status.to_string());
        let registry = self.registry().to_owned();
        match status {
            StatusCode::NOT_FOUND => PullError::NotFound {
                reference: self.reference.familiar(),
                reason: match said.contains("manifest unknown") {
                    true => String::new(),
                    false => format!(" ({said})"),
                },
            }
            .into(),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.unauthorized(&said),
            StatusCode::TOO_MANY_REQUESTS => Failure {
                error: PullError::TooManyRequests {
                    registry,
                    reason: said,
                },
                transient: true,
                unauthorized: false,
            },
            _ => Failure {
                error: PullError::Registry {
                    registry,
                    reason: format!("{status}: {said}"),
                },
                transient: status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT,
                unauthorized: false,
            },
        }
    }

    pub(super) fn unauthorized(&self, said: &str) -> Failure {
        let hint = match self.auth {
            Auth::Anonymous | Auth::FromFiles => "; log in first, or the repository does not exist",
            _ => "; check the credentials",
        };
        Failure {
            error: PullError::Unauthorized {
                registry: self.registry().to_owned(),
                repository: self.reference.repository().to_owned(),
                reason: format!("{said}{hint}"),
            },
            transient: false,
            unauthorized: true,
        }
    }

    pub(super) fn broken(&self, reason: String) -> Failure {
        PullError::Registry {
            registry: self.registry().to_owned(),
            reason,
        }
        .into()
    }

    /// An answer that ended before its time: the next may not.
    pub(super) fn cut_off(&self, reason: String) -> Failure {
        Failure {
            transient: true,
            ..self.broken(reason)
        }
    }

    /// A request or a response that did not come through.
    pub(super) fn lost(&self, error: &reqwest::Error) -> Failure {
        let cause = root_cause(error);
        if !error.is_connect() {
            return self.cut_off(if error.is_timeout() {
                "it does not answer".to_owned()
            } else {
                cause
            });
        }
        let registry = self.registry().to_owned();
        let refused = cause.contains("refused");
        let reason = if cause.contains("lookup") || cause.contains("Name or service not known") {
            format!("no such host ({cause})")
        } else if refused {
            "connection refused".to_owned()
        } else if error.is_timeout() {
            "connection timed out".to_owned()
        } else if self.scheme == "https" && cause.contains("corrupt message") {
            format!("{cause}; if it speaks plain HTTP, list it as such")
        } else {
            cause
        };
        // Nobody listens, or nobody has that name: waiting seconds does not change it.
        let transient = !refused && !reason.starts_with("no such host");
        Failure {
            error: PullError::Unreachable { registry, reason },
            transient,
            unauthorized: false,
        }
    }
}

/// The messages of an error body (distribution-spec "Error Codes"), made harmless for a terminal.
pub(super) fn said(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let item = body.errors.into_iter().next()?;
    let text = match (item.message.is_empty(), item.code.is_empty()) {
        (false, _) => item.message,
        (true, false) => item.code,
        (true, true) => return None,
    };
    Some(text.chars().filter(|c| !c.is_control()).take(300).collect())
}

/// The innermost error's words: the outer ones repeat the URL.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn host_of(registry: &str) -> &str {
    registry.rsplit_once(':').map_or(registry, |(host, _)| host)
}

/// Whether requests to `registry` never leave this host.
fn is_loopback(registry: &str) -> bool {
    let host = host_of(registry);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_registries() {
        for name in ["localhost", "localhost:5000", "127.0.0.1", "127.1.2.3:80"] {
            assert!(is_loopback(name), "{name}");
        }
        for name in [
            "localhost.example.com",
            "127.example.com",
            "128.0.0.1:5000",
            "docker.io",
        ] {
            assert!(!is_loopback(name), "{name}");
        }
    }

    #[test]
    fn error_bodies() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m way","detail":{}}]}"#;
        assert_eq!(said(body).as_deref(), Some("no[31m way"));
        assert_eq!(
            said(br#"{"errors":[{"code":"DENIED"}]}"#).as_deref(),
            Some("DENIED")
        );
        assert_eq!(said(b"<html>"), None);
        assert_eq!(said(br#"{"errors":[]}"#), None);
    }
}
