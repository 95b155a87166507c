//! Repeating a POST with an `Idempotency-Key` creates nothing again.

use reqwest::{Method, RequestBuilder};
use serde_json::Value;

use crate::support::{REX, TestApp, form_named, image_part, images};

/// A response: status, `idempotency-replayed`, `location`, body.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    status: u16,
    replayed: bool,
    location: Option<String>,
    body: String,
}

impl Answer {
    fn code(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        body["error"]["code"].as_str().unwrap_or("").to_owned()
    }

    fn id(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        body["id"].as_str().unwrap_or("").to_owned()
    }
}

async fn send(request: RequestBuilder, key: &str) -> Answer {
    let response = request.header("Idempotency-Key", key).send().await.unwrap();
    let text = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
    let (status, replayed) = (response.status().as_u16(), text("idempotency-replayed").is_some());
    let location = text("location");
    if status == 409 && text("retry-after").is_some() {
        assert_eq!(text("x-should-retry"), None, "a retry helps");
    }
    Answer {
        status,
        replayed,
        location,
        body: response.text().await.unwrap(),
    }
}

fn register(app: &TestApp, name: &'static str, steps: &'static str) -> RequestBuilder {
    let form = form_named(&REX, name).text("steps", steps);
    app.request(Method::POST, "/v1/concepts").multipart(form)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_comes_again_also_after_kill_nine() {
    let mut app = TestApp::start().await;
    let first = send(register(&app, "rex", "2"), "order 1").await;
    assert_eq!((first.status, first.replayed), (202, false), "{first:?}");
    // Another boundary, the same content.
    let again = send(register(&app, "rex", "2"), "order 1").await;
    let replayed = Answer {
        replayed: true,
        ..first.clone()
    };
    assert_eq!(again, replayed);
    assert_eq!(again.location.as_deref(), Some("/v1/concepts/rex"));
    for other in [register(&app, "rex", "3"), register(&app, "max", "2")] {
        let other = send(other, "order 1").await;
        assert_eq!((other.status, other.code().as_str()), (422, "idempotency_key_reused"));
    }
    let one_image_less = app.request(Method::POST, "/v1/concepts").multipart(
        reqwest::multipart::Form::new()
            .text("name", "rex")
            .text("kind", "subject")
            .text("class", REX.class)
            .text("steps", "2")
            .part("images", image_part(images(&REX, 1).remove(0))),
    );
    assert_eq!(send(one_image_less, "order 1").await.status, 422);
    // Another key makes it another request, and the name is taken. A refusal is not stored: the key stays free.
    let taken = send(register(&app, "rex", "2"), "order 2").await;
    assert_eq!((taken.status, taken.code().as_str()), (409, "name_taken"));
    assert_eq!(send(register(&app, "max", "2"), "order 2").await.status, 202);
    app.kill_nine_and_restart().await;
    assert_eq!(send(register(&app, "rex", "2"), "order 1").await, replayed);
    let long = "x".repeat(256);
    for key in ["", long.as_str()] {
        let refused = send(register(&app, "tom", "2"), key).await;
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (400, "invalid_value"),
            "`{key}`"
        );
    }
    // Keys are per tenant.
    app.key = Some(app.create_key("acme", "read,train").await);
    let other = send(register(&app, "rex", "2"), "order 1").await;
    assert_eq!((other.status, other.replayed), (202, false), "{other:?}");
    assert_ne!(other.id(), first.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_file_is_imported_once() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let weights = app.request(Method::GET, "/v1/concepts/rex/weights");
    let file = weights.send().await.unwrap().bytes().await.unwrap();
    let import = |name: &str| {
        let path = format!("/v1/concepts/import?name={name}");
        app.request(Method::POST, &path).body(file.clone())
    };
    let first = send(import("copy"), "k").await;
    assert_eq!((first.status, first.replayed), (201, false), "{first:?}");
    let again = send(import("copy"), "k").await;
    assert_eq!((again.status, again.replayed, again.id()), (201, true, first.id()));
    assert_eq!(send(import("other"), "k").await.status, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_duplicates_one_works() {
    let app = TestApp::start().await;
    let all = (0..8).map(|_| send(register(&app, "rex", "2"), "k"));
    let answers = futures::future::join_all(all).await;
    let first: Vec<_> = answers.iter().filter(|a| a.status == 202 && !a.replayed).collect();
    assert_eq!(first.len(), 1, "{answers:?}");
    for answer in answers.iter().filter(|answer| *answer != first[0]) {
        match answer.status {
            202 => assert_eq!((answer.replayed, answer.id()), (true, first[0].id())),
            _ => assert_eq!(
                (answer.status, answer.code().as_str()),
                (409, "idempotency_in_progress")
            ),
        }
    }
    let (_, listed) = app.get("/v1/concepts").await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1), "{listed}");
}

/// A response with images is too large for a row: it is stored as a blob and replayed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_with_images_in_it_comes_again_from_the_blob_store() {
    let mut app = TestApp::start().await;
    let body = serde_json::json!({"prompt": "a cat", "n": 2, "seed": 7, "response_format": "b64_json"});
    let draw = |app: &TestApp| app.request(Method::POST, "/v1/images/generations").json(&body);
    let first = send(draw(&app), "images").await;
    assert_eq!((first.status, first.replayed), (200, false), "{first:?}");
    assert!(first.body.len() > 16 << 10, "{} bytes", first.body.len());
    assert_eq!(app.blobs().len(), 1, "these images are stored nowhere else");
    let replayed = Answer {
        replayed: true,
        ..first
    };
    assert!(send(draw(&app), "images").await == replayed);
    // A restart keeps the blobs of responses.
    app.kill_nine_and_restart().await;
    assert!(send(draw(&app), "images").await == replayed);
    assert_eq!(app.blobs().len(), 1);
}

/// Also when the images are in the response, which is then a blob.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_with_the_generation_in_it() {
    let app = TestApp::start().await;
    for (accept, partial_images) in [("application/json", 0), ("text/event-stream", 3)] {
        let body = serde_json::json!({"prompt": "a cat", "partial_images": partial_images});
        let draw = || {
            let request = app.request(Method::POST, "/v1/generations").header("accept", accept);
            request.json(&body)
        };
        let first = send(draw(), accept).await;
        assert_eq!((first.status, first.replayed), (200, false), "{first:?}");
        // The events are stored a moment after the last one has been sent.
        let again = app
            .until("the answer to be kept", || async {
                let again = send(draw(), accept).await;
                (again.status == 200).then_some(again)
            })
            .await;
        assert!(again.replayed && again.body == first.body, "{again:?}");
        let at = first.body.find("generation_").unwrap();
        let id: String = first.body[at..].chars().take_while(|c| *c != '"').collect();
        assert_eq!(app.delete(&format!("/v1/generations/{id}")).await, 204);
        let gone = send(draw(), accept).await;
        assert_eq!((gone.status, gone.code().as_str()), (404, "generation_not_found"));
        assert_eq!(app.blobs().len(), 0, "{accept}");
    }
}
