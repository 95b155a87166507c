//! The life of a concept: listed, changed, trained again, rolled back, moved, deleted.

use coar_core::image::{ImageLimits, decode};
use reqwest::Method;
use reqwest::multipart::Form;
use serde_json::{Value, json};

use crate::support::{REX, SPOT, TestApp, answer, form_named, image_part, images, subject_form};

fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or("")
}

async fn patch(app: &TestApp, name: &str, body: Value) -> (u16, Value) {
    answer(app.request(Method::PATCH, &format!("/v1/concepts/{name}")).json(&body)).await
}

async fn bytes(app: &TestApp, path: &str) -> (u16, Vec<u8>) {
    let response = app.request(Method::GET, path).send().await.unwrap();
    (response.status().as_u16(), response.bytes().await.unwrap().to_vec())
}

fn names(list: &Value) -> Vec<&str> {
    let data = list["data"].as_array().unwrap();
    data.iter().map(|concept| concept["name"].as_str().unwrap()).collect()
}

/// The first version stays in use until the second is ready; both can be rolled back to.
#[tokio::test(flavor = "multi_thread")]
async fn a_concept_is_trained_again_and_rolled_back() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["version"], 1);
    let (_, first) = app.get("/v1/concepts/rex").await;
    assert_eq!(
        (&first["version"]["number"], &first["versions"], &first["images"]),
        (&json!(1), &json!(1), &json!(3))
    );
    let request = app
        .request(Method::POST, "/v1/concepts/rex/trainings")
        .json(&json!({"steps": 400, "seed": 5}));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let second: Value = response.json().await.unwrap();
    assert_eq!(location, format!("/v1/trainings/{}", second["id"].as_str().unwrap()));
    assert_eq!(second["hyper_parameters"]["steps"], 400);
    // In the meantime the old version is used, and no third training can be started.
    let (status, busy) = app.post("/v1/concepts/rex/trainings", json!({})).await;
    assert_eq!((status, code(&busy)), (409, "training_in_progress"));
    let draw = json!({"prompt": "a photo of <rex> cat", "seed": 3, "response_format": "b64_json"});
    let (status, old) = app.post("/v1/images/generations", draw.clone()).await;
    assert_eq!(status, 200, "{old}");
    let (_, concept) = app.get("/v1/concepts/rex").await;
    assert_eq!(
        (
            concept["status"].as_str(),
            &concept["version"],
            &concept["training"]["id"]
        ),
        (Some("ready"), &first["version"], &second["id"])
    );
    // A cancelled training changes nothing, a shorter one makes the second version. Without a body, the settings are
    // those of the newest training.
    let id = second["id"].as_str().unwrap();
    assert_eq!(app.post(&format!("/v1/trainings/{id}/cancel"), json!({})).await.0, 200);
    assert_eq!(app.get("/v1/concepts/rex").await.1["version"], first["version"]);
    let (status, third) = app.post("/v1/concepts/rex/trainings", json!({"steps": 3})).await;
    assert_eq!(
        (status, &third["hyper_parameters"]["seed"]),
        (202, &json!(5)),
        "{third}"
    );
    let third = app.until_ended(third["id"].as_str().unwrap()).await;
    assert_eq!(
        (third["status"].as_str(), &third["version"]),
        (Some("succeeded"), &json!(2))
    );
    let (_, versions) = app.get("/v1/concepts/rex/versions").await;
    let numbers: Vec<_> = versions["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| &v["number"])
        .collect();
    assert_eq!(numbers, [2, 1]);
    assert_eq!(versions["data"][0]["training_id"], third["id"]);
    let (_, page) = app.get("/v1/concepts/rex/versions?after=2&limit=1").await;
    assert_eq!(
        (&page["data"][0]["hash"], &page["has_more"]),
        (&first["version"]["hash"], &json!(false))
    );
    // Both versions have their own file.
    let (_, weights) = bytes(&app, "/v1/concepts/rex/weights?version=1").await;
    let (_, newest) = bytes(&app, "/v1/concepts/rex/weights").await;
    assert_ne!(weights, newest);
    assert_eq!(bytes(&app, "/v1/concepts/rex/weights?version=3").await.0, 404);
    let (_, drawn) = app.post("/v1/images/generations", draw.clone()).await;
    assert_ne!(drawn["data"][0]["b64_json"], old["data"][0]["b64_json"]);
    // Rolled back to the first version: the same image as before.
    let (status, back) = patch(&app, "rex", json!({"version": 1})).await;
    assert_eq!((status, &back["version"]), (200, &first["version"]), "{back}");
    let (_, drawn) = app.post("/v1/images/generations", draw).await;
    assert_eq!(drawn["data"][0]["b64_json"], old["data"][0]["b64_json"]);
    let (status, unknown) = patch(&app, "rex", json!({"version": 9})).await;
    assert_eq!((status, code(&unknown)), (404, "version_not_found"));
    let (_, forward) = patch(&app, "rex", json!({"version": 2})).await;
    assert_eq!(
        (&forward["version"]["number"], &forward["versions"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(app.delete("/v1/concepts/rex").await, 204);
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
}

#[tokio::test(flavor = "multi_thread")]
async fn concepts_are_listed_described_renamed_and_looked_at() {
    let app = TestApp::start().await;
    let form = subject_form(&REX)
        .text("steps", "2")
        .text("description", "The cat of the shop")
        .text("metadata", "{\"order\": \"4711\"}")
        .text("webhook_url", "https://example.com/hook");
    let (status, registered) = app.register(form).await;
    assert_eq!(status, 202, "{registered}");
    assert_eq!(
        (
            &registered["metadata"]["order"],
            &registered["description"],
            &registered["version"]
        ),
        (&json!("4711"), &json!("The cat of the shop"), &Value::Null)
    );
    assert_eq!(registered["training"]["webhook_url"], "https://example.com/hook");
    let style = Form::new()
        .text("name", "ink")
        .text("kind", "style")
        .text("steps", "5000")
        .part("images", image_part(images(&REX, 1).remove(0)));
    let (_, style) = app.register(style).await;
    let done = app.until_ended(registered["training"]["id"].as_str().unwrap()).await;
    assert_eq!(done["status"], "succeeded");
    // An identical registration: refused as identical under the same name, accepted under another.
    let (status, same) = app.register(subject_form(&REX).text("steps", "2")).await;
    assert_eq!((status, code(&same)), (409, "name_taken"));
    assert!(
        same["error"]["message"].as_str().unwrap().contains("trained already"),
        "{same}"
    );
    let (_, other) = app.register(subject_form(&REX).text("steps", "3")).await;
    assert!(
        !other["error"]["message"].as_str().unwrap().contains("trained already"),
        "{other}"
    );
    let (status, twin) = app.register(form_named(&REX, "twin").text("steps", "2")).await;
    assert_eq!((status, twin["duplicate_of"].as_str()), (202, Some("rex")), "{twin}");
    assert!(style.get("duplicate_of").is_none(), "{style}");
    for (query, expected) in [
        ("", vec!["twin", "ink", "rex"]),
        ("?kind=style", vec!["ink"]),
        ("?status=ready", vec!["rex"]),
        ("?status=training&kind=subject", vec!["twin"]),
        ("?limit=2", vec!["twin", "ink"]),
    ] {
        let (status, list) = app.get(&format!("/v1/concepts{query}")).await;
        assert_eq!((status, names(&list)), (200, expected), "{query}");
        assert_eq!(list["has_more"], query.contains("limit"), "{query}");
    }
    let after = style["id"].as_str().unwrap();
    let (_, rest) = app.get(&format!("/v1/concepts?after={after}")).await;
    assert_eq!(names(&rest), ["rex"]);
    assert_eq!(rest["data"][0]["training"]["id"], done["id"]);
    // By its id too, and by its new name after it is renamed.
    let id = registered["id"].as_str().unwrap();
    let (_, by_id) = app.get(&format!("/v1/concepts/{id}")).await;
    assert_eq!(by_id["name"], "rex");
    let change = json!({"name": "max", "description": null, "metadata": {}});
    let (status, renamed) = patch(&app, id, change).await;
    assert_eq!((status, renamed["name"].as_str()), (200, Some("max")), "{renamed}");
    assert_eq!(
        (&renamed["description"], &renamed["metadata"]),
        (&Value::Null, &json!({}))
    );
    assert_eq!(app.get("/v1/concepts/rex").await.0, 404);
    assert_eq!(app.get("/v1/concepts/max").await.1["training"]["concept"], "max");
    let (status, taken) = patch(&app, "max", json!({"name": "ink"})).await;
    assert_eq!((status, code(&taken)), (409, "name_taken"));
    let (_, png) = bytes(&app, "/v1/concepts/max/images/2").await;
    let image = decode(&png, &ImageLimits::default()).unwrap();
    assert_eq!((image.width, image.height), (96, 96));
    for index in ["3", "-1", "x"] {
        assert_eq!(app.get(&format!("/v1/concepts/max/images/{index}")).await.0, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_the_base_model_and_every_concept_that_is_ready() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    let (_, early) = app.get("/v1/models").await;
    assert_eq!(early["data"].as_array().unwrap().len(), 2, "{early}");
    app.until_ended(&training).await;
    let subject = &SPOT;
    let training = app.register_subject(subject, 2).await;
    app.until_ended(&training).await;
    let (_, list) = app.get("/v1/models").await;
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    let second = format!("coar:{}", subject.name);
    assert_eq!(ids, ["coar-pocket", "coar", "coar:rex", &second]);
    for id in ids {
        let (status, model) = app.get(&format!("/v1/models/{id}")).await;
        assert_eq!(
            (status, model["id"].as_str(), model["object"].as_str()),
            (200, Some(id), Some("model"))
        );
    }
    let (status, both) = app.get(&format!("/v1/models/coar:rex+{}", subject.name)).await;
    assert_eq!(
        (status, both["concepts"].as_array().map(Vec::len)),
        (200, Some(2)),
        "{both}"
    );
    assert_eq!(both["concepts"][0]["version"]["number"], 1);
    for unknown in ["coar:nobody", "coar:rex+nobody", "coar:", "coar+rex", "dall-e-3"] {
        let (status, body) = app.get(&format!("/v1/models/{unknown}")).await;
        assert_eq!((status, code(&body)), (404, "model_not_found"), "{unknown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_concept_has_a_version_and_no_images_to_train_from() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    app.until_ended(&training).await;
    let (_, file) = bytes(&app, "/v1/concepts/rex/weights").await;
    let import = app
        .request(Method::POST, "/v1/concepts/import?name=moved")
        .body(file.clone());
    let (status, moved) = answer(import).await;
    assert_eq!(
        (status, &moved["version"]["number"], &moved["images"]),
        (201, &json!(1), &json!(0)),
        "{moved}"
    );
    let (status, refused) = app.post("/v1/concepts/moved/trainings", json!({})).await;
    assert_eq!((status, code(&refused)), (409, "no_reference_images"));
    let (_, versions) = app.get("/v1/concepts/moved/versions").await;
    assert_eq!(versions["data"][0]["training_id"], Value::Null);
    // It shares the tensors of the first concept, and keeps them when that is deleted.
    assert_eq!(app.delete("/v1/concepts/rex").await, 204);
    assert_eq!(bytes(&app, "/v1/concepts/moved/weights").await, (200, file));
    assert_eq!(app.blobs().len(), 1);
}
