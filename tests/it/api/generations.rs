//! The native route: its three modes, what is stored, and what survives a restart.

use std::time::Instant;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Events, TestApp, answer};

const ROUTE: &str = "/v1/generations";

fn ended(generation: &Value) -> bool {
    !["queued", "running"].contains(&generation["status"].as_str().unwrap_or(""))
}

async fn preferring(app: &TestApp, prefer: &str, body: &Value) -> (u16, Value) {
    answer(app.request(Method::POST, ROUTE).header("prefer", prefer).json(body)).await
}

async fn until_ended(app: &TestApp, id: &str) -> Value {
    app.until("the generation's end", || async {
        let (_, body) = app.get(&format!("{ROUTE}/{id}?wait=30")).await;
        ended(&body).then_some(body)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_is_waited_for_and_kept() {
    let app = TestApp::start().await;
    let body = json!({
        "prompt": "a red car", "n": 2, "seed": 7, "first_index": 1, "output_format": "webp", "metadata": {"order": "4711"}
    });
    let (status, generation) = app.post(ROUTE, body).await;
    assert_eq!(
        (status, &generation["status"]),
        (200, &json!("succeeded")),
        "{generation}"
    );
    assert_eq!(generation["object"], "generation");
    assert_eq!(generation["progress"], json!({"done": 288, "total": 288}));
    assert_eq!(generation["metadata"], json!({"order": "4711"}));
    assert_eq!(generation["usage"]["output_tokens"], 288);
    assert_eq!(generation["queue_position"], Value::Null);
    let request = &generation["request"];
    assert_eq!(
        (&request["seed"], &request["n"], &request["size"]),
        (&json!(7), &json!(2), &json!("96x96"))
    );
    let images = generation["images"].as_array().unwrap();
    assert_eq!(images.iter().map(|image| &image["index"]).collect::<Vec<_>>(), [1, 2]);
    for image in images {
        assert_eq!(
            (&image["width"], &image["height"], &image["seed"]),
            (&json!(96), &json!(96), &json!(7))
        );
        let file = app.client.get(image["url"].as_str().unwrap()).send().await.unwrap();
        assert_eq!(file.headers()["content-type"], "image/webp");
        let hash = coar::registry::blobs::content_hash(&file.bytes().await.unwrap());
        assert_eq!(image["content_hash"], hash.as_str());
    }
    let id = generation["id"].as_str().unwrap();
    assert_eq!(app.get(&format!("{ROUTE}/{id}")).await, (200, generation.clone()));
    let (_, listed) = app.get(&format!("{ROUTE}?status=succeeded&limit=1")).await;
    assert_eq!(listed["data"], json!([generation]));
    assert_eq!(app.get(&format!("{ROUTE}?status=failed")).await.1["data"], json!([]));
    assert_eq!(
        app.get(&format!("{ROUTE}?status=done")).await.1["error"]["param"],
        "status"
    );
    // The resolved settings give the same images again.
    let mut again = generation["request"].clone();
    again["prompt"] = generation["prompt"].clone();
    let (status, twin) = app.post(ROUTE, again).await;
    assert_eq!(status, 200, "{twin}");
    assert_eq!(
        twin["images"][0]["content_hash"],
        generation["images"][0]["content_hash"]
    );
    let (status, body) = app.post(&format!("{ROUTE}/{id}/cancel"), json!({})).await;
    assert_eq!((status, &body["error"]["code"]), (409, &json!("generation_ended")));
    for id in [id, twin["id"].as_str().unwrap()] {
        assert_eq!(app.delete(&format!("{ROUTE}/{id}")).await, 204);
        assert_eq!(app.get(&format!("{ROUTE}/{id}")).await.0, 404);
    }
    assert!(app.blobs().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn validating_stores_nothing() {
    let app = TestApp::start().await;
    let path = format!("{ROUTE}?validate_only=true");
    let (status, plan) = app.post(&path, json!({"prompt": "a red car", "n": 3})).await;
    assert_eq!((status, &plan["valid"]), (200, &json!(true)), "{plan}");
    assert_eq!(plan["usage"]["output_tokens"], 3 * 144);
    assert!(plan["usage"]["input_tokens"].as_u64().unwrap() > 0);
    assert!(plan["request"]["seed"].is_u64());
    let (_, drawn) = app.post(ROUTE, json!({"prompt": "a red car", "n": 3})).await;
    assert_eq!(drawn["usage"], plan["usage"], "the plan's cost is the real one");
    for (bad, status, param) in [
        (json!({"prompt": "a <nobody> cat"}), 404, "prompt"),
        (json!({"prompt": "x", "n": 11}), 400, "n"),
        (json!({"prompt": "word ".repeat(700)}), 400, "prompt"),
        (
            json!({"prompt": "x", "webhook_url": "http://127.0.0.1/"}),
            400,
            "webhook_url",
        ),
        (
            json!({"prompt": "x", "webhook_url": "https://example.com:8443/"}),
            400,
            "webhook_url",
        ),
        (json!({"prompt": "x", "metadata": {"a": 1}}), 400, "metadata"),
        (json!({"prompt": "x", "metadata": []}), 400, "metadata"),
        (json!({"prompt": "x", "stream": true}), 400, "stream"),
    ] {
        let (found, body) = app.post(&path, bad).await;
        assert_eq!((found, &body["error"]["param"]), (status, &json!(param)), "{body}");
    }
    let (_, listed) = app.get(ROUTE).await;
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_everything_and_hanging_up_cancels() {
    let app = TestApp::start_with(&["--rows", "2"]).await;
    let open = async |body: Value| {
        let request = app
            .request(Method::POST, ROUTE)
            .header("accept", "text/event-stream")
            .json(&body);
        Events::open(request).await
    };
    let mut events = open(json!({"prompt": "a red car", "seed": 3, "n": 2, "partial_images": 1})).await;
    let (first, queued) = events.next().await.unwrap();
    assert_eq!(
        (first.as_str(), &queued["generation"]["status"]),
        ("queued", &json!("queued"))
    );
    let mut names = Vec::new();
    let mut last = Value::Null;
    while let Some((name, data)) = events.next().await {
        if name == "progress" {
            assert_eq!(data["total"], 288);
        }
        if name == "image" {
            let file = app.client.get(data["url"].as_str().unwrap()).send().await.unwrap();
            assert_eq!(file.status(), 200);
        }
        names.push(name);
        last = data;
    }
    let count = |wanted: &str| names.iter().filter(|name| *name == wanted).count();
    assert_eq!(
        (count("partial_image"), count("image"), count("completed")),
        (2, 2, 1),
        "{names:?}"
    );
    assert!(count("progress") > 10);
    assert_eq!(names.last().unwrap(), "completed");
    assert_eq!(last["generation"]["images"].as_array().unwrap().len(), 2);

    let mut events = open(json!({"prompt": "a red car", "n": 10})).await;
    let id = events.next().await.unwrap().1["generation"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    while events.next().await.unwrap().0 != "progress" {}
    drop(events);
    assert_eq!(until_ended(&app, &id).await["status"], "cancelled");
    // It can be cancelled from another connection; the stream reports it.
    let mut events = open(json!({"prompt": "a red car", "n": 10})).await;
    let id = events.next().await.unwrap().1["generation"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let (status, cancelled) = app.post(&format!("{ROUTE}/{id}/cancel"), json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    let mut last = String::new();
    while let Some((name, _)) = events.next().await {
        last = name;
    }
    assert_eq!(last, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_survives_kill_nine() {
    // One background generation in the engine, two rows: the others wait in the database.
    let mut app = TestApp::start_with(&["--rows", "2", "--queue", "4"]).await;
    let many = json!({"prompt": "a red car", "n": 4, "seed": 5});
    let mut ids = Vec::new();
    for index in 0..3 {
        let (status, body) = preferring(&app, "respond-async", &many).await;
        assert_eq!((status, &body["status"]), (202, &json!("queued")), "{body}");
        assert!(body["queue_position"].as_u64().unwrap() <= index);
        ids.push(body["id"].as_str().unwrap().to_owned());
    }
    // A client that waits does not have to wait for all of them.
    let begun = Instant::now();
    let (status, _) = app.post(ROUTE, json!({"prompt": "a cat"})).await;
    assert_eq!(status, 200);
    let waited = begun.elapsed();
    let (_, last) = app.get(&format!("{ROUTE}/{}", ids[2])).await;
    assert_eq!(last["status"], "queued", "after {waited:?}");
    assert!(last["queue_position"].is_u64());
    let (status, cancelled) = app.post(&format!("{ROUTE}/{}/cancel", ids[1]), json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    app.kill_nine_and_restart().await;
    let first = until_ended(&app, &ids[0]).await;
    let third = until_ended(&app, &ids[2]).await;
    for generation in [&first, &third] {
        assert_eq!(generation["status"], "succeeded", "{generation}");
        assert_eq!(generation["images"].as_array().unwrap().len(), 4);
    }
    let hashes = |generation: &Value| -> Vec<Value> {
        let images = generation["images"].as_array().unwrap();
        images.iter().map(|image| image["content_hash"].clone()).collect()
    };
    assert_eq!(hashes(&first), hashes(&third));
    assert_eq!(app.get(&format!("{ROUTE}/{}", ids[1])).await.1["status"], "cancelled");
    // Both generations have the same files: deleting one keeps the other's.
    assert_eq!(app.delete(&format!("{ROUTE}/{}", ids[0])).await, 204);
    let url = third["images"][0]["url"].as_str().unwrap().to_owned();
    let path = &url[url.find("/v1/").unwrap()..];
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
async fn a_wait_that_is_over_leaves_the_generation_at_work() {
    let mut app = TestApp::start_with(&["--rows", "2"]).await;
    let (status, body) = preferring(&app, "wait=1", &json!({"prompt": "a red car", "n": 10})).await;
    assert_eq!((status, ended(&body)), (202, false), "{body}");
    let id = body["id"].as_str().unwrap().to_owned();
    // A graceful stop queues it again, and does not count as a failed attempt.
    assert!(app.terminate_and_restart().await);
    let done = until_ended(&app, &id).await;
    assert_eq!(
        (&done["status"], done["images"].as_array().unwrap().len()),
        (&json!("succeeded"), 10),
        "{done}"
    );
    let key = json!({"prompt": "a cat"});
    let send = || {
        app.request(Method::POST, ROUTE)
            .header("idempotency-key", "one")
            .json(&key)
    };
    let (first, second) = (answer(send()).await, answer(send()).await);
    assert_eq!((first.0, &first.1["id"]), (200, &second.1["id"]));
}
