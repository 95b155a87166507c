//! Quotas of tenants, and their refusals.

use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use crate::support::{REX, TestApp, answer, form_named};

/// Status, headers and body.
async fn draw(app: &TestApp, body: Value) -> (u16, HeaderMap, Value) {
    let request = app.request(reqwest::Method::POST, "/v1/images/generations");
    let response = request.json(&body).send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    (status, headers, response.json().await.unwrap())
}

fn refusal(body: &Value) -> (&str, &str, u64) {
    let error = &body["error"];
    let text = |key: &str| error[key].as_str().unwrap_or("");
    (text("code"), text("param"), error["limit"].as_u64().unwrap_or(0))
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    let text = headers
        .get(name)
        .unwrap_or_else(|| panic!("no {name} in {headers:?}"))
        .to_str()
        .unwrap();
    text.trim_end_matches('s').parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn concepts_and_trainings_are_counted_for_each_tenant() {
    let mut app = TestApp::start_with(&["--quota-concepts=2", "--quota-trainings=1"]).await;
    let training = app.register_subject(&REX, 5000).await;
    let request = app.request(reqwest::Method::POST, "/v1/concepts");
    let response = request.multipart(named("second")).send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert!((1..=120).contains(&number(response.headers(), "retry-after")));
    let body: Value = response.json().await.unwrap();
    assert_eq!(refusal(&body), ("quota_exceeded", "trainings", 1));
    assert_eq!(body["error"]["type"], "rate_limit_error");
    let (status, _) = app.post(&format!("/v1/trainings/{training}/cancel"), json!({})).await;
    assert_eq!(status, 200);
    let (status, body) = app.register(named("second")).await;
    assert_eq!(status, 202, "{body}");
    let (status, body) = app.register(named("third")).await;
    assert_eq!((status, refusal(&body)), (429, ("quota_exceeded", "concepts", 2)));
    assert_eq!(app.get("/v1/concepts/third").await.0, 404);
    // Another tenant has its own quotas, and an administrator may change them: 0 means unlimited.
    app.key = Some(app.create_key("acme", "read,train,admin").await);
    let (status, body) = app.register(named("first")).await;
    assert_eq!(status, 202, "{body}");
    assert_eq!(app.register(named("second")).await.0, 429);
    let change = app.request(reqwest::Method::PATCH, "/v1/admin/tenants/acme");
    let quotas = json!({"quotas": {"concepts": 0, "trainings": 3}});
    assert_eq!(answer(change.json(&quotas)).await.0, 200);
    for name in ["second", "third"] {
        let (status, body) = app.register(named(name)).await;
        assert_eq!(status, 202, "{body}");
    }
    let (status, body) = app.register(named("fourth")).await;
    assert_eq!((status, refusal(&body)), (429, ("quota_exceeded", "trainings", 3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_requests_cannot_both_take_the_last_place() {
    let app = TestApp::start_with(&["--quota-concepts=1"]).await;
    let names = ["a", "b", "c", "d", "e", "f"];
    let answers = futures::future::join_all(names.map(|name| app.register(named(name)))).await;
    let taken = answers.iter().filter(|(status, _)| *status == 202).count();
    assert_eq!(taken, 1, "{answers:?}");
    assert!(answers.iter().all(|(status, _)| [202, 429].contains(status)));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_counted_by_the_minute_and_the_headers_say_how_many_are_left() {
    let app = TestApp::start_with(&["--quota-pictures-per-minute=3", "--quota-requests-in-flight=4"]).await;
    // A request that cannot be drawn does not count.
    let (status, headers, _) = draw(&app, json!({"prompt": "a <nobody> cat", "n": 3})).await;
    assert_eq!((status, number(&headers, "x-ratelimit-remaining-images")), (404, 3));
    let (status, headers, body) = draw(&app, json!({"prompt": "a cat", "n": 2})).await;
    assert_eq!(status, 200, "{body}");
    let of = |name: &str| number(&headers, name);
    assert_eq!(
        (of("x-ratelimit-limit-images"), of("x-ratelimit-remaining-images")),
        (3, 1)
    );
    assert!((1..=60).contains(&of("x-ratelimit-reset-images")));
    assert_eq!(
        (of("x-ratelimit-limit-requests"), of("x-ratelimit-remaining-requests")),
        (4, 4)
    );
    assert_eq!(of("x-ratelimit-reset-requests"), 0);
    let (status, headers, body) = draw(&app, json!({"prompt": "a cat", "n": 2})).await;
    assert_eq!(
        (status, refusal(&body)),
        (429, ("quota_exceeded", "pictures_per_minute", 3))
    );
    assert!((1..=60).contains(&number(&headers, "retry-after")));
    assert_eq!(number(&headers, "x-ratelimit-remaining-images"), 1);
    let (status, _, body) = draw(&app, json!({"prompt": "a cat", "n": 4})).await;
    assert_eq!((status, refusal(&body)), (400, ("quota_exceeded", "n", 3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_are_counted_until_they_end() {
    let app = TestApp::start_with(&["--quota-requests-in-flight=1"]).await;
    let all = (0..4).map(|_| draw(&app, json!({"prompt": "a cat", "n": 4})));
    let answers = futures::future::join_all(all).await;
    let drawn = answers.iter().filter(|(status, ..)| *status == 200).count();
    assert!((1..4).contains(&drawn), "{answers:?}");
    for (_, headers, body) in answers.iter().filter(|(status, ..)| *status != 200) {
        assert_eq!(refusal(body), ("quota_exceeded", "requests_in_flight", 1));
        assert_eq!(number(headers, "retry-after"), 1);
    }
    let (status, _, body) = draw(&app, json!({"prompt": "a cat"})).await;
    assert_eq!(status, 200, "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_process_has_queued_counts() {
    let mut app = TestApp::start_with(&["--quota-requests-in-flight=2"]).await;
    let mut paths = Vec::new();
    for _ in 0..2 {
        let request = app
            .request(reqwest::Method::POST, "/v1/generations")
            .header("prefer", "respond-async");
        let (status, queued) = answer(request.json(&json!({"prompt": "a cat", "n": 10}))).await;
        assert_eq!(status, 202, "{queued}");
        paths.push(format!("/v1/generations/{}", queued["id"].as_str().unwrap()));
    }
    app.kill_nine_and_restart().await;
    let (status, headers, body) = draw(&app, json!({"prompt": "a cat"})).await;
    assert_eq!(
        (status, refusal(&body)),
        (429, ("quota_exceeded", "requests_in_flight", 2))
    );
    assert_eq!(number(&headers, "x-ratelimit-remaining-requests"), 0);
    for path in &paths {
        assert_eq!(app.post(&format!("{path}/cancel"), json!({})).await.0, 200);
    }
    let (status, headers, body) = draw(&app, json!({"prompt": "a cat"})).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(number(&headers, "x-ratelimit-remaining-requests"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenant_cannot_fill_the_queue_for_the_others() {
    let mut app = TestApp::start_with(&["--queued-trainings=2", "--training-previews=0"]).await;
    let (first, second) = (
        app.create_key("a", "read,train").await,
        app.create_key("b", "read,train").await,
    );
    app.key = Some(first.clone());
    let running = app.register_subject(&REX, 5000).await;
    app.until("the training begins", || async {
        let (_, training) = app.get(&format!("/v1/trainings/{running}")).await;
        (training["status"] == "running").then_some(())
    })
    .await;
    for name in ["a", "b"] {
        let (status, body) = app.register(named(name)).await;
        assert_eq!(status, 202, "{body}");
    }
    let (status, body) = app.register(named("c")).await;
    assert_eq!((status, refusal(&body)), (429, ("overloaded", "", 2)));
    app.key = Some(second);
    for name in ["a", "b"] {
        let (status, body) = app.register(named(name)).await;
        assert_eq!(status, 202, "{body}");
    }
    // Twice the limit is the end for all tenants.
    let (status, body) = app.register(named("c")).await;
    assert_eq!((status, refusal(&body)), (429, ("overloaded", "", 2)));
    app.key = Some(first);
    assert_eq!(app.register(named("c")).await.0, 429);
}

/// A registration under that name, with a long training.
fn named(name: &'static str) -> reqwest::multipart::Form {
    form_named(&REX, name).text("steps", "5000")
}
