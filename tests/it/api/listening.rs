//! Addresses, connections, proxies in front of the server, and the service manager.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use reqwest::Method;
use reqwest::redirect::Policy;

use crate::support::{PATIENCE, REX, TestApp, subject_form};

/// Sends a request without a body and reads the whole response; the connection stays open.
fn ask(stream: &mut (impl Read + Write), path: &str) -> String {
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes())
        .unwrap();
    read_response(stream)
}

/// Reads one response; the connection stays open.
fn read_response(stream: &mut impl Read) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    let length = |text: &[u8]| {
        let text = std::str::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        Some((length.parse::<usize>().unwrap(), body.len()))
    };
    while length(&text).is_none_or(|(whole, read)| read < whole) {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// Clients send forms in pieces: when the first part is refused, the rest may still be on its way.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_kept_or_closed_openly_after_an_early_refusal() {
    let app = TestApp::start().await;
    let address = app.url.strip_prefix("http://").unwrap();
    let begin = "--x\r\ncontent-disposition: form-data; name=\"unknown\"\r\n\r\n";
    let form = |rest: usize| {
        let head = "POST /v1/concepts HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x";
        let length = begin.len() + rest;
        format!("{head}\r\ncontent-length: {length}\r\n\r\n{begin}")
    };
    let mut kept = TcpStream::connect(address).unwrap();
    for _ in 0..3 {
        kept.write_all(form(20_000).as_bytes()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        kept.write_all(&[b'y'; 20_000]).unwrap();
        let answer = read_response(&mut kept);
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains("unknown_parameter"),
            "{answer}"
        );
        assert!(!answer.contains("connection: close"), "{answer}");
    }
    assert!(ask(&mut kept, "/livez").starts_with("HTTP/1.1 200"));
    // A rest that is long, does not come, or is not what was announced: the client must not send another request.
    for (length, sent) in [(10 << 20, 0), (20_000, 10)] {
        let mut closed = TcpStream::connect(address).unwrap();
        closed.write_all(form(length).as_bytes()).unwrap();
        closed.write_all(&vec![b'y'; sent]).unwrap();
        let answer = read_response(&mut closed);
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains("connection: close"),
            "{answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_have_a_limit_of_their_own() {
    let app = TestApp::start_with(&["--header-timeout=1", "--idle-timeout=3600"]).await;
    let address = app.url.strip_prefix("http://").unwrap();
    let mut kept = TcpStream::connect(address).unwrap();
    assert!(ask(&mut kept, "/livez").starts_with("HTTP/1.1 200"));
    // The timeout for a head ends another connection; this one has been idle for longer, and stays open.
    let mut slow = TcpStream::connect(address).unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n").unwrap();
    slow.read_to_end(&mut Vec::new()).unwrap();
    assert!(ask(&mut kept, "/livez").starts_with("HTTP/1.1 200"));
    // Between two requests the timeout for a head begins with its first byte.
    kept.write_all(b"GET /livez HTTP/1.1\r\n").unwrap();
    kept.read_to_end(&mut Vec::new()).unwrap();
    drop(app);

    let app = TestApp::start_with(&["--header-timeout=3600", "--idle-timeout=1"]).await;
    let mut kept = TcpStream::connect(app.url.strip_prefix("http://").unwrap()).unwrap();
    kept.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(ask(&mut kept, "/livez").starts_with("HTTP/1.1 200"));
    let rest = kept.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(rest, 0, "the connection ends, without another response");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_takes_requests_and_goes_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("coar.sock");
    let mut child = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args([
            "serve",
            "--threads",
            "1",
            "--device",
            "cpu",
            "--kv-memory",
            "64",
            "--listen",
        ])
        .arg(format!("unix:{}", socket.display()))
        .arg("--data")
        .arg(dir.path().join("data"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line.trim(), format!("listening on unix:{}", socket.display()));
    let mut stream = UnixStream::connect(&socket).unwrap();
    assert!(ask(&mut stream, "/livez").starts_with("HTTP/1.1 200"));
    let begun = Instant::now();
    while !ask(&mut stream, "/readyz").starts_with("HTTP/1.1 200") {
        assert!(begun.elapsed() < PATIENCE, "the model is not loaded");
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_is_notified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let variables = [
        ("NOTIFY_SOCKET", path.display().to_string()),
        ("WATCHDOG_USEC", "60000000".to_owned()),
    ];
    let mut app = TestApp::start_in("warn", &[], &variables).await;
    let next = || {
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let mut first = [next(), next()];
    first.sort();
    assert_eq!(first, ["READY=1", "WATCHDOG=1"]);
    app.terminate_and_read_log();
    while next() != "STOPPING=1" {}
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_has_the_prefix_of_the_public_url() {
    let app = TestApp::start_with(&["--public-url=https://host.example/coar/", "--training-previews=0"]).await;
    let client = reqwest::Client::builder().redirect(Policy::none()).build().unwrap();
    let location = async |path: &str| {
        let answer = client.get(format!("{}{path}", app.url)).send().await.unwrap();
        answer.headers()["location"].to_str().unwrap().to_owned()
    };
    assert_eq!(location("/docs").await, "/coar/docs/");
    assert_eq!(location("/studio").await, "/coar/");
    let (_, document) = app.get("/openapi.json").await;
    assert_eq!(document["servers"][0]["url"], "https://host.example/coar");
    // Pages refer to their files by relative URLs.
    for (path, absolute) in [
        ("/", "=\"/"),
        ("/docs/", "=\"/"),
        ("/docs/swagger-initializer.js", "\"/openapi.json"),
    ] {
        let (status, page) = app.get(path).await;
        let page = page.as_str().unwrap();
        assert!(status == 200 && !page.contains(absolute), "{path}: {page}");
    }
    let form = subject_form(&REX).text("steps", "5000");
    let created = app.request(Method::POST, "/v1/concepts").multipart(form);
    let created = created.send().await.unwrap();
    assert_eq!(created.headers()["location"], "/coar/v1/concepts/rex");
    let (status, drawn) = app
        .post("/v1/generations", serde_json::json!({"prompt": "a red car"}))
        .await;
    assert_eq!(status, 200, "{drawn}");
    let url = drawn["images"][0]["url"].as_str().unwrap();
    assert!(url.starts_with("https://host.example/coar/v1/images/image_"), "{url}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_at_an_unknown_proxy_is_noticed_once() {
    let mut app = TestApp::start().await;
    for _ in 0..3 {
        let request = app.request(Method::GET, "/livez").header("x-forwarded-proto", "https");
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    let log = app.terminate_and_read_log();
    assert_eq!(log.matches("--public-url https://HOST").count(), 1, "{log}");
}

#[test]
fn missing_s3_credentials_are_named_within_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_coar"));
    command
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--blobs",
            "s3://bucket/blobs",
            "--data",
        ])
        .arg(dir.path().join("data"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_")) {
        command.env_remove(name);
    }
    command
        .env("AWS_PROFILE", "production")
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1");
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{told}");
    for word in ["no credentials", "AWS_ACCESS_KEY_ID", "AWS_PROFILE is set"] {
        assert!(told.contains(word), "{word}: {told}");
    }
}
