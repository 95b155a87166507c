//! Register, train, draw, delete; and what survives a restart.

use base64::Engine as _;
use coar_core::image::{ImageLimits, decode};
use serde_json::json;

use crate::support::{REX, SPOT, TestApp, image_part, images};

#[tokio::test(flavor = "multi_thread")]
async fn a_subject_and_a_style_are_trained_and_drawn_together() {
    let app = TestApp::start().await;
    let subject = app.register_subject(&REX, 6).await;
    let form = reqwest::multipart::Form::new()
        .text("name", "ink")
        .text("kind", "style")
        .text("steps", "4")
        .part("images", image_part(images(&REX, 1).remove(0)));
    let (status, style) = app.register(form).await;
    assert_eq!(
        (status, style["kind"].as_str(), style["class"].is_null()),
        (202, Some("style"), true)
    );
    let (status, early) = app
        .post("/v1/images/generations", json!({"prompt": "a house in <ink> style"}))
        .await;
    assert_eq!(
        (status, early["error"]["code"].as_str()),
        (409, Some("concept_not_ready"))
    );
    let done = app.until_ended(&subject).await;
    assert_eq!(
        (done["status"].as_str(), done["progress"]["step"].as_u64()),
        (Some("succeeded"), Some(6)),
        "{done}"
    );
    assert_eq!(done["losses"].as_array().unwrap().len(), 6);
    let style = app.until_ended(style["training"]["id"].as_str().unwrap()).await;
    assert_eq!(style["status"], "succeeded");
    let body = json!({
        "prompt": "a photo of <rex> cat on the beach in <ink> style", "n": 2, "seed": 7, "response_format": "b64_json"
    });
    let (status, first) = app.post("/v1/images/generations", body.clone()).await;
    assert_eq!(status, 200, "{first}");
    let (_, again) = app.post("/v1/images/generations", body).await;
    assert_eq!(first["data"], again["data"], "the same seed draws the same images");
    assert_eq!(first["data"].as_array().unwrap().len(), 2);
    assert_ne!(first["data"][0]["b64_json"], first["data"][1]["b64_json"]);
    let (_, concept) = app.get("/v1/concepts/rex").await;
    assert_eq!(first["concepts"][0]["hash"], concept["version"]["hash"]);
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(first["data"][0]["b64_json"].as_str().unwrap())
        .unwrap();
    let image = decode(&bytes, &ImageLimits::default()).unwrap();
    assert_eq!((image.width, image.height), (96, 96));
    // A single image equals the first of several: other rows of the batch have no effect.
    let alone = json!({
        "prompt": "a photo of <rex> cat on the beach in <ink> style", "seed": 7, "response_format": "b64_json"
    });
    let (_, alone) = app.post("/v1/images/generations", alone).await;
    assert_eq!(alone["data"][0]["b64_json"], first["data"][0]["b64_json"]);
    // Without the concept the same seed gives another image.
    let plain = json!({"prompt": "a photo of a cat on the beach", "seed": 7, "response_format": "b64_json"});
    let (_, plain) = app.post("/v1/images/generations", plain).await;
    assert_ne!(plain["data"][0]["b64_json"], first["data"][0]["b64_json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_served_by_url_in_any_size_and_format() {
    let app = TestApp::start().await;
    let body = json!({
        "prompt": "a red car", "size": "128x64", "output_format": "jpeg", "seed": 1, "response_format": "url"
    });
    let (status, answer) = app.post("/v1/images/generations", body).await;
    assert_eq!((status, answer["size"].as_str()), (200, Some("128x64")), "{answer}");
    let url = answer["data"][0]["url"].as_str().unwrap();
    let file = app.client.get(url).send().await.unwrap();
    assert_eq!(file.headers()["content-type"], "image/jpeg");
    assert_eq!(file.headers()["x-content-type-options"], "nosniff");
    let image = decode(&file.bytes().await.unwrap(), &ImageLimits::default()).unwrap();
    assert_eq!((image.width, image.height), (128, 64));
    let tokens = answer["usage"]["output_tokens"].as_u64().unwrap();
    assert_eq!(tokens, 16 * 8);
    let (_, models) = app.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], "coar-pocket");
}

#[tokio::test(flavor = "multi_thread")]
async fn training_survives_kill_nine() {
    let mut app = TestApp::start().await;
    let training = app.register_subject(&REX, 400).await;
    app.until("a checkpoint", || async {
        let (_, body) = app.get(&format!("/v1/trainings/{training}")).await;
        body["checkpoint_step"].as_u64().filter(|&step| step > 0)
    })
    .await;
    app.kill_nine_and_restart().await;
    let (status, concept) = app.get("/v1/concepts/rex").await;
    assert_eq!((status, concept["status"].as_str()), (200, Some("training")));
    let resumed = app
        .until("the second attempt", || async {
            let (_, body) = app.get(&format!("/v1/trainings/{training}")).await;
            (body["attempt"] == 2).then_some(body)
        })
        .await;
    assert!(resumed["resumed_from_step"].as_u64().unwrap() > 0, "{resumed}");
    // A graceful stop stores a checkpoint of the current step, releases the lease, and does not count as an attempt.
    assert!(app.terminate_and_restart().await);
    let (_, after) = app.get(&format!("/v1/trainings/{training}")).await;
    assert!(after["progress"]["step"].as_u64() >= resumed["resumed_from_step"].as_u64());
    let (status, cancelled) = app.post(&format!("/v1/trainings/{training}/cancel"), json!({})).await;
    assert_eq!((status, cancelled["status"].as_str()), (200, Some("cancelled")));
    assert_eq!(app.delete("/v1/concepts/rex").await, 204);
    app.until("every blob's removal", || async {
        app.blobs().is_empty().then_some(())
    })
    .await;
}

