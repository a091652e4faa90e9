//! Registries that want to know who asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hull_images::{Auth, PullOptions};

use crate::message;
use crate::server::{Reply, Request, Server};
use crate::source::{Content, Place, layer};

fn content() -> Content {
    Content::simple(&[
        layer(&[("a", b"1")]),
        layer(&[("b", b"2")]),
        layer(&[("c", b"3")]),
    ])
}

fn basic(user: &str, password: &str) -> PullOptions<'static> {
    let auth = Auth::Basic {
        user: user.to_owned(),
        password: password.to_owned(),
    };
    PullOptions {
        auth,
        attempts: 2,
        ..PullOptions::default()
    }
}

/// `bob:secret` in base64.
const BOB: &str = "Basic Ym9iOnNlY3JldA==";

#[test]
fn basic_credentials() {
    let content = content();
    let server = Server::start(move |request| match request.header("authorization") {
        Some(BOB) => content.answer(request),
        _ => Reply::new(
            401,
            br#"{"errors":[{"code":"UNAUTHORIZED","message":"who is it"}]}"#,
        )
        .with("WWW-Authenticate", "Basic realm=\"r\""),
    });
    Place::new()
        .pull_with(&server, "a/b:1", &basic("bob", "secret"))
        .unwrap();
    let text = message(
        &Place::new()
            .pull_with(&server, "a/b:1", &basic("bob", "x"))
            .unwrap_err(),
    );
    assert!(
        text.starts_with("unauthorized: ") && text.contains("check the credentials"),
        "{text}"
    );
    let text = message(&Place::new().pull(&server, "a/b:1").unwrap_err());
    assert!(
        text.contains("who is it") && text.contains("log in first"),
        "{text}"
    );
    assert!(
        text.contains(&server.address.to_string()) && text.contains("a/b"),
        "{text}"
    );
}

/// A registry whose tokens serve `uses` requests each.
fn token_registry(uses: usize) -> (Server, Arc<AtomicUsize>) {
    let content = content();
    let issued = Arc::new(AtomicUsize::new(0));
    let used = AtomicUsize::new(0);
    let count = Arc::clone(&issued);
    let answer = move |request: &Request| {
        let host = request.header("host").unwrap_or_default().to_owned();
        if request.path.starts_with("/token") {
            assert!(
                request.path.contains("scope=repository%3Aa%2Fb%3Apull"),
                "{}",
                request.path
            );
            if !matches!(request.header("authorization"), None | Some(BOB)) {
                return Reply::new(
                    401,
                    br#"{"errors":[{"code":"DENIED","message":"go away"}]}"#,
                );
            }
            used.store(0, Ordering::SeqCst);
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200, format!(r#"{{"token":"t{number}"}}"#));
        }
        let now = format!("Bearer t{}", count.load(Ordering::SeqCst));
        if request.header("authorization") == Some(&now)
            && used.fetch_add(1, Ordering::SeqCst) < uses
        {
            return content.answer(request);
        }
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
        Reply::new(401, "{}").with("WWW-Authenticate", challenge)
    };
    (Server::start(answer), issued)
}

#[test]
fn tokens_for_anybody_and_for_somebody() {
    let (server, issued) = token_registry(100);
    Place::new().pull(&server, "a/b:1").unwrap();
    assert_eq!(issued.load(Ordering::SeqCst), 1);
    Place::new()
        .pull_with(&server, "a/b:1", &basic("bob", "secret"))
        .unwrap();
    let text = message(
        &Place::new()
            .pull_with(&server, "a/b:1", &basic("eve", "x"))
            .unwrap_err(),
    );
    assert!(
        text.starts_with("unauthorized: ") && text.contains("go away"),
        "{text}"
    );
}

#[test]
fn tokens_that_run_out_are_renewed() {
    let (server, issued) = token_registry(2);
    let options = PullOptions {
        concurrency: 1,
        ..PullOptions::default()
    };
    Place::new().pull_with(&server, "a/b:1", &options).unwrap();
    assert!(issued.load(Ordering::SeqCst) >= 3);
}

#[test]
fn tokens_that_are_never_accepted_end_the_pull() {
    let (server, issued) = token_registry(0);
    let text = message(&Place::new().pull(&server, "a/b:1").unwrap_err());
    assert!(text.starts_with("unauthorized: "), "{text}");
    assert!(issued.load(Ordering::SeqCst) <= 3);
}

#[test]
fn an_identity_token_is_exchanged() {
    let content = content();
    let server = Server::start(move |request| {
        let host = request.header("host").unwrap_or_default();
        if request.path == "/token" {
            let asked = String::from_utf8_lossy(&request.body);
            for part in [
                "grant_type=refresh_token",
                "refresh_token=secret",
                "scope=repository%3Aa%2Fb%3Apull",
                "service=s",
            ] {
                assert!(asked.split('&').any(|field| field == part), "{asked}");
            }
            return Reply::new(200, r#"{"access_token":"t"}"#);
        }
        match request.header("authorization") {
            Some("Bearer t") => content.answer(request),
            _ => Reply::new(401, "{}").with(
                "WWW-Authenticate",
                format!("Bearer realm=\"http://{host}/token\",service=\"s\""),
            ),
        }
    });
    let options = PullOptions {
        auth: Auth::Identity("secret".to_owned()),
        ..PullOptions::default()
    };
    Place::new().pull_with(&server, "a/b:1", &options).unwrap();
}

#[test]
fn an_endless_token_is_refused() {
    let server = Server::start(|request| {
        let host = request.header("host").unwrap_or_default();
        match request.path.starts_with("/token") {
            true => Reply {
                endless: true,
                ..Reply::new(200, r#"{"token":""#)
            },
            false => Reply::new(401, "").with(
                "WWW-Authenticate",
                format!("Bearer realm=\"http://{host}/token\""),
            ),
        }
    });
    let text = message(&Place::new().pull(&server, "a/b:1").unwrap_err());
    assert!(text.contains("token server sends more than"), "{text}");
}

#[test]
fn malformed_tokens_are_errors() {
    for body in [
        r#"{"token":"a\nb"}"#,
        r#"{"token":"\u0000"}"#,
        "{}",
        "",
        "[1]",
    ] {
        let server = Server::start(move |request| {
            let host = request.header("host").unwrap_or_default();
            match request.path.starts_with("/token") {
                true => Reply::new(200, body),
                false => Reply::new(401, "").with(
                    "WWW-Authenticate",
                    format!("Bearer realm=\"http://{host}/token\""),
                ),
            }
        });
        assert!(Place::new().pull(&server, "a/b:1").is_err(), "{body}");
    }
}
