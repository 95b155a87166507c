//! Trainings from a caller's point of view: listed, followed, cancelled, retried, with previews.

use std::time::Instant;

use coar_core::image::{ImageLimits, decode};
use futures::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{PATIENCE, REX, TestApp, form_named};

fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or("")
}

/// Every event of a stream until it ends, with its name.
async fn events(app: &TestApp, training: &str) -> Vec<(String, Value)> {
    let request = app
        .request(Method::GET, &format!("/v1/trainings/{training}/events"))
        .header("last-event-id", "17");
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut text = String::new();
    let mut pieces = response.bytes_stream();
    let read = async {
        while let Some(piece) = pieces.next().await {
            text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        }
    };
    tokio::time::timeout(PATIENCE, read)
        .await
        .expect("the stream ends with the training");
    let line = |event: &str, field: &str| {
        let line = event
            .lines()
            .find_map(|line| line.strip_prefix(field).map(str::to_owned));
        line.map(|line| line.trim().to_owned())
    };
    text.split("\n\n")
        .filter_map(|event| {
            let data = serde_json::from_str(&line(event, "data:")?).expect("data is JSON");
            Some((line(event, "event:")?, data))
        })
        .collect()
}

fn named<'a>(events: &'a [(String, Value)], name: &str) -> Vec<&'a Value> {
    events
        .iter()
        .filter(|(event, _)| event == name)
        .map(|(_, data)| data)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_is_followed_to_its_end_and_draws_on_its_way() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 12).await;
    let told = events(&app, &training).await;
    assert_eq!(told[0].0, "progress", "{told:?}");
    let progress = named(&told, "progress");
    let steps: Vec<_> = progress.iter().map(|data| data["step"].as_u64().unwrap()).collect();
    assert!(steps.is_sorted() && steps.last() == Some(&12), "{steps:?}");
    for data in &progress {
        // There is no estimate before the second step.
        let eta = data["eta_seconds"].as_u64();
        assert!(eta.is_none() || data["step"].as_u64() > Some(1), "{data}");
    }
    let ended = named(&told, "ended");
    assert_eq!((ended.len(), told.last().unwrap().0.as_str()), (1, "ended"));
    assert_eq!(
        (ended[0]["status"].as_str(), &ended[0]["version"]),
        (Some("succeeded"), &json!(1))
    );
    // The last preview may be late.
    let done = app
        .until("the last image", || async {
            let (_, body) = app.get(&format!("/v1/trainings/{training}")).await;
            (body["previews"].as_array()?.len() == 4).then_some(body)
        })
        .await;
    let at: Vec<_> = done["previews"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["step"])
        .collect();
    assert_eq!(at, [3, 6, 9, 12]);
    for preview in named(&told, "preview") {
        assert!(at.contains(&&preview["step"]), "{preview}");
    }
    let mut drawn = vec![];
    for preview in done["previews"].as_array().unwrap() {
        let response = app
            .request(Method::GET, preview["url"].as_str().unwrap())
            .send()
            .await
            .unwrap();
        assert_eq!(response.headers()["content-type"], "image/png");
        let bytes = response.bytes().await.unwrap();
        let image = decode(&bytes, &ImageLimits::default()).unwrap();
        assert_eq!((image.width, image.height), (96, 96));
        drawn.push(bytes);
    }
    assert!(
        drawn.iter().any(|bytes| *bytes != drawn[0]),
        "the concept changes, and its images with it"
    );
    let losses = done["losses"].as_array().unwrap();
    assert_eq!((losses.len(), &losses[11]["step"]), (12, &json!(12)));
    assert!(losses[0]["next_token"].as_f64().unwrap() > losses[11]["next_token"].as_f64().unwrap());
    // A late follower gets the complete present state, and the end.
    let late = events(&app, &training).await;
    let late: Vec<_> = late.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(late, ["progress", "preview", "preview", "preview", "preview", "ended"]);
    for path in ["previews/4", "previews/x"] {
        let (status, body) = app.get(&format!("/v1/trainings/{training}/{path}")).await;
        assert_eq!((status, code(&body)), (404, "preview_not_found"));
    }
    // All of it is deleted with the concept.
    assert_eq!(app.delete("/v1/concepts/rex").await, 204);
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
    assert_eq!(app.get(&format!("/v1/trainings/{training}/events")).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_training_is_tried_again_and_lists_go_by_concept_and_status() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 5000).await;
    let path = format!("/v1/trainings/{training}");
    let (status, queued) = app.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!((status, code(&queued)), (409, "training_not_failed"));
    app.until("the first steps", || async {
        let (_, body) = app.get(&path).await;
        body["progress"]["step"].as_u64().filter(|&step| step > 0)
    })
    .await;
    let (status, cancelled) = app.post(&format!("{path}/cancel"), json!({})).await;
    assert_eq!((status, cancelled["status"].as_str()), (200, Some("cancelled")));
    assert_eq!(cancelled["progress"]["eta_seconds"], Value::Null);
    assert_eq!(app.get("/v1/concepts/rex").await.1["status"], "cancelled");
    let told = events(&app, &training).await;
    assert_eq!(told.last().unwrap().1["status"], "cancelled");
    let (status, again) = app.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!(
        (status, again["id"].as_str()),
        (202, Some(training.as_str())),
        "{again}"
    );
    let running = app
        .until("the second try", || async {
            let (_, body) = app.get(&path).await;
            (body["status"] == "running").then_some(body)
        })
        .await;
    assert_eq!((&running["attempt"], &running["error"]), (&json!(1), &Value::Null));
    let (_, other) = app.register(form_named(&REX, "max").text("steps", "2")).await;
    for (query, expected) in [
        ("", 2),
        ("?concept=rex", 1),
        ("?concept=rex&status=queued", 0),
        ("?status=queued", 1),
        ("?limit=1", 1),
    ] {
        let (status, list) = app.get(&format!("/v1/trainings{query}")).await;
        assert_eq!(
            (status, list["data"].as_array().map(Vec::len)),
            (200, Some(expected)),
            "{query}: {list}"
        );
    }
    let newest = other["training"]["id"].as_str().unwrap();
    let (_, rest) = app.get(&format!("/v1/trainings?after={newest}")).await;
    assert_eq!(
        (&rest["data"][0]["concept"], &rest["has_more"]),
        (&json!("rex"), &json!(false))
    );
    for (query, status, param) in [
        ("?status=done", 400, "status"),
        ("?concept=nobody", 404, "concept"),
        ("?after=rex", 400, "after"),
        ("?limit=101", 400, "limit"),
    ] {
        let (found, body) = app.get(&format!("/v1/trainings{query}")).await;
        assert_eq!(
            (found, body["error"]["param"].as_str()),
            (status, Some(param)),
            "{query}"
        );
    }
}