/// Killed more often than the limit of attempts, each time before the first checkpoint: these kills do not count
/// against the training.
#[tokio::test(flavor = "multi_thread")]
async fn quick_kills_end_no_training() {
    let mut app = TestApp::start().await;
    let training = app.register_subject(&REX, 400).await;
    for attempt in 1..=8 {
        let begun = app
            .until("the training's next attempt", || async {
                let (_, body) = app.get(&format!("/v1/trainings/{training}")).await;
                (body["status"] == "failed" || body["attempt"] == attempt).then_some(body)
            })
            .await;
        assert_eq!(
            (begun["status"].as_str(), begun["error"].is_null()),
            (Some("running"), true),
            "{begun}"
        );
        if attempt < 8 {
            app.kill_nine_and_restart().await;
        }
    }
    let (status, _) = app.post(&format!("/v1/trainings/{training}/cancel"), json!({})).await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_concept_moves_as_a_file_and_names_are_free_again() {
    let app = TestApp::start().await;
    let subject = &SPOT;
    let training = app.register_subject(subject, 2).await;
    let (status, taken) = app.register(crate::support::subject_form(subject)).await;
    assert_eq!((status, taken["error"]["code"].as_str()), (409, Some("name_taken")));
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let (status, ended) = app.post(&format!("/v1/trainings/{training}/cancel"), json!({})).await;
    assert_eq!((status, ended["error"]["code"].as_str()), (409, Some("training_ended")));
    let file = app
        .client
        .get(format!("{}/v1/concepts/{}/weights", app.url, subject.name))
        .send()
        .await
        .unwrap();
    let bytes = file.bytes().await.unwrap();
    assert_eq!(app.delete(&format!("/v1/concepts/{}", subject.name)).await, 204);
    assert_eq!(app.get(&format!("/v1/concepts/{}", subject.name)).await.0, 404);
    assert_eq!(app.delete(&format!("/v1/concepts/{}", subject.name)).await, 404);
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
    let import = |bytes: Vec<u8>, query: &str| {
        app.client
            .post(format!("{}/v1/concepts/import{query}", app.url))
            .body(bytes)
    };
    let (status, imported) = crate::support::answer(import(bytes.to_vec(), "?name=again")).await;
    assert_eq!(
        (status, imported["status"].as_str()),
        (201, Some("ready")),
        "{imported}"
    );
    let (status, _) = app
        .post("/v1/images/generations", json!({"prompt": "a photo of <again> mug"}))
        .await;
    assert_eq!(status, 200);
    let (status, refused) = crate::support::answer(import(bytes[..bytes.len() - 1].to_vec(), "")).await;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (400, Some("invalid_concept_file"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn drawing_goes_on_beside_a_training_and_a_second_server_is_refused() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 5000).await;
    app.until("the training's start", || async {
        let (_, body) = app.get(&format!("/v1/trainings/{training}")).await;
        (body["status"] == "running").then_some(())
    })
    .await;
    let (status, _) = app.post("/v1/images/generations", json!({"prompt": "a cat"})).await;
    assert_eq!(status, 200);
    let (_, still) = app.get(&format!("/v1/trainings/{training}")).await;
    assert_eq!(still["status"], "running");
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(app.dir.path().join("data"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use by another server"));
}

/// A flood of requests must not take the processor from the device: on Linux its threads keep the priority of the process
/// (0 here, or that of the tests), and all others are below.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn device_threads_have_priority_over_the_api() {
    let app = TestApp::start().await;
    // Starts a decoding thread.
    app.register_subject(&REX, 1).await;
    let threads = |name: &str| -> Vec<i32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", app.pid())).unwrap();
        let with_name = tasks.flatten().filter(|task| {
            let comm = std::fs::read_to_string(task.path().join("comm"));
            comm.is_ok_and(|comm| comm.trim() == name)
        });
        let nice = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            // After the name in brackets come the fields from the third on; nice is the nineteenth.
            stat.rsplit(')').next()?.split_whitespace().nth(16)?.parse().ok()
        };
        with_name.filter_map(nice).collect()
    };
    // The device thread, and those of libtorch that it has started.
    let process = threads("coar-device")[0];
    for (name, more) in [
        ("coar-device", 0),
        ("coar-images", 0),
        ("tokio-rt-worker", 5),
        ("coar-decoder", 10),
    ] {
        let nice = threads(name);
        assert!(!nice.is_empty(), "{name}");
        assert!(
            nice.iter().all(|nice| *nice == (process + more).min(19)),
            "{name}: {nice:?}, device {process}"
        );
    }
}
