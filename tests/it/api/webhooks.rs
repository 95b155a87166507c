//! Webhooks, received by a server in the test.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::support::{REX, TestApp, answer, subject_form};

/// Received requests, and the responses to the next ones.
#[derive(Debug, Default)]
struct Inbox {
    came: Mutex<Vec<(HeaderMap, String)>>,
    answers: Mutex<Vec<StatusCode>>,
}

async fn take(State(inbox): State<Arc<Inbox>>, headers: HeaderMap, body: String) -> Response {
    inbox.came.lock().unwrap().push((headers, body));
    let next = inbox.answers.lock().unwrap().pop().unwrap_or(StatusCode::NO_CONTENT);
    // A client that followed the redirect would send a second request, which the test would notice.
    (next, [(header::LOCATION, "/elsewhere")]).into_response()
}

async fn receiver(answers: &[StatusCode]) -> (String, Arc<Inbox>) {
    let inbox = Arc::new(Inbox::default());
    inbox.answers.lock().unwrap().extend(answers.iter().rev());
    let router = Router::new()
        .route("/hook", post(take))
        .fallback(take)
        .with_state(inbox.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, inbox)
}

fn verify(secret: &str, headers: &HeaderMap, body: &str) {
    let text = |name: &str| headers[name].to_str().unwrap().to_owned();
    let (id, timestamp) = (text("webhook-id"), text("webhook-timestamp"));
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    let wanted = format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
    let given = text("webhook-signature");
    assert!(given.split(' ').any(|given| given == wanted), "{given}");
    assert!(timestamp.parse::<i64>().unwrap() > 1_700_000_000);
}