/// The estimate at the middle is right within a wide margin: the machine may be busy with other work.
#[tokio::test(flavor = "multi_thread")]
async fn the_remaining_time_is_about_right() {
    let app = TestApp::start_with(&["--training-previews", "0"]).await;
    let training = app.register_subject(&REX, 60).await;
    let path = format!("/v1/trainings/{training}");
    let promised = app
        .until("a promise", || async {
            let (_, body) = app.get(&path).await;
            let middle = body["progress"]["step"].as_u64() >= Some(24);
            body["progress"]["eta_seconds"].as_f64().filter(|_| middle)
        })
        .await;
    let begun = Instant::now();
    let done = app.until_ended(&training).await;
    let took = begun.elapsed();
    assert_eq!(
        (done["status"].as_str(), &done["previews"]),
        (Some("succeeded"), &json!([]))
    );
    let (least, most) = (promised / 4.0 - 3.0, promised * 4.0 + 3.0);
    assert!(
        (least..=most).contains(&took.as_secs_f64()),
        "promised {promised} s, took {took:?}"
    );
}

/// Two run at once, and a tenant with many trainings does not delay another.
#[tokio::test(flavor = "multi_thread")]
async fn slots_are_shared_among_tenants() {
    let mut app = TestApp::start_with(&["--training-slots", "2", "--training-previews", "0"]).await;
    let home = app.create_key("default", "read,train").await;
    let acme = app.create_key("acme", "read,train").await;
    app.key = Some(home.clone());
    for name in ["first", "second", "third"] {
        let (status, body) = app.register(form_named(&REX, name).text("steps", "5000")).await;
        assert_eq!(status, 202, "{body}");
    }
    let running = |list: &Value| {
        let data = list["data"].as_array().unwrap();
        data.iter().filter(|training| training["status"] == "running").count()
    };
    app.until("two at once", || async {
        (running(&app.get("/v1/trainings").await.1) == 2).then_some(())
    })
    .await;
    app.key = Some(acme.clone());
    let (_, other) = app.register(form_named(&REX, "other").text("steps", "5000")).await;
    let other = other["training"]["id"].as_str().unwrap().to_owned();
    app.key = Some(home);
    let (_, list) = app.get("/v1/trainings?status=running").await;
    let first = list["data"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(
        app.post(&format!("/v1/trainings/{first}/cancel"), json!({})).await.0,
        200
    );
    // The free slot goes to the other tenant, although the third training has waited longer.
    app.key = Some(acme);
    app.until("the other tenant's turn", || async {
        let (_, body) = app.get(&format!("/v1/trainings/{other}")).await;
        (body["status"] == "running").then_some(())
    })
    .await;
}
