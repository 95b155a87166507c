//! A tenant's share of connections, uploads, requests and storage, and what is left for the others.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{REX, TestApp, answer, form_named, image_part};

fn refusal(body: &Value) -> (&str, &str, u64) {
    let error = &body["error"];
    let text = |key: &str| error[key].as_str().unwrap_or("");
    (text("code"), text("param"), error["limit"].as_u64().unwrap_or(0))
}

async fn quotas(app: &TestApp, tenant: &str, quotas: Value) {
    let change = app.request(Method::PATCH, &format!("/v1/admin/tenants/{tenant}"));
    let (status, body) = answer(change.json(&json!({ "quotas": quotas }))).await;
    assert_eq!(status, 200, "{body}");
}

/// Opens a connection and sends a request; returns the connection and the head of the response.
fn opened(app: &TestApp, request: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(app.url.trim_start_matches("http://")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    (stream, String::from_utf8(head).unwrap().to_lowercase())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_streams_are_counted_and_leave_room_for_others() {
    let mut app = TestApp::start_with(&["--tenant-streams=2", "--connections=12"]).await;
    let training = app.register_subject(&REX, 20_000).await;
    let follow = format!("/v1/trainings/{training}/events");
    let request = app.request(Method::POST, "/v1/generations");
    let queued = request.header("prefer", "respond-async");
    let (status, queued) = answer(queued.json(&json!({"prompt": "a cat"}))).await;
    assert_eq!(status, 202, "{queued}");
    let generation = format!("/v1/generations/{}", queued["id"].as_str().unwrap());
    let open = async || app.request(Method::GET, &follow).send().await.unwrap();
    let (first, second) = (open().await, open().await);
    assert_eq!(
        (first.status(), second.status()),
        (reqwest::StatusCode::OK, reqwest::StatusCode::OK)
    );
    let third = open().await;
    assert_eq!(third.status(), 429);
    assert!(third.headers().contains_key("retry-after"));
    let body: Value = third.json().await.unwrap();
    assert_eq!(refusal(&body), ("too_many_streams", "", 2));
    let (status, body) = app.get(&format!("{generation}?wait=60")).await;
    assert_eq!((status, refusal(&body)), (429, ("too_many_streams", "", 2)));
    let stream = app
        .request(Method::POST, "/v1/generations")
        .header("accept", "text/event-stream");
    let (status, body) = answer(stream.json(&json!({"prompt": "a cat"}))).await;
    assert_eq!((status, refusal(&body)), (429, ("too_many_streams", "", 2)));
    // Without waiting it is answered, and other tenants have a share of their own.
    assert_eq!(app.get(&generation).await.0, 200);
    assert_eq!(app.get("/livez").await.0, 200);
    let other = app.create_key("acme", "read,generate").await;
    app.key = Some(other);
    let (status, body) = app.post("/v1/generations", json!({"prompt": "a cat"})).await;
    assert_eq!(status, 200, "{body}");
    app.key = Some(app.create_key("default", "read,train").await);
    // A stream that ends frees its place.
    drop(first);
    app.until("room for a stream", || async {
        let request = app.request(Method::GET, &follow).send().await.ok()?;
        request.status().is_success().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_answered_when_all_connections_are_taken() {
    let app = TestApp::start_with(&["--connections=6", "--header-timeout=600"]).await;
    let ask = |path: &str| opened(&app, &format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"));
    // Each stays open after its response; one beyond the limit is closed.
    let mut held = Vec::new();
    let beyond = loop {
        let (stream, head) = ask("/livez");
        assert!(head.starts_with("http/1.1 200"), "{head}");
        if head.contains("connection: close") {
            break stream;
        }
        held.push(stream);
        assert!(held.len() <= 6, "there is no limit");
    };
    for path in ["/livez", "/readyz"] {
        assert!(ask(path).1.starts_with("http/1.1 200"), "{path}");
    }
    let (mut stream, head) = ask("/v1/models");
    assert!(
        head.starts_with("http/1.1 503") && head.contains("retry-after"),
        "{head}"
    );
    let mut body = String::new();
    stream.read_to_string(&mut body).unwrap();
    assert!(body.contains("too_many_connections"), "{body}");
    drop((held, beyond));
    app.until("a free connection", || async {
        ask("/v1/models").1.starts_with("http/1.1 200").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_has_its_room_before_it_is_read() {
    let mut app = TestApp::start_with(&["--upload-space=2"]).await;
    let own = app.create_key("default", "read,train").await;
    let other = app.create_key("acme", "read,train").await;
    let form = |name: &'static str| form_named(&REX, name).text("steps", "1");
    // The server asks for the body once it has space for it: one tenant gets half of the space.
    let (held, head) = opened(
        &app,
        &format!(
            "POST /v1/concepts HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {own}\r\nexpect: 100-continue\r\n\
             content-type: multipart/form-data; boundary=x\r\ncontent-length: 1048576\r\n\r\n"
        ),
    );
    assert!(head.starts_with("http/1.1 100"), "{head}");
    app.key = Some(own);
    let (status, body) = app.register(form("second")).await;
    assert_eq!((status, refusal(&body).0), (429, "too_many_uploads"), "{body}");
    let own = app.key.replace(other);
    let (status, body) = app.register(form("others")).await;
    assert_eq!(status, 202, "{body}");
    // The files have no names, so nothing is left behind by a killed process.
    let folder = app.dir.path().join("data/uploads");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
    drop(held);
    app.key = own;
    let (status, body) = app.register(form("third")).await;
    assert_eq!(status, 202, "{body}");
    // A taken name is reported without decoding the images.
    let broken = reqwest::multipart::Form::new()
        .text("name", "third")
        .text("kind", "style")
        .part("images", image_part(b"\x89PNG\r\n\x1a\n and nothing more".to_vec()));
    let (status, body) = app.register(broken).await;
    assert_eq!((status, refusal(&body).0), (409, "name_taken"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_minute_are_counted_and_reading_is_not() {
    let mut app = TestApp::start_with(&["--quota-requests-per-minute=3"]).await;
    let check = json!({"prompt": "a cat"});
    let validate = "/v1/generations?validate_only=true";
    for _ in 0..2 {
        assert_eq!(app.post(validate, check.clone()).await.0, 200);
    }
    // Refused requests count as well.
    assert_eq!(app.post("/v1/trainings/training_none/cancel", json!({})).await.0, 404);
    for path in [
        validate,
        "/v1/generations",
        "/v1/concepts/import",
        "/v1/concepts/rex/trainings",
    ] {
        let request = app.request(Method::POST, path).json(&check);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 429, "{path}");
        let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
        let body: Value = response.json().await.unwrap();
        assert_eq!(refusal(&body), ("quota_exceeded", "requests_per_minute", 3), "{path}");
    }
    assert_eq!(app.get("/v1/generations").await.0, 200);
    assert_eq!(app.delete("/v1/generations/generation_none").await, 404);
    // Another tenant has its own quota, which an administrator may change.
    app.key = Some(app.create_key("acme", "read,generate,admin").await);
    quotas(&app, "acme", json!({"requests_per_minute": 1})).await;
    assert_eq!(app.post(validate, check.clone()).await.0, 200);
    assert_eq!(app.post(validate, check.clone()).await.0, 429);
    quotas(&app, "acme", json!({"requests_per_minute": 0})).await;
    assert_eq!(app.post(validate, check).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_keeps_is_counted_in_bytes() {
    let mut app = TestApp::start().await;
    app.key = Some(app.create_key("acme", "read,train,generate,admin").await);
    let form = |name: &'static str| form_named(&REX, name).text("steps", "1");
    quotas(&app, "acme", json!({"bytes": 1000})).await;
    let (status, body) = app.register(form("rex")).await;
    assert_eq!(
        (status, refusal(&body)),
        (429, ("quota_exceeded", "bytes", 1000)),
        "{body}"
    );
    assert_eq!(app.blobs().len(), 0, "nothing of it is stored");
    quotas(&app, "acme", json!({"bytes": null})).await;
    let (status, body) = app.register(form("rex")).await;
    assert_eq!(status, 202, "{body}");
    app.until_ended(body["training"]["id"].as_str().unwrap()).await;
    let weights = app.request(Method::GET, "/v1/concepts/rex/weights");
    let file = weights.send().await.unwrap().bytes().await.unwrap();
    let import = |name: &str| {
        let path = format!("/v1/concepts/import?name={name}");
        answer(app.request(Method::POST, &path).body(file.clone()))
    };
    let (_, concept) = app.get("/v1/concepts/rex").await;
    let mut kept = file.len() as u64;
    for index in 0..concept["images"].as_u64().unwrap() {
        let image = app.request(Method::GET, &format!("/v1/concepts/rex/images/{index}"));
        kept += image.send().await.unwrap().bytes().await.unwrap().len() as u64;
    }
    quotas(&app, "acme", json!({"bytes": kept + file.len() as u64 - 1})).await;
    let (status, body) = import("copy").await;
    assert_eq!((status, refusal(&body).1), (429, "bytes"), "{body}");
    quotas(&app, "acme", json!({"bytes": kept + file.len() as u64})).await;
    assert_eq!(import("copy").await.0, 201);
}

/// A concept file whose `text` tensor is grown to `tokens`, as the format allows.
fn inflated(file: &[u8], tokens: usize) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let shape = |name: &str, axis: usize| header[name]["shape"][axis].as_u64().unwrap() as usize;
    let (layers, hidden, images) = (shape("text", 0), shape("text", 2), shape("image", 1));
    let (text, image) = (4 * layers * tokens * hidden, 4 * layers * images * hidden);
    header["text"]["shape"][1] = json!(tokens);
    header["text"]["data_offsets"] = json!([0, text]);
    header["image"]["data_offsets"] = json!([text, text + image]);
    let spec = header["__metadata__"]["hyper_parameters"].as_str().unwrap();
    let mut spec: serde_json::Value = serde_json::from_str(spec).unwrap();
    spec["text_tokens"] = json!(tokens);
    header["__metadata__"]["hyper_parameters"] = json!(spec.to_string());
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + text + image, 0);
    bytes
}

/// Concepts that no training could produce cannot be imported, and a request can only name a few.
#[tokio::test(flavor = "multi_thread")]
async fn concepts_are_bounded_in_size_and_number() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 1).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let weights = app.request(reqwest::Method::GET, "/v1/concepts/rex/weights");
    let file = weights.send().await.unwrap().bytes().await.unwrap();
    let import = |name: &str, bytes: Vec<u8>| {
        let path = format!("/v1/concepts/import?name={name}");
        answer(app.request(reqwest::Method::POST, &path).body(bytes))
    };
    // The inflated file is valid: with the original number of tokens it is accepted.
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let tokens = header["text"]["shape"][1].as_u64().unwrap() as usize;
    assert_eq!(import("same", inflated(&file, tokens)).await.0, 201);
    let one_too_many = import("seventeen", inflated(&file, 17)).await;
    assert_eq!(one_too_many.0, 400, "{}", one_too_many.1);
    assert_eq!(one_too_many.1["error"]["code"], "invalid_concept_file");
    let text = one_too_many.1["error"]["message"].as_str().unwrap();
    assert!(text.contains("`text_tokens` is 17; expected 1 to 16"), "{text}");
    let layer = inflated(&file, 2).len() - inflated(&file, 1).len();
    let huge = inflated(&file, (62 << 20) / layer);
    let before = app.most_memory();
    let (status, body) = import("huge", huge).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (413, &json!("body_too_large")),
        "{body}"
    );
    let limit = body["error"]["limit"].as_u64().unwrap();
    let text = body["error"]["message"].as_str().unwrap();
    assert!(text.contains(&limit.to_string()) && limit < 4 << 20, "{text}");
    let grown = app.most_memory() - before;
    assert!(grown < 16 << 20, "{grown} bytes more");
    // They are counted before any of them is looked up: none of these exists.
    let names: Vec<String> = (0..9).map(|number| format!("none{number}")).collect();
    let draw = json!({"prompt": "a cat", "concepts": names});
    for path in ["/v1/generations", "/v1/generations?validate_only=true"] {
        let (status, body) = app.post(path, draw.clone()).await;
        assert_eq!(
            (status, &body["error"]["code"], &body["error"]["limit"]),
            (400, &json!("too_many_concepts"), &json!(8)),
            "{body}"
        );
    }
    let (status, body) = app
        .post("/v1/generations", json!({"prompt": "a cat", "concepts": names[..8]}))
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (404, &json!("concept_not_found")),
        "{body}"
    );
    // The class noun that is placed counts as well.
    let prompt = "x ".repeat(1999);
    assert!(prompt.len() < 4000);
    let draw = json!({"prompt": prompt, "concepts": ["rex"]});
    let (status, body) = app.post("/v1/generations?validate_only=true", draw).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (400, &json!("prompt_too_long")),
        "{body}"
    );
    let text = body["error"]["message"].as_str().unwrap();
    assert!(text.contains("with its concepts"), "{text}");
}