async fn came(app: &TestApp, inbox: &Inbox, count: usize) -> Vec<(HeaderMap, String)> {
    app.until("the webhook", || async {
        let came = inbox.came.lock().unwrap().clone();
        (came.len() >= count).then_some(came)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_told_signed_and_again_until_they_are_taken() {
    let mut app = TestApp::start_with(&["--webhook-allow-private"]).await;
    let (_, tenant) = app.get("/v1/admin/tenants/default").await;
    let secret = tenant["webhook_secret"].as_str().unwrap().to_owned();
    // The first response is a redirect, which is not followed but counts as a failure.
    let (url, inbox) = receiver(&[StatusCode::FOUND]).await;
    let request = json!({"prompt": "a red car", "webhook_url": url, "metadata": {"order": "7"}});
    let send = app
        .request(reqwest::Method::POST, "/v1/generations")
        .header("prefer", "respond-async");
    let (status, queued) = answer(send.json(&request)).await;
    assert_eq!(status, 202, "{queued}");
    came(&app, &inbox, 1).await;
    // Due deliveries survive the process.
    app.kill_nine_and_restart().await;
    let came = came(&app, &inbox, 2).await;
    for (headers, body) in &came {
        verify(&secret, headers, body);
        assert_eq!(headers["content-type"], "application/json");
    }
    assert_eq!(came[0].0["webhook-id"], came[1].0["webhook-id"]);
    assert_eq!(came[0].1, came[1].1);
    let told: Value = serde_json::from_str(&came[0].1).unwrap();
    assert_eq!(told["type"], "generation.succeeded");
    assert!(told["timestamp"].as_str().unwrap().ends_with('Z'));
    let data = &told["data"];
    assert_eq!((&data["id"], &data["status"]), (&queued["id"], &json!("succeeded")));
    assert_eq!(data["metadata"], json!({"order": "7"}));
    let url = data["images"][0]["url"].as_str().unwrap();
    let path = &url[url.find("/v1/images/").unwrap()..];
    assert_eq!(
        app.client
            .get(format!("{}{path}", app.url))
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_secret_and_the_one_before_it_both_sign_for_a_while() {
    let app = TestApp::start_with(&["--webhook-allow-private"]).await;
    let (_, tenant) = app.get("/v1/admin/tenants/default").await;
    let path = "/v1/admin/tenants/default/webhook-secret";
    let (status, changed) = app.post(path, json!({"keep_old_hours": 1})).await;
    assert_eq!(status, 200, "{changed}");
    let secret = |tenant: &Value| tenant["webhook_secret"].as_str().unwrap().to_owned();
    let (old, new) = (secret(&tenant), secret(&changed));
    assert_ne!(old, new);
    let (url, inbox) = receiver(&[]).await;
    let send = json!({"prompt": "a red car", "webhook_url": url});
    assert_eq!(app.post("/v1/generations", send.clone()).await.0, 200);
    let both = came(&app, &inbox, 1).await;
    for secret in [&old, &new] {
        verify(secret, &both[0].0, &both[0].1);
    }
    // On the command line, with immediate effect.
    let newest = app.coar(&["admin", "rotate-webhook-secret", "default", "--keep-old-for", "0"]);
    assert_eq!(app.post("/v1/generations", send).await.0, 200);
    let one = came(&app, &inbox, 2).await;
    verify(newest.trim(), &one[1].0, &one[1].1);
    assert!(!one[1].0["webhook-signature"].to_str().unwrap().contains(' '));
    let (status, body) = app.post(path, json!({"keep_old_hours": 721})).await;
    assert_eq!((status, body["error"]["param"].as_str()), (400, Some("keep_old_hours")));
    let missing = app.post("/v1/admin/tenants/unknown/webhook-secret", json!({})).await;
    assert_eq!(missing.1["error"]["code"], "tenant_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_is_told_too_and_inside_addresses_are_refused() {
    let app = TestApp::start_with(&["--webhook-allow-private", "--rows", "2"]).await;
    let (url, inbox) = receiver(&[]).await;
    let request = json!({"prompt": "a red car", "n": 10, "webhook_url": url});
    let send = app
        .request(reqwest::Method::POST, "/v1/generations")
        .header("prefer", "respond-async");
    let (_, queued) = answer(send.json(&request)).await;
    let id = queued["id"].as_str().unwrap();
    assert_eq!(
        app.post(&format!("/v1/generations/{id}/cancel"), json!({})).await.0,
        200
    );
    let told = came(&app, &inbox, 1).await;
    let told: Value = serde_json::from_str(&told[0].1).unwrap();
    assert_eq!(
        (&told["type"], &told["data"]["id"]),
        (&json!("generation.cancelled"), &json!(id))
    );
    drop(app);

    let app = TestApp::start().await;
    let request = json!({"prompt": "a red car", "webhook_url": url});
    let (status, body) = app.post("/v1/generations", request).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("webhook_url")));
    // Host names are resolved when the delivery connects: this one is accepted, but never delivered.
    let request = json!({"prompt": "a red car", "webhook_url": "http://localhost/"});
    assert_eq!(app.post("/v1/generations", request).await.0, 200);
    assert_eq!(inbox.came.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_training_is_told_once_even_after_a_crash() {
    let mut app = TestApp::start_with(&["--webhook-allow-private", "--training-previews", "0"]).await;
    let (url, inbox) = receiver(&[]).await;
    let form = subject_form(&REX).text("steps", "3").text("webhook_url", url);
    let (status, concept) = app.register(form).await;
    assert_eq!(status, 202, "{concept}");
    let training = concept["training"]["id"].as_str().unwrap();
    let ended = app.until_ended(training).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let told = came(&app, &inbox, 1).await;
    let told: Value = serde_json::from_str(&told[0].1).unwrap();
    assert_eq!(told["type"], "training.succeeded");
    assert_eq!(
        (&told["data"]["id"], &told["data"]["status"]),
        (&json!(training), &json!("succeeded"))
    );
    // A new process looks for ended trainings without a delivery: there are none.
    app.kill_nine_and_restart().await;
    assert_eq!(app.post("/v1/generations", json!({"prompt": "a red car"})).await.0, 200);
    assert_eq!(inbox.came.lock().unwrap().len(), 1);
}

/// Accepts connections and never responds; counts the connections.
async fn tarpit() -> (String, Arc<Mutex<usize>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let count = Arc::new(Mutex::new(0));
    let counter = count.clone();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            *counter.lock().unwrap() += 1;
            held.push(stream);
        }
    });
    (url, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_never_answers_delays_no_other_tenant() {
    let mut app = TestApp::start_with(&["--webhook-allow-private", "--rows", "2"]).await;
    let key = app.create_key("a", "read,generate").await;
    let other = app.create_key("b", "read,generate").await;
    let (stuck, tries) = tarpit().await;
    let queue = async |app: &TestApp, url: &str| {
        let request = json!({"prompt": "a red car", "n": 10, "webhook_url": url});
        let send = app
            .request(reqwest::Method::POST, "/v1/generations")
            .header("prefer", "respond-async");
        let (status, queued) = answer(send.json(&request)).await;
        assert_eq!(status, 202, "{queued}");
        let path = format!("/v1/generations/{}/cancel", queued["id"].as_str().unwrap());
        assert_eq!(app.post(&path, json!({})).await.0, 200);
    };
    app.key = Some(key);
    for _ in 0..24 {
        queue(&app, &stuck).await;
    }
    app.until("a delivery that hangs", || async {
        (*tries.lock().unwrap() > 0).then_some(())
    })
    .await;
    app.key = Some(other);
    let (url, inbox) = receiver(&[]).await;
    queue(&app, &url).await;
    came(&app, &inbox, 1).await;
    // Of 24 due deliveries two have been tried concurrently, and none since, because of the pause.
    let tries = *tries.lock().unwrap();
    assert!(tries <= 4, "{tries} deliveries to the other receiver came first");
}
