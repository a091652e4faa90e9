//! Who asks: what a registry wants to see, and the tokens that some hand out for it.
//!
//! Owns: the registry's challenge and the token server's answer, both bounded ("Token
//! Authentication" and "OAuth2 Token Authentication" of the distribution project). Refuses:
//! sending a password or a token to a plain-HTTP server for a registry that is asked over TLS.

use http_auth::parser::ChallengeParser;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::Auth;
use super::client::{Client, Failure, said};

/// Most of a token server's answer that is read, in bytes. Tokens go in a header, and servers
/// take headers of some ten KiB.
const MAX_ANSWER_BYTES: usize = 256 * 1024;

/// How a registry wants to be asked.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    /// The token server's URL.
    realm: String,
    service: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    /// OAuth2's name for it.
    #[serde(default)]
    access_token: String,
}

impl Client {
    /// Gets what goes in `Authorization`, or a new one.
    pub(super) async fn authenticate(&self) -> Result<(), Failure> {
        let text = match &self.auth {
            Auth::Bearer(token) => Some(format!("Bearer {token}")),
            auth => match (self.challenge().await?, auth) {
                (Some(challenge), _) => Some(format!("Bearer {}", self.token(&challenge).await?)),
                (None, Auth::Basic { user, password }) => Some(basic(user, password)),
                (None, _) => None,
            },
        };
        let header = text
            .map(|text| HeaderValue::from_str(&text))
            .transpose()
            .map_err(|_| {
                self.broken("its token, or the password for it, is malformed".to_owned())
            })?;
        if let Ok(mut authorization) = self.authorization.lock() {
            *authorization = header;
        }
        Ok(())
    }

    /// Asks the registry whether it wants a token, and from whom.
    async fn challenge(&self) -> Result<Option<Challenge>, Failure> {
        let url = format!("{}://{}/v2/", self.scheme, self.registry());
        let sent = self.http.get(&url).send().await;
        Ok(bearer(sent.map_err(|error| self.lost(&error))?.headers()))
    }

    async fn token(&self, challenge: &Challenge) -> Result<String, Failure> {
        if self.scheme == "https" && !challenge.realm.starts_with("https://") {
            let realm: String = challenge.realm.chars().take(200).collect();
            return Err(self.broken(format!("its token server {realm:?} is not one of https")));
        }
        let response = self.token_request(challenge).send().await;
        let response = response.map_err(|error| self.lost(&error))?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(self.refusal(response).await);
        }
        let body = self.token_body(response).await?;
        if status != StatusCode::OK {
            let reason = said(&body).unwrap_or_else(|| "access denied".to_owned());
            return Err(self.unauthorized(&reason));
        }
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|error| self.broken(format!("its token server answers nonsense: {error}")))?;
        match [answer.token, answer.access_token]
            .into_iter()
            .find(|token| !token.is_empty())
        {
            Some(token) => Ok(token),
            None => Err(self.broken("its token server sends no token".to_owned())),
        }
    }

    fn token_request(&self, challenge: &Challenge) -> RequestBuilder {
        let scope = format!("repository:{}:pull", self.repository());
        let mut fields = vec![("scope", scope.as_str())];
        if let Some(service) = &challenge.service {
            fields.push(("service", service));
        }
        match &self.auth {
            Auth::Identity(token) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "hull"),
                    ("refresh_token", token),
                ]);
                self.http.post(&challenge.realm).form(&fields)
            }
            Auth::Basic { user, password } => {
                let request = self.http.get(&challenge.realm).query(&fields);
                request.basic_auth(user, Some(password))
            }
            _ => self.http.get(&challenge.realm).query(&fields),
        }
    }

    async fn token_body(&self, mut response: Response) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.lost(&error))? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                let text = format!("its token server sends more than {MAX_ANSWER_BYTES} bytes");
                return Err(self.broken(text));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

/// The first bearer challenge among `headers` (RFC 6750 §3).
fn bearer(headers: &HeaderMap) -> Option<Challenge> {
    let lines = headers.get_all(WWW_AUTHENTICATE).into_iter();
    let lines = lines.filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| ChallengeParser::new(line).map_while(Result::ok))
        .filter(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer"))
        .find_map(|challenge| {
            let parameter = |name: &str| {
                let found = challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            Some(Challenge {
                realm: parameter("realm")?,
                service: parameter("service"),
            })
        })
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    let pair = format!("{user}:{password}");
    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
    format!("Basic {encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(lines: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(line).ok()?);
        }
        bearer(&headers)
    }

    #[test]
    fn challenges() {
        let found = |service: Option<&str>| {
            Some(Challenge {
                realm: "https://a/token".to_owned(),
                service: service.map(str::to_owned),
            })
        };
        let both = r#"Bearer realm="https://a/token",service="s",scope="x""#;
        assert_eq!(read(&[both]), found(Some("s")));
        let alone = r#"BEARER Realm="https://a/token""#;
        assert_eq!(read(&[r#"Basic realm="r""#, alone]), found(None));
        assert_eq!(
            read(&[&format!(r#"Basic realm="r", {alone}"#)]),
            found(None)
        );
        for line in [
            "",
            "Bearer",
            r#"Basic realm="r""#,
            r#"Bearer service="s""#,
            ",,,=",
        ] {
            assert_eq!(read(&[line]), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_challenge_is_survived(line in "[ -~]{0,80}") {
            read(&[&line]);
        }
    }
}
