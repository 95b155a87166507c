//! Keys, scopes, and the isolation of tenants.

use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Events, REX, TestApp, answer, subject_form};

fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or("")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_tenant_sees_the_same_bytes_as_for_something_unknown() {
    let mut app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let (_, drawn) = app
        .post(
            "/v1/images/generations",
            json!({"prompt": "a <rex> cat", "n": 1, "response_format": "url"}),
        )
        .await;
    let url = drawn["data"][0]["url"].as_str().unwrap();
    let image = url
        .strip_prefix(app.url.as_str())
        .unwrap()
        .split('?')
        .next()
        .unwrap()
        .to_owned();
    let key = app.create_key("acme", "read,generate,train").await;
    let home = app.create_key("default", "read,generate,train").await;
    app.key = Some(key);
    let unknown = "training_01990000000070008000000000000000";
    let bytes = |method: Method, path: String, id: &'static str| {
        let request = app.request(method, &path).header("x-request-id", "same");
        async move {
            let response = request.send().await.unwrap();
            let status = response.status().as_u16();
            (status, response.text().await.unwrap().replace(id, "ID"))
        }
    };
    for (method, path) in [
        (Method::GET, "/v1/trainings/ID"),
        (Method::POST, "/v1/trainings/ID/cancel"),
    ] {
        let id: &'static str = training.clone().leak();
        let foreign = bytes(method.clone(), path.replace("ID", id), id).await;
        let absent = bytes(method, path.replace("ID", unknown), unknown).await;
        assert_eq!((foreign.0, &foreign.1), (404, &absent.1));
    }
    for (method, path) in [
        (Method::GET, "/v1/concepts/ID"),
        (Method::DELETE, "/v1/concepts/ID"),
        (Method::GET, "/v1/concepts/ID/weights"),
    ] {
        let foreign = bytes(method.clone(), path.replace("ID", "rex"), "rex").await;
        let absent = bytes(method, path.replace("ID", "max"), "max").await;
        assert_eq!((foreign.0, &foreign.1), (404, &absent.1));
    }
    assert_eq!(app.get(&image).await.0, 404);
    let (status, body) = app
        .post("/v1/images/generations", json!({"prompt": "a <rex> cat"}))
        .await;
    assert_eq!((status, code(&body)), (404, "concept_not_found"));
    let (_, listed) = app.get("/v1/concepts").await;
    assert_eq!(listed["data"], json!([]));
    // The name is free for another tenant, and the first one's concept still exists.
    let (status, body) = app.register(subject_form(&REX).text("steps", "2")).await;
    assert_eq!(status, 202, "{body}");
    app.key = Some(home);
    let (status, body) = app.get("/v1/concepts/rex").await;
    assert_eq!((status, body["status"].as_str()), (200, Some("ready")));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_needed_once_there_is_one_and_allow_what_their_scopes_say() {
    let mut app = TestApp::start().await;
    assert_eq!(app.get("/v1/models").await.0, 200);
    let admin = app.create_key("default", "admin").await;
    let response = app.client.get(format!("{}/v1/models", app.url)).send().await.unwrap();
    assert_eq!(response.headers()["www-authenticate"], "Bearer");
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        (code(&body), body["error"]["type"].as_str()),
        ("invalid_api_key", Some("authentication_error"))
    );
    assert_eq!(app.get("/readyz").await.0, 200);
    app.key = Some(admin);
    let (status, body) = app.get("/v1/models").await;
    assert_eq!((status, code(&body)), (403, "missing_scope"));
    let (status, tenant) = app
        .post("/v1/admin/tenants", json!({"name": "acme", "quotas": {"concepts": 3}}))
        .await;
    assert_eq!(
        (status, tenant["quotas"]["concepts"].as_u64()),
        (201, Some(3)),
        "{tenant}"
    );
    let (status, body) = app.post("/v1/admin/tenants", json!({"name": "acme"})).await;
    assert_eq!((status, code(&body)), (409, "name_taken"));
    let change = app.request(Method::PATCH, "/v1/admin/tenants/acme");
    let (status, tenant) = answer(change.json(&json!({"quotas": {"concepts": null, "trainings": 1}}))).await;
    assert_eq!(
        (status, &tenant["quotas"]["concepts"], &tenant["quotas"]["trainings"]),
        (200, &Value::Null, &json!(1))
    );
    for (body, expected) in [
        (json!({"tenant": "nobody"}), (404, "tenant_not_found")),
        (json!({"tenant": "acme", "scopes": ["all"]}), (400, "invalid_value")),
        (json!({"tenant": "acme", "scopes": []}), (400, "invalid_value")),
        (json!({"tenant": "acme", "expires_in_days": 0}), (400, "invalid_value")),
        (json!({"tenant": "acme", "colour": 1}), (400, "unknown_parameter")),
        (json!({}), (400, "missing_parameter")),
    ] {
        let (status, answer) = app.post("/v1/admin/keys", body.clone()).await;
        assert_eq!((status, code(&answer)), expected, "{body}");
    }
    let (status, made) = app
        .post(
            "/v1/admin/keys",
            json!({"tenant": "acme", "scopes": ["read"], "name": "shop"}),
        )
        .await;
    assert_eq!(status, 201, "{made}");
    let reader = made["secret"].as_str().unwrap().to_owned();
    let (_, first) = app.get("/v1/admin/keys?limit=1").await;
    assert_eq!(
        (first["data"][0]["id"].as_str(), first["has_more"].as_bool()),
        (made["id"].as_str(), Some(true))
    );
    assert!(first["data"][0].get("secret").is_none());
    let after = made["id"].as_str().unwrap();
    let (_, second) = app.get(&format!("/v1/admin/keys?after={after}")).await;
    assert_eq!(
        (second["data"].as_array().unwrap().len(), second["has_more"].as_bool()),
        (1, Some(false))
    );
    assert_eq!(app.get("/v1/admin/keys?limit=0").await.0, 400);
    assert_eq!(app.get("/v1/admin/keys?after=rex").await.0, 400);
    let admin = app.key.replace(reader);
    assert_eq!(app.get("/v1/concepts").await.0, 200);
    let (status, body) = app.post("/v1/images/generations", json!({"prompt": "a cat"})).await;
    assert_eq!((status, code(&body)), (403, "missing_scope"));
    assert_eq!(app.get("/v1/admin/tenants").await.0, 403);
    let reader = std::mem::replace(&mut app.key, admin);
    assert_eq!(app.delete("/v1/admin/tenants/default").await, 409);
    assert_eq!(app.delete("/v1/admin/tenants/acme").await, 204);
    app.key = reader;
    app.until("the end of a deleted tenant's key", || async {
        (app.get("/v1/concepts").await.0 == 401).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_on_the_command_line_acts_within_a_second() {
    let mut app = TestApp::start().await;
    let key = app.create_key("acme", "read").await;
    app.key = Some(key.clone());
    assert_eq!(app.get("/v1/models").await.0, 200);
    let listed = app.coar(&["keys", "list"]);
    let row = listed.lines().find(|line| line.contains("acme")).unwrap();
    assert!(!listed.contains(key.rsplit('_').next().unwrap()), "{listed}");
    app.coar(&["keys", "revoke", row.split(' ').next().unwrap()]);
    let begun = Instant::now();
    app.until("the refusal", || async {
        (app.get("/v1/models").await.0 == 401).then_some(())
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    // Keys are still required after the last one is revoked.
    app.key = None;
    assert_eq!(app.get("/v1/models").await.0, 401);
}

/// Runs the program on this server's data folder; returns whether it succeeded, and its output.
fn run(app: &TestApp, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(arguments)
        .arg("--data")
        .arg(app.dir.path().join("data"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_a_scope_of_their_own() {
    let mut app = TestApp::start().await;
    let status = async |app: &TestApp| app.get("/metrics").await.0;
    // Without keys the server can be reached only from this machine.
    assert_eq!(status(&app).await, 200);
    let reader = app.create_key("acme", "read,generate,train").await;
    // Loopback needs a key too: a proxy on this machine connects from there.
    assert_eq!(status(&app).await, 401);
    app.key = Some(reader);
    let (refused, body) = app.get("/metrics").await;
    assert_eq!((refused, code(&body)), (403, "missing_scope"));
    app.key = Some(app.create_key("default", "admin").await);
    assert_eq!(status(&app).await, 200);
    let (made, monitor) = app
        .post("/v1/admin/keys", json!({"tenant": "default", "scopes": ["metrics"]}))
        .await;
    assert_eq!((made, &monitor["scopes"]), (201, &json!(["metrics"])));
    app.key = monitor["secret"].as_str().map(str::to_owned);
    assert_eq!(status(&app).await, 200);
    for path in ["/v1/concepts", "/v1/models", "/v1/admin/keys", "/v1/admin/tenants"] {
        assert_eq!(app.get(path).await.0, 403, "{path}");
    }
    app.key = None;
    let open = TestApp::start_with(&["--metrics-open"]).await;
    open.create_key("acme", "read").await;
    assert_eq!(status(&open).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_waits_end_with_their_key() {
    let mut app = TestApp::start_with(&["--rows", "2", "--training-previews", "0"]).await;
    let admin = app.create_key("default", "admin").await;
    let owner = app.create_key("acme", "read,generate,train").await;
    let watcher = app.create_key("acme", "read").await;
    app.key = Some(owner.clone());
    let training = app.register_subject(&REX, 20_000).await;
    // Enough generations that the last one waits for a long time.
    let mut last = Value::Null;
    for _ in 0..12 {
        let send = app
            .request(Method::POST, "/v1/generations")
            .header("prefer", "respond-async")
            .json(&json!({"prompt": "a red car", "n": 10}));
        let (status, queued) = answer(send).await;
        assert_eq!(status, 202, "{queued}");
        last = queued["id"].clone();
    }
    app.key = Some(watcher.clone());
    let follow = app.request(Method::GET, &format!("/v1/trainings/{training}/events"));
    let mut events = Events::open(follow).await;
    assert_eq!(events.next().await.unwrap().0, "progress");
    let wait = app.request(
        Method::GET,
        &format!("/v1/generations/{}?wait=60", last.as_str().unwrap()),
    );
    let waiting = tokio::spawn(answer(wait));
    app.key = Some(admin);
    let (_, keys) = app.get("/v1/admin/keys").await;
    let begins = &watcher[.."coar_12345678".len()];
    let keys = keys["data"].as_array().unwrap();
    let key = keys.iter().find(|key| key["prefix"] == begins).unwrap();
    let path = format!("/v1/admin/keys/{}", key["id"].as_str().unwrap());
    assert_eq!(app.delete(&path).await, 204);
    let mut told = vec![];
    while let Some((name, _)) = events.next().await {
        told.push(name);
    }
    assert!(told.iter().all(|name| name == "progress"), "{told:?}");
    let (status, body) = waiting.await.unwrap();
    assert_eq!((status, code(&body)), (401, "invalid_api_key"), "{body}");
    // The training and the generation continue: they belong to the tenant.
    app.key = Some(owner);
    let (_, training) = app.get(&format!("/v1/trainings/{training}")).await;
    assert!(
        ["queued", "running"].contains(&training["status"].as_str().unwrap()),
        "{training}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn web_hook_secrets_are_shown_where_they_are_asked_for() {
    let mut app = TestApp::start().await;
    let create = |more: &[&str]| {
        let command = [&["keys", "create", "--tenant", "acme", "--scopes", "admin"][..], more].concat();
        let (done, told) = run(&app, &command);
        assert!(done, "{told}");
        told
    };
    let first = create(&[]);
    assert!(first.contains("whsec_"), "{first}");
    let second = create(&[]);
    assert!(!second.contains("whsec_"), "{second}");
    assert!(create(&["--show-webhook-secret"]).contains("whsec_"));
    let key = second
        .lines()
        .find(|line| line.starts_with("coar_"))
        .unwrap()
        .to_owned();
    app.key = Some(key);
    for (method, path, body) in [
        (Method::GET, "/v1/admin/tenants", None),
        (Method::GET, "/v1/admin/tenants/acme", None),
        (Method::PATCH, "/v1/admin/tenants/acme", Some(json!({"quotas": {}}))),
        (Method::POST, "/v1/admin/tenants", Some(json!({"name": "globex"}))),
        (Method::POST, "/v1/admin/tenants/acme/webhook-secret", None),
    ] {
        let request = app.request(method.clone(), path);
        let request = match &body {
            Some(body) => request.json(body),
            None => request,
        };
        let response = request.send().await.unwrap();
        assert!(response.status().is_success(), "{method} {path}");
        assert_eq!(response.headers()["cache-control"], "no-store", "{method} {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_secret_is_changed_while_it_runs() {
    let app = TestApp::start().await;
    let draw = async || {
        let (status, drawn) = app.post("/v1/generations", json!({"prompt": "a red car"})).await;
        assert_eq!(status, 200, "{drawn}");
        drawn["images"][0]["url"].as_str().unwrap().to_owned()
    };
    let status = async |url: &str| app.client.get(url).send().await.unwrap().status().as_u16();
    let before = draw().await;
    assert_eq!(status(&before).await, 200);
    app.coar(&["admin", "rotate-secret"]);
    assert_eq!(status(&before).await, 200);
    // After a leak, nothing that was signed before is accepted.
    app.coar(&["admin", "rotate-secret", "--accept-old-for", "0"]);
    app.until("the end of the old address", || async {
        (status(&before).await == 404).then_some(())
    })
    .await;
    let after = draw().await;
    assert_ne!(after.rsplit_once('=').unwrap().1, before.rsplit_once('=').unwrap().1);
    assert_eq!(status(&after).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_tenants_of_all_keys_opens_nothing() {
    let mut app = TestApp::start().await;
    let one = app.create_key("one", "admin").await;
    let two = app.create_key("two", "admin").await;
    for key in [&one, &two] {
        app.key = Some(key.clone());
        assert_eq!(app.get("/v1/admin/keys").await.0, 200);
    }
    // The server has cached both keys; the second belongs to a deleted tenant.
    app.key = Some(one.clone());
    assert_eq!(app.delete("/v1/admin/tenants/two").await, 204);
    app.key = Some(two);
    assert_eq!(app.delete("/v1/admin/tenants/one").await, 401);
    app.key = None;
    assert_eq!(app.get("/v1/admin/tenants").await.0, 401);
    // On the command line, with the server stopped.
    app.terminate_and_read_log();
    let (done, told) = run(&app, &["admin", "delete-tenant", "one", "--yes"]);
    assert!(!done && told.contains("--including-the-last-admin-key"), "{told}");
    let all = [
        "admin",
        "delete-tenant",
        "one",
        "--yes",
        "--including-the-last-admin-key",
    ];
    let (done, told) = run(&app, &all);
    assert!(done, "{told}");
    app.kill_nine_and_restart().await;
    for path in ["/v1/admin/tenants", "/v1/admin/keys", "/v1/models"] {
        assert_eq!(app.get(path).await.0, 401, "{path}");
    }
    // A new key restores access.
    app.key = Some(app.create_key("three", "admin").await);
    assert_eq!(app.get("/v1/admin/tenants").await.0, 200);
}

#[test]
fn without_keys_only_loopback_is_listened_on() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["serve", "--listen", "0.0.0.0:0", "--data"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("coar keys create --tenant NAME"), "{told}");
    assert!(output.stdout.is_empty());
}
