//! Foreign web pages in the browser of a user who runs a server without keys.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use crate::support::TestApp;

/// Sends raw bytes; returns the whole response.
fn raw(app: &TestApp, request: &str) -> String {
    let mut stream = TcpStream::connect(app.url.trim_start_matches("http://")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// Status and error code of a request with these headers, whose body is never sent.
fn ask(app: &TestApp, method: &str, path: &str, headers: &[&str]) -> (u16, String) {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let answer = raw(
        app,
        &format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n"),
    );
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let code = body["error"]["code"].as_str().unwrap_or("").to_owned();
    (status.unwrap_or_else(|| panic!("{method} {path}: {answer}")), code)
}

const LOCAL: &str = "Host: 127.0.0.1:8080";
const REBOUND: &str = "Host: evil.example:8080";
const LONG: &str = "Content-Length: 1000000";
const FORM: &str = "Content-Type: multipart/form-data; boundary=x";

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_was_made_to_resolve_to_loopback_reaches_nothing() {
    let app = TestApp::start().await;
    for path in [
        "/",
        "/studio/app.js",
        "/docs/",
        "/openapi.json",
        "/metrics",
        "/v1/models",
        "/v1/concepts",
        "/v1/admin/keys",
        "/v1/generations",
        "/v1/images/image_01990000000070008000000000000000.png?expires=1&signature=00",
        "/nowhere",
    ] {
        let refused = ask(&app, "GET", path, &[REBOUND]);
        assert_eq!(refused, (403, "host_not_allowed".to_owned()), "{path}");
        let local = ask(&app, "GET", path, &["Host: localhost:1234"]);
        assert_ne!(local.1, "host_not_allowed", "{path}");
    }
    let refused = ask(&app, "POST", "/v1/concepts", &[REBOUND, FORM, LONG]);
    assert_eq!(refused, (403, "host_not_allowed".to_owned()));
    let forwarded = ask(&app, "GET", "/v1/models", &[REBOUND, "X-Forwarded-Host: localhost"]);
    assert_eq!(forwarded.0, 403);
    // Probes address a pod by its IP.
    for path in ["/livez", "/readyz"] {
        assert_eq!(ask(&app, "GET", path, &["Host: 10.1.2.3:8080"]).0, 200, "{path}");
    }
    // Browsers always send the name.
    let old = raw(&app, "GET /v1/models HTTP/1.0\r\n\r\n");
    assert!(old.contains(" 200 OK"), "{old}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_page_changes_nothing_and_its_body_is_not_read() {
    let app = TestApp::start().await;
    for headers in [
        &["Origin: https://evil.example", "Sec-Fetch-Site: cross-site"][..],
        &["Origin: https://evil.example"],
        &["Origin: null"],
        &["Sec-Fetch-Site: cross-site"],
        &["Origin: http://127.0.0.1:3000", "Sec-Fetch-Site: same-site"],
    ] {
        for (path, body) in [
            ("/v1/concepts", &[FORM, LONG][..]),
            ("/v1/images/generations", &["Content-Type: application/json", LONG]),
            ("/v1/concepts/rex/trainings", &["Content-Length: 0"]),
            ("/v1/admin/keys", &["Content-Type: text/plain", LONG]),
        ] {
            let refused = ask(&app, "POST", path, &[&[LOCAL][..], headers, body].concat());
            assert_eq!(refused, (403, "origin_not_allowed".to_owned()), "{path} {headers:?}");
        }
        let refused = ask(&app, "DELETE", "/v1/concepts/rex", &[&[LOCAL][..], headers].concat());
        assert_eq!(refused.1, "origin_not_allowed", "{headers:?}");
        // A link on a foreign page to Studio works.
        assert_eq!(ask(&app, "GET", "/", &[&[LOCAL][..], headers].concat()).0, 200);
    }
    // The server's own pages, and clients that are not browsers.
    for headers in [
        &["Origin: http://127.0.0.1:8080", "Sec-Fetch-Site: same-origin"][..],
        &["Sec-Fetch-Site: none"],
        &[],
    ] {
        let empty = ["Content-Length: 0"];
        let passed = ask(
            &app,
            "POST",
            "/v1/concepts/rex/trainings",
            &[&[LOCAL][..], headers, &empty].concat(),
        );
        assert_eq!(passed, (404, "concept_not_found".to_owned()), "{headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_origins_and_the_public_address_are_its_own() {
    let flags = [
        "--cors-origin=https://app.example",
        "--public-url=https://images.example",
    ];
    let app = TestApp::start_with(&flags).await;
    let change = |headers: &[&str]| {
        let empty = ["Content-Length: 0"];
        ask(&app, "POST", "/v1/concepts/rex/trainings", &[headers, &empty].concat()).1
    };
    let named = [LOCAL, "Origin: https://app.example", "Sec-Fetch-Site: cross-site"];
    assert_eq!(change(&named), "concept_not_found");
    assert_eq!(change(&["Host: images.example"]), "concept_not_found");
    let proxied = [LOCAL, "Origin: https://images.example", "Sec-Fetch-Site: same-origin"];
    assert_eq!(change(&proxied), "concept_not_found");
    assert_eq!(change(&[LOCAL, "Origin: http://app.example"]), "origin_not_allowed");
    assert_eq!(change(&["Host: app.example"]), "host_not_allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_keys_a_page_has_to_send_one_and_nothing_else_is_asked() {
    let app = TestApp::start().await;
    let key = app.create_key("acme", "read,train").await;
    let key = format!("Authorization: Bearer {key}");
    let foreign = [REBOUND, "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"];
    let empty = ["Content-Length: 0"];
    let without = ask(
        &app,
        "POST",
        "/v1/concepts/rex/trainings",
        &[&foreign[..], &empty].concat(),
    );
    assert_eq!(without, (401, "invalid_api_key".to_owned()));
    let with = ask(
        &app,
        "POST",
        "/v1/concepts/rex/trainings",
        &[&foreign[..], &empty, &[&key]].concat(),
    );
    assert_eq!(with, (404, "concept_not_found".to_owned()));
}
