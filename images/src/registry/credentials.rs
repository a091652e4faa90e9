//! Credentials that people left for other tools.
//!
//! Owns: which files are asked, in which order, and by which names a registry goes in them.
//! Refuses: storing credentials, and printing them.

use std::env;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use super::{Auth, PullError};
use crate::Reference;

/// Largest credentials file read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Finds out who asks `reference`'s registry.
pub(super) fn find(auth: &Auth, reference: &Reference) -> Result<Auth, PullError> {
    if *auth != Auth::FromFiles {
        return Ok(auth.clone());
    }
    for file in files(|name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }) {
        if let Some(found) = from_file(&file, reference)? {
            return Ok(found);
        }
    }
    Ok(Auth::Anonymous)
}

/// Docker's file first, then podman's (containers-auth.json(5)).
fn files(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let docker = variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|h| h.join(".docker")));
    let podman = variable("REGISTRY_AUTH_FILE")
        .or_else(|| variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")));
    docker
        .map(|dir| dir.join("config.json"))
        .into_iter()
        .chain(podman)
        .collect()
}

/// By which names a registry goes in credentials' files.
fn names(reference: &Reference) -> Vec<String> {
    match reference.registry() {
        "docker.io" => vec![
            "https://index.docker.io/v1/".to_owned(),
            "docker.io".to_owned(),
        ],
        other => vec![other.to_owned()],
    }
}

fn from_file(path: &Path, reference: &Reference) -> Result<Option<Auth>, PullError> {
    let failed = |reason: String| PullError::Credentials {
        registry: reference.registry().to_owned(),
        reason: format!("{}: {reason}", path.display()),
    };
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file
            .take(MAX_FILE_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(error.to_string()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    for name in names(reference) {
        match docker_credential::get_credential_from_reader(&bytes[..], &name) {
            Ok(DockerCredential::UsernamePassword(user, _)) if user.is_empty() => {}
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                return Ok(Some(Auth::Basic { user, password }));
            }
            Ok(DockerCredential::IdentityToken(token)) => return Ok(Some(Auth::Identity(token))),
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            // The protocol's words for "none": docker-credential-helpers, credentials/error.go.
            Err(CredentialRetrievalError::HelperFailure { stdout, .. })
                if stdout.contains("credentials not found") => {}
            Err(CredentialRetrievalError::HelperFailure {
                helper,
                stdout,
                stderr,
            }) => {
                let said = [stdout.trim(), stderr.trim()].join(" ");
                return Err(failed(format!(
                    "credential helper {helper} failed: {}",
                    said.trim()
                )));
            }
            Err(CredentialRetrievalError::HelperCommunicationError) => {
                return Err(failed(
                    "the credential helper it names cannot be run".to_owned(),
                ));
            }
            Err(CredentialRetrievalError::ConfigReadError) => {
                return Err(failed("it is not valid JSON".to_owned()));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Auth {
        Auth::Basic {
            user: user.to_owned(),
            password: password.to_owned(),
        }
    }

    fn ask(json: &str, name: &str) -> Result<Option<Auth>, PullError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json).unwrap();
        from_file(file.path(), &Reference::parse(name).unwrap())
    }

    #[test]
    fn plain_auths() {
        // "bob:secret" in base64
        let json = r#"{"auths":{"localhost:5000":{"auth":"Ym9iOnNlY3JldA=="},
            "https://index.docker.io/v1/":{"username":"hub","password":"p:w"},
            "https://ghcr.io":{"auth":"Ym9iOnNlY3JldA=="}, "empty.example":{}}}"#;
        assert!(ask(json, "localhost:5000/a").unwrap() == Some(basic("bob", "secret")));
        assert!(ask(json, "alpine").unwrap() == Some(basic("hub", "p:w")));
        assert!(ask(json, "ghcr.io/x/y").unwrap() == Some(basic("bob", "secret")));
        assert!(ask(json, "localhost:5001/a").unwrap().is_none());
        assert!(ask(json, "empty.example/a").unwrap().is_none());
        assert!(ask("", "alpine").unwrap().is_none());
        assert!(ask("{}", "alpine").unwrap().is_none());
    }

    #[test]
    fn broken_files_are_named() {
        let error = ask("{", "alpine").err().unwrap().to_string();
        assert!(
            error.contains("docker.io") && error.contains("not valid JSON"),
            "{error}"
        );
        let json = r#"{"credHelpers":{"a.example":"hull-test-no-such-helper"}}"#;
        let error = ask(json, "a.example/x").err().unwrap().to_string();
        assert!(error.contains("helper"), "{error}");
        assert!(ask(json, "b.example/x").unwrap().is_none());
    }

    #[test]
    fn identity_tokens() {
        let json = r#"{"auths":{"a.example":{"identitytoken":"t"}}}"#;
        assert!(ask(json, "a.example/x").unwrap() == Some(Auth::Identity("t".to_owned())));
    }

    #[test]
    fn order_of_files() {
        let ask = |set: &'static [(&str, &str)]| {
            files(move |name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| PathBuf::from(value))
            })
        };
        assert_eq!(
            ask(&[("HOME", "/h")]),
            [Path::new("/h/.docker/config.json")]
        );
        assert_eq!(
            ask(&[
                ("HOME", "/h"),
                ("DOCKER_CONFIG", "/d"),
                ("XDG_RUNTIME_DIR", "/r")
            ]),
            [
                Path::new("/d/config.json"),
                Path::new("/r/containers/auth.json")
            ]
        );
        assert_eq!(ask(&[("REGISTRY_AUTH_FILE", "/a")]), [Path::new("/a")]);
        assert!(ask(&[]).is_empty());
    }
}
