//! Attacks that no other test tries: secrets in the log, other tenants' URLs, paths, bombs, headers.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use coar::registry::Registry;
use reqwest::multipart::Form;
use serde_json::json;

use crate::support::{REX, TestApp, answer, form_named, image_part, images};

/// Sends raw bytes, as no client would; returns the whole response.
fn raw(app: &TestApp, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(app.url.trim_start_matches("http://")).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    // A server that refuses may close the connection before everything is read.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn get_raw(app: &TestApp, path: &str, headers: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
    raw(app, request.as_bytes())
}

/// The path of a URL.
fn path_of(url: &str) -> &str {
    &url[url.find("/v1/").expect("it is a URL of this server")..]
}

/// Sends valid and invalid requests that contain every secret; returns the secrets.
async fn use_every_secret(app: &mut TestApp) -> Vec<String> {
    let admin = app.create_key("default", "read,generate,train,admin").await;
    let customer = app.create_key("acme", "read,generate,train").await;
    let mut secrets = vec![admin.clone(), customer.clone()];
    // A mistyped key is close to a valid one.
    for wrong in [
        format!("{}x", &customer[..customer.len() - 1]),
        format!("{customer}typo"),
        customer[5..].to_owned(),
    ] {
        app.key = Some(wrong.clone());
        assert_eq!(app.get("/v1/models").await.0, 401);
        secrets.push(wrong);
    }
    app.key = Some(admin);
    let (_, tenant) = app.get("/v1/admin/tenants/acme").await;
    secrets.push(
        tenant["webhook_secret"]
            .as_str()
            .unwrap()
            .trim_start_matches("whsec_")
            .to_owned(),
    );
    let (status, made) = app
        .post("/v1/admin/keys", json!({"tenant": "acme", "scopes": ["read"]}))
        .await;
    assert_eq!(status, 201, "{made}");
    secrets.push(made["secret"].as_str().unwrap().to_owned());

    app.key = Some(customer.clone());
    let prompt = "a red car of the confidential zebra";
    secrets.push("confidential zebra".to_owned());
    // Nothing listens there: the delivery fails, and the failure is logged.
    let hook = "http://127.0.0.1:9/hook?token=hookhookhook";
    secrets.push("hookhookhook".to_owned());
    let request = json!({"prompt": prompt, "webhook_url": hook});
    let (status, drawn) = app.post("/v1/generations", request.clone()).await;
    assert_eq!(status, 200, "{drawn}");
    let url = drawn["images"][0]["url"].as_str().unwrap().to_owned();
    let (path, signature) = url.split_once("signature=").unwrap();
    secrets.push(signature.to_owned());
    assert_eq!(app.client.get(&url).send().await.unwrap().status(), 200);
    let forged = format!("{path}signature={}", "0".repeat(64));
    assert_eq!(app.client.get(&forged).send().await.unwrap().status(), 404);
    for (path, body) in [
        ("/v1/images/generations", json!({"prompt": prompt, "size": "1x1"})),
        (
            "/v1/generations",
            json!({"prompt": prompt, "webhook_url": "ftp://u:hookhookhook@h/"}),
        ),
        ("/v1/generations", json!({"prompt": format!("{prompt} <nobody>")})),
        ("/v1/generations", json!({"prompt": prompt, "key": customer})),
    ] {
        let (status, body) = app.post(path, body).await;
        assert!((400..500).contains(&status), "{body}");
    }
    let broken = app
        .request(reqwest::Method::POST, "/v1/generations")
        .header("content-type", "application/json");
    assert_eq!(answer(broken.body(format!("{{\"prompt\": \"{prompt}"))).await.0, 400);
    // Keys in the wrong places.
    assert_eq!(app.get(&format!("/v1/models/{customer}")).await.0, 404);
    assert_eq!(app.get(&format!("/v1/models?api_key={customer}")).await.0, 200);
    let form = form_named(&REX, "rex").text("steps", "2").text("webhook_url", hook);
    let (status, body) = app.register(form).await;
    assert_eq!(status, 202, "{body}");
    let ended = app.until_ended(body["training"]["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    app.until("an attempt to deliver", || async {
        let log = std::fs::read_to_string(app.dir.path().join("server.log")).unwrap();
        log.contains("webhook failed").then_some(())
    })
    .await;
    secrets
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_gets_into_the_log_or_the_metrics() {
    let mut app = TestApp::start_logging("trace", &["--webhook-allow-private", "--training-previews", "0"]).await;
    let mut secrets = use_every_secret(&mut app).await;
    app.key = secrets.first().cloned();
    let metrics = app
        .request(reqwest::Method::GET, "/metrics")
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(metrics.contains("coar_images_total"));
    let log = app.terminate_and_read_log();
    let registry = Registry::open(&app.dir.path().join("data")).await.unwrap();
    let server = registry.server_secret().await.unwrap();
    secrets.push(coar::cluster::worker_token(&server));
    secrets.push(server);
    // The log covers all of that: at least one line for each request, and more than the default level.
    assert!(log.contains("/v1/generations") && log.contains("TRACE") && log.lines().count() > 100);
    for secret in secrets {
        let line = log.lines().chain(metrics.lines()).find(|line| line.contains(&secret));
        assert_eq!(line, None, "`{secret}` is shown");
    }
}

#[test]
fn passwords_of_database_and_bucket_are_not_shown() {
    let run = |arguments: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_coar"))
            .args(arguments)
            .args(["--data".as_ref(), dir.path().join("data").as_os_str()])
            .env("COAR_LOG", "trace")
            .env(
                "COAR_DATABASE",
                "postgres://coar:geheim@127.0.0.1:1/coar?connect_timeout=1",
            )
            .env("COAR_BLOBS", "s3://bucket/prefix")
            .env("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            .env("AWS_ACCESS_KEY_ID", "eingang")
            .env("AWS_SECRET_ACCESS_KEY", "schluessel")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        for secret in ["geheim", "schluessel"] {
            let line = said.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{arguments:?}");
        }
        said
    };
    assert!(run(&["config", "show"]).contains("postgres://coar:***@127.0.0.1:1/coar"));
    run(&["config", "check"]);
    run(&["serve", "--help"]);
    run(&["keys", "list"]);
    run(&["serve", "--listen", "127.0.0.1:0", "--role", "api"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_opens_no_other_image_no_longer_and_nothing_else() {
    let mut app = TestApp::start().await;
    let mut urls = Vec::new();
    for tenant in ["acme", "other"] {
        app.key = None;
        app.key = Some(app.create_key(tenant, "read,generate").await);
        let (status, drawn) = app.post("/v1/generations", json!({"prompt": "a red car"})).await;
        assert_eq!(status, 200, "{drawn}");
        urls.push(path_of(drawn["images"][0]["url"].as_str().unwrap()).to_owned());
    }
    app.key = None;
    let (one, query) = urls[0].split_once('?').unwrap();
    let (other, foreign) = urls[1].split_once('?').unwrap();
    let (expires, signature) = query.trim_start_matches("expires=").split_once("&signature=").unwrap();
    let later = expires.parse::<i64>().unwrap() + 3600;
    assert_eq!(app.get(&urls[0]).await.0, 200);
    for forged in [
        // The other tenant's image with the first one's signature, and vice versa.
        format!("{other}?{query}"),
        format!("{one}?{foreign}"),
        format!("{one}?expires={later}&signature={signature}"),
        format!("{one}?expires=+{expires}&signature={signature}"),
        format!("{one}?expires=0{expires}&signature={signature}"),
        format!("{one}?expires={expires}%0a&signature={signature}"),
        format!("{one}?expires={later}&expires={expires}&signature={signature}"),
        format!("{one}?expires={expires}&signature="),
        format!("{one}?expires={expires}&signature={}", &signature[..32]),
        format!("{one}?expires={expires}&signature={signature}00"),
        format!("{one}?signature={signature}"),
        format!("{one}.png?{query}"),
        format!("{}?{query}", one.trim_end_matches(".png")),
        format!("{}?{query}", one.replace(".png", ".jpg")),
        format!("{}?{query}", one.to_uppercase().replace("/V1/IMAGES/", "/v1/images/")),
    ] {
        let (status, body) = app.get(&forged).await;
        assert!(matches!(status, 400 | 401 | 404), "{status} {forged} {body}");
    }
    // A signature is no key either.
    for path in ["/v1/generations", "/v1/models", "/v1/admin/tenants"] {
        assert_eq!(app.get(&format!("{path}?{query}")).await.0, 401, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_lead_nowhere_else() {
    let app = TestApp::start().await;
    let secret = app.dir.path().join("data/coar.sqlite");
    assert!(secret.exists());
    for folder in [
        "/studio/",
        "/v1/images/",
        "/v1/concepts/",
        "/v1/trainings/",
        "/v1/generations/",
        "/",
        "/openapi.json/",
        "/docs/",
    ] {
        for up in [
            "../../../../../etc/passwd",
            "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
            "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
            "..%5c..%5cetc%5cpasswd",
            "%252e%252e%252fetc%252fpasswd",
            "..;/etc/passwd",
            "//etc/passwd",
            "%2fetc%2fpasswd",
            "%00",
            "app.js%00.png",
            "%c0%ae%c0%ae/etc/passwd",
            "../data/coar.sqlite",
            "..%2fcoar.sqlite",
        ] {
            let answer = get_raw(&app, &format!("{folder}{up}"), "");
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert!(
                status.starts_with('4') || status.starts_with('3'),
                "{folder}{up}: {answer}"
            );
            assert!(
                !answer.contains("root:") && !answer.contains("SQLite format"),
                "{folder}{up}"
            );
        }
    }
    // Names that look like paths, wherever a name is accepted.
    let training = app.register_subject(&REX, 1).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let file = app
        .request(reqwest::Method::GET, &format!("/v1/concepts/{}/weights", REX.name))
        .send()
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    let stored = app.blobs().len();
    for name in [
        "../x",
        "..",
        ".",
        "a/b",
        "a\\b",
        "%2e%2e",
        "x\0",
        "/etc/passwd",
        "-x",
        "x.safetensors",
        "con\r\n",
    ] {
        let query = reqwest::Url::parse_with_params("http://h/v1/concepts/import", [("name", name)]).unwrap();
        let path = format!("/v1/concepts/import?{}", query.query().unwrap());
        let send = app
            .request(reqwest::Method::POST, &path)
            .header("content-type", "application/octet-stream");
        assert_eq!(answer(send.body(file.clone())).await.0, 400, "{name:?}");
        let form = Form::new()
            .text("name", name)
            .text("kind", "style")
            .part("images", image_part(images(&REX, 1).remove(0)));
        assert_eq!(app.register(form).await.0, 400, "{name:?}");
    }
    assert_eq!(app.blobs().len(), stored);
}

/// They are refused before they use resources.
#[tokio::test(flavor = "multi_thread")]
async fn bombs_are_refused_and_take_no_memory() {
    let app = TestApp::start().await;
    let before = app.most_memory();
    let post = |path: &str| app.request(reqwest::Method::POST, path);
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!(
            "{{\"prompt\": \"a\", \"metadata\": {}0{}}}",
            open.repeat(100_000),
            close.repeat(100_000)
        );
        let send = post("/v1/generations")
            .header("content-type", "application/json")
            .body(deep);
        let (status, body) = answer(send).await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (400, &json!("invalid_json")),
            "{body}"
        );
    }
    // A million parts: the first one beyond the limit ends it.
    let part = b"--x\r\nContent-Disposition: form-data; name=\"captions\"\r\n\r\n\r\n";
    let parts = [&part.repeat(1_000_000)[..], b"--x--\r\n"].concat();
    let length = parts.len();
    let head = format!(
        "POST /v1/concepts HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let address = app.url.trim_start_matches("http://").to_owned();
    let status = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        // The server responds and closes while the client is still sending.
        let sent = stream.write_all(&parts);
        let mut answer = [0; 12];
        let _ = stream.read_exact(&mut answer);
        (sent.is_ok(), String::from_utf8_lossy(&answer).into_owned())
    })
    .await
    .unwrap();
    assert!(!status.0 || status.1 == "HTTP/1.1 400", "{status:?}");
    // A part whose head never ends, and images that decompress to more than the limit.
    let endless = [
        &b"--x\r\nContent-Disposition: form-data; name=\""[..],
        &vec![b'a'; 8 << 20],
    ]
    .concat();
    let send = post("/v1/concepts")
        .header("content-type", "multipart/form-data; boundary=x")
        .body(endless);
    assert_eq!(answer(send).await.0, 400);
    for bomb in [compressed_text(), frames_in_frames()] {
        let form = Form::new()
            .text("name", "rex")
            .text("kind", "style")
            .part("images", image_part(bomb));
        let (status, body) = app.register(form).await;
        assert_eq!(status, 400, "{body}");
    }
    assert_eq!(app.get("/livez").await.0, 200);
    let taken = app.most_memory().saturating_sub(before);
    assert!(taken < 192 << 20, "{taken} bytes");
}

fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [&kind[..], data].concat();
    let crc = body.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    });
    [&(data.len() as u32).to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

/// A PNG header of one pixel with a colour profile of 128 MiB of zeros, deflated by hand to 800 KiB, and no pixels.
fn compressed_text() -> Vec<u8> {
    // One block with fixed codes: a zero, then runs of 258 at distance 1 (code 285 is 11000101, distance 0 is 00000).
    let mut bits: Vec<bool> = Vec::new();
    bits.extend([true, true, false]);
    bits.extend([false, false, true, true, false, false, false, false]);
    for _ in 0..(128usize << 20) / 258 {
        bits.extend([
            true, true, false, false, false, true, false, true, false, false, false, false, false,
        ]);
    }
    bits.extend([false; 7]);
    let packed = bits
        .chunks(8)
        .map(|byte| byte.iter().rev().fold(0, |all, &bit| all << 1 | u8::from(bit)));
    let profile = [&b"icc\0\0\x78\x9c"[..], &packed.collect::<Vec<u8>>()].concat();
    let header = [&1u32.to_be_bytes()[..], &1u32.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        png_chunk(b"IHDR", &header),
        png_chunk(b"iCCP", &profile),
        png_chunk(b"IEND", &[]),
    ]
    .concat()
}

/// A WebP animation with nested frames.
fn frames_in_frames() -> Vec<u8> {
    let depth = 200_000u32;
    let frame = |level: u32| [&b"ANMF"[..], &(24 * (depth - level) - 8).to_le_bytes(), &[0; 16]].concat();
    let frames: Vec<u8> = (0..depth).flat_map(frame).collect();
    [&b"RIFF"[..], &(frames.len() as u32 + 4).to_le_bytes(), b"WEBP", &frames].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_are_not_made_of_what_callers_send() {
    let app = TestApp::start().await;
    let id_of = |answer: &str| {
        let line = answer
            .lines()
            .find(|line| line.to_lowercase().starts_with("x-request-id:"));
        line.and_then(|line| line.split_once(": "))
            .map(|(_, id)| id.to_owned())
            .unwrap()
    };
    let plain = get_raw(&app, "/livez", "X-Request-Id: mine-1.2:3_4\r\n");
    assert_eq!(id_of(&plain), "mine-1.2:3_4");
    let long = "a".repeat(129);
    for id in [
        "a b", "a\tb", "<script>", "a;b", "a,b", "\u{fc}", "", &long, "a\"b", "{}",
    ] {
        let answer = get_raw(&app, "/livez", &format!("X-Request-Id: {id}\r\n"));
        assert!(uuid::Uuid::try_parse(&id_of(&answer)).is_ok(), "{id:?}: {answer}");
    }
    // A header inside a value, in encodings that some servers decode.
    for line_end in ["%0d%0a", "%0a", "%0d", "%E5%98%8A%E5%98%8D", "\\r\\n"] {
        let inject = format!("x{line_end}X-Injected:%201");
        for path in [
            format!("/v1/concepts/{inject}"),
            format!("/v1/concepts/{inject}/weights"),
            format!("/v1/images/{inject}.png?expires={inject}&signature={inject}"),
            format!("/studio/{inject}"),
            format!("/v1/concepts?after={inject}&limit={inject}"),
        ] {
            let answer = get_raw(&app, &path, "");
            let head = answer.split("\r\n\r\n").next().unwrap().to_lowercase();
            assert!(
                !head.contains("x-injected") && head.starts_with("http/1.1 4"),
                "{path}: {head}"
            );
        }
    }
    // The file name in `Content-Disposition` is the concept's name, also if it was requested by its id.
    let training = app.register_subject(&REX, 1).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let (_, concept) = app.get(&format!("/v1/concepts/{}", REX.name)).await;
    for name in [REX.name, concept["id"].as_str().unwrap()] {
        let answer = app
            .request(reqwest::Method::GET, &format!("/v1/concepts/{name}/weights"))
            .send()
            .await
            .unwrap();
        let wanted = format!("attachment; filename=\"{name}.safetensors\"");
        assert_eq!(answer.headers()["content-disposition"], wanted.as_str());
    }
    let hook = json!({"prompt": "a red car", "webhook_url": "http://127.0.0.1/\r\nX-Injected: 1"});
    assert_eq!(app.post("/v1/generations", hook).await.0, 400);
}

fn modes(dir: &Path, found: &mut Vec<(String, u32)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        found.push((
            entry.path().display().to_string(),
            entry.metadata().unwrap().permissions().mode() & 0o777,
        ));
        if entry.path().is_dir() {
            modes(&entry.path(), found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_folder_is_its_owners_alone() {
    let app = TestApp::start().await;
    let (status, drawn) = app.post("/v1/generations", json!({"prompt": "a red car"})).await;
    assert_eq!(status, 200, "{drawn}");
    let mut found = Vec::new();
    modes(app.dir.path(), &mut found);
    let data = app.dir.path().join("data").display().to_string();
    found.retain(|(path, _)| path.starts_with(&data));
    assert!(
        found.iter().any(|(path, _)| path.ends_with("coar.sqlite")) && found.len() > 5,
        "{found:?}"
    );
    for (path, mode) in &found {
        assert_eq!(mode & 0o077, 0, "{path} {mode:o}");
    }
    // Also in a folder that already existed with wider permissions.
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o755)).unwrap();
    let key = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["keys", "create", "--tenant", "acme", "--data"])
        .arg(&data)
        .output()
        .unwrap();
    assert!(key.status.success());
    let mut found = Vec::new();
    modes(&data, &mut found);
    assert!(found.iter().all(|(_, mode)| mode & 0o077 == 0), "{found:?}");
}

/// Keys are compared by hash and in constant time; no other test would notice a different comparison.
#[test]
fn secrets_are_compared_in_constant_time() {
    let source = |file: &str| {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap();
        text.split("#[cfg(test)]").next().unwrap().to_owned()
    };
    let keys = source("service/keys.rs");
    assert!(keys.contains("content_hash(text.as_bytes()).as_bytes().ct_eq(key.hash.as_bytes())"));
    assert_eq!(keys.matches(".hash").count(), 1, "another place looks at a key's hash");
    assert!(source("cluster/worker.rs").contains("given.as_bytes().ct_eq(worker_token(secret).as_bytes())"));
    assert!(source("service/links.rs").contains(".verify_slice(&signature)"));
}
