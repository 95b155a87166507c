//! Headers of all responses, limits of all requests, the description of the API, and the configuration.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use crate::support::{PATIENCE, TestApp};

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_its_security_headers_and_other_origins_get_nothing() {
    let app = TestApp::start().await;
    for (path, policy) in [
        ("/livez", "default-src 'none'"),
        ("/v1/concepts/none", "default-src 'none'"),
        ("/nowhere", "default-src 'none'"),
        ("/docs/", "default-src 'self'"),
    ] {
        let request = app.request(Method::GET, path).header("origin", "https://app.example");
        let response = request.send().await.unwrap();
        let of = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or("")
        };
        assert_eq!(of("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(
            (of("referrer-policy"), of("x-frame-options")),
            ("no-referrer", "DENY"),
            "{path}"
        );
        assert!(of("content-security-policy").starts_with(policy), "{path}");
        assert_eq!(of("access-control-allow-origin"), "", "{path}");
        assert_ne!(of("x-request-id"), "", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_origins_may_call_and_slow_or_large_requests_are_turned_away() {
    let flags = [
        "--cors-origin=https://app.example",
        "--header-timeout=1",
        "--body-timeout=1",
        "--header-limit=8",
        "--json-limit=1",
    ];
    let app = TestApp::start_with(&flags).await;
    let preflight = |origin: &'static str| {
        app.request(Method::OPTIONS, "/v1/concepts")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization")
            .send()
    };
    let allowed = preflight("https://app.example").await.unwrap();
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://app.example");
    let other = preflight("https://other.example").await.unwrap();
    assert_eq!(other.headers().get("access-control-allow-origin"), None);
    let address = app.url.strip_prefix("http://").unwrap();
    // A head that never ends: the connection is closed.
    let mut slow = TcpStream::connect(address).unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n").unwrap();
    slow.read_to_end(&mut Vec::new()).unwrap();
    // A head that arrives byte by byte: the limit applies to all of it.
    let mut slow = TcpStream::connect(address).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nx-long: ").unwrap();
    let begun = Instant::now();
    // A read timeout is the pause between two bytes; any other result is the end of the connection.
    while matches!(slow.read(&mut [0; 64]), Err(error) if error.kind() == ErrorKind::WouldBlock) {
        assert!(begun.elapsed() < PATIENCE, "the connection stays open");
        if slow.write_all(b"x").is_err() {
            break;
        }
    }
    // A body that never arrives.
    let mut slow = TcpStream::connect(address).unwrap();
    let head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                content-type: application/json\r\ncontent-length: 20\r\n\r\n{";
    slow.write_all(head.as_bytes()).unwrap();
    let mut told = String::new();
    slow.read_to_string(&mut told).unwrap();
    assert!(
        told.starts_with("HTTP/1.1 408") && told.contains("body_timeout"),
        "{told}"
    );
    let large = app.request(Method::GET, "/livez").header("x-large", "x".repeat(20_000));
    assert_eq!(large.send().await.unwrap().status(), 431);
    let (status, body) = app
        .post(
            "/v1/images/generations",
            serde_json::json!({"prompt": "x".repeat(2000)}),
        )
        .await;
    assert_eq!((status, body["error"]["limit"].as_u64()), (413, Some(1024)), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself() {
    let app = TestApp::start().await;
    let (status, document) = app.get("/openapi.json").await;
    assert_eq!((status, document["openapi"].as_str()), (200, Some("3.1.0")));
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    let create = &document["paths"]["/v1/admin/keys"]["post"];
    assert_eq!(
        create["responses"]["401"]["content"]["application/json"]["schema"]["$ref"],
        "#/components/schemas/Error"
    );
    assert!(document["paths"]["/livez"]["get"]["responses"].get("401").is_none());
    // Every reference resolves.
    let mut open = vec![&document];
    let mut references = 0;
    while let Some(value) = open.pop() {
        match value {
            Value::Object(fields) => open.extend(fields.values()),
            Value::Array(values) => open.extend(values),
            Value::String(text) if text.starts_with("#/") => {
                references += 1;
                assert!(document.pointer(&text[1..]).is_some(), "{text}");
            }
            _ => {}
        }
    }
    assert!(references > 5, "{references}");
    let (status, page) = app.get("/docs/").await;
    assert_eq!(status, 200);
    let page = page.as_str().unwrap();
    assert!(page.contains("swagger") && !page.contains("://"), "{page}");
}

#[test]
fn a_flag_wins_over_a_variable_over_the_file_over_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("coar.toml");
    std::fs::write(
        &file,
        "rows = 11\nqueue = 12\nkeep_images = 13\ncors_origin = [\"https://a.example\"]\n",
    )
    .unwrap();
    let coar = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coar"));
        command
            .args(arguments)
            .arg("--config")
            .arg(&file)
            .env("COAR_QUEUE", "22")
            .env("COAR_KEEP_IMAGES", "23");
        command.output().unwrap()
    };
    let shown = coar(&["config", "show", "--keep-images=33"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    for line in [
        "rows = 11",
        "queue = 22",
        "keep_images = 33",
        "kv_memory = \"auto\"",
        "cors_origin = [\"https://a.example\"]",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }
    let faulty = coar(&["config", "check", "--rows=0", "--training-share=7"]);
    let told = String::from_utf8_lossy(&faulty.stderr).into_owned();
    assert!(
        !faulty.status.success() && told.contains("rows is 0") && told.contains("training_share is 7"),
        "{told}"
    );
    std::fs::write(&file, "rowz = 11\nqueue = \"many\"\n").unwrap();
    let faulty = coar(&["config", "check"]);
    let told = String::from_utf8_lossy(&faulty.stderr).into_owned();
    assert!(
        !faulty.status.success() && told.contains("`rowz`") && told.contains("`queue`"),
        "{told}"
    );
}
