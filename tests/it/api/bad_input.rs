//! Every bad input gets its 4xx with a stable code, and leaves nothing behind.

use coar::picture::{OutputFormat, RgbPicture, encode};
use reqwest::multipart::Form;
use serde_json::{Value, json};

use crate::support::{TestApp, answer, picture_part, pictures, rex};

fn form(fields: &[(&'static str, &'static str)]) -> Form {
    let base = [("name", "rex"), ("kind", "subject"), ("class", "cat")];
    let kept = base
        .iter()
        .filter(|(key, _)| !fields.iter().any(|(other, _)| other == key));
    kept.chain(fields.iter().filter(|(_, value)| *value != "-"))
        .fold(Form::new(), |form, (key, value)| form.text(*key, *value))
}

fn png() -> Vec<u8> {
    pictures(rex(), 1).remove(0)
}

/// A PNG header that claims 16000x16000 pixels, and no pixels.
fn bomb() -> Vec<u8> {
    let small = encode(
        &RgbPicture {
            width: 1,
            height: 1,
            rgb: vec![0; 3],
        },
        OutputFormat::Png,
        &[],
    )
    .unwrap();
    let mut bytes = small;
    bytes[16..20].copy_from_slice(&16_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&16_000u32.to_be_bytes());
    let crc = bytes[12..29].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    });
    bytes[29..33].copy_from_slice(&(!crc).to_be_bytes());
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations() {
    let app = TestApp::start().await;
    let with = |fields: &[(&'static str, &'static str)]| form(fields).part("images", picture_part(png()));
    let many = (0..11).fold(form(&[]), |form, _| form.part("images", picture_part(png())));
    let cases: Vec<(&str, Form, u16, &str, Option<&str>)> = vec![
        (
            "no name",
            with(&[("name", "-")]),
            400,
            "missing_parameter",
            Some("name"),
        ),
        (
            "malformed name",
            with(&[("name", "Rex the cat")]),
            400,
            "invalid_value",
            Some("name"),
        ),
        (
            "no kind",
            with(&[("kind", "-")]),
            400,
            "missing_parameter",
            Some("kind"),
        ),
        (
            "unknown kind",
            with(&[("kind", "animal")]),
            400,
            "invalid_value",
            Some("kind"),
        ),
        (
            "subject without class",
            with(&[("class", "-")]),
            400,
            "invalid_value",
            Some("class"),
        ),
        (
            "style with class",
            with(&[("kind", "style")]),
            400,
            "invalid_value",
            Some("class"),
        ),
        (
            "steps of the wrong type",
            with(&[("steps", "many")]),
            400,
            "invalid_value",
            Some("steps"),
        ),
        (
            "steps out of range",
            with(&[("steps", "0")]),
            400,
            "invalid_value",
            Some("steps"),
        ),
        (
            "layers out of range",
            with(&[("layers", "7")]),
            400,
            "invalid_value",
            Some("layers"),
        ),
        (
            "learning rate NaN",
            with(&[("learning_rate", "NaN")]),
            400,
            "invalid_value",
            Some("learning_rate"),
        ),
        (
            "negative seed",
            with(&[("seed", "-1")]),
            400,
            "invalid_value",
            Some("seed"),
        ),
        (
            "unknown field",
            with(&[("colour", "red")]),
            400,
            "unknown_parameter",
            Some("colour"),
        ),
        (
            "repeated field",
            with(&[("steps", "3")]).text("steps", "4"),
            400,
            "repeated_parameter",
            Some("steps"),
        ),
        ("no pictures", form(&[]), 400, "invalid_value", Some("images")),
        ("too many pictures", many, 400, "too_many_pictures", Some("images")),
        (
            "not a picture",
            form(&[]).part("images", picture_part(b"<svg/>".to_vec())),
            400,
            "unknown_picture_format",
            Some("images"),
        ),
        (
            "a truncated picture",
            form(&[]).part("images", picture_part(png()[..200].to_vec())),
            400,
            "",
            Some("images"),
        ),
        (
            "a decompression bomb",
            form(&[]).part("images", picture_part(bomb())),
            400,
            "picture_too_many_pixels",
            Some("images"),
        ),
        (
            "an oversized picture",
            form(&[]).part("images", picture_part(vec![0; (20 << 20) + 1])),
            413,
            "picture_too_large",
            Some("images"),
        ),
        (
            "one good and one bad",
            with(&[]).part("images", picture_part(b"GIF89a".to_vec())),
            400,
            "unknown_picture_format",
            Some("images"),
        ),
    ];
    for (what, form, status, code, field) in cases {
        let (found, body) = app.register(form).await;
        let error = &body["error"];
        assert_eq!(found, status, "{what}: {body}");
        assert!(code.is_empty() || error["code"] == code, "{what}: {body}");
        assert_eq!(error["param"].as_str(), field, "{what}: {body}");
        assert!(
            error["message"].as_str().is_some_and(|message| message.len() > 10),
            "{what}: {body}"
        );
        assert!(error["request_id"].is_string(), "{what}: {body}");
    }
    let url = format!("{}/v1/concepts", app.url);
    let (status, body) = answer(app.client.post(&url).json(&json!({"name": "rex"}))).await;
    assert_eq!(
        (status, body["error"]["code"].as_str()),
        (415, Some("unsupported_media_type"))
    );
    let broken = app
        .client
        .post(&url)
        .header("content-type", "multipart/form-data; boundary=x")
        .body("--x\r\nnonsense");
    assert_eq!(answer(broken).await.0, 400);
    let (_, list) = app.get("/v1/concepts").await;
    assert_eq!(list, json!({"object": "list", "data": []}));
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
}

#[tokio::test(flavor = "multi_thread")]
async fn generations() {
    let app = TestApp::start().await;
    let cases: Vec<(Value, u16, &str, Option<&str>)> = vec![
        (json!({}), 400, "missing_parameter", Some("prompt")),
        (json!({"prompt": ""}), 400, "invalid_value", Some("prompt")),
        (json!({"prompt": "  \n"}), 400, "invalid_value", Some("prompt")),
        (json!({"prompt": 7}), 400, "invalid_value", Some("prompt")),
        (
            json!({"prompt": "x".repeat(4001)}),
            400,
            "prompt_too_long",
            Some("prompt"),
        ),
        (json!({"prompt": "ü€🦊".repeat(1300)}), 400, "", Some("prompt")),
        (
            json!({"prompt": "a <nobody> cat"}),
            404,
            "concept_not_found",
            Some("prompt"),
        ),
        (
            json!({"prompt": "a <racm3:break> cat"}),
            400,
            "invalid_value",
            Some("prompt"),
        ),
        (json!({"prompt": "x", "n": 0}), 400, "invalid_value", Some("n")),
        (json!({"prompt": "x", "n": 11}), 400, "invalid_value", Some("n")),
        (json!({"prompt": "x", "n": 1.5}), 400, "invalid_value", Some("n")),
        (json!({"prompt": "x", "n": "2"}), 400, "invalid_value", Some("n")),
        (
            json!({"prompt": "x", "size": "100x100"}),
            400,
            "invalid_size",
            Some("size"),
        ),
        (json!({"prompt": "x", "size": "big"}), 400, "invalid_size", Some("size")),
        (json!({"prompt": "x", "seed": -1}), 400, "invalid_value", Some("seed")),
        (
            json!({"prompt": "x", "guidance_scale": 0.5}),
            400,
            "invalid_value",
            Some("guidance_scale"),
        ),
        (
            json!({"prompt": "x", "temperature": -1}),
            400,
            "invalid_value",
            Some("temperature"),
        ),
        (
            json!({"prompt": "x", "temperature": "hot"}),
            400,
            "invalid_value",
            Some("temperature"),
        ),
        (json!({"prompt": "x", "top_k": -5}), 400, "invalid_value", Some("top_k")),
        (
            json!({"prompt": "x", "response_format": "gif"}),
            400,
            "invalid_value",
            Some("response_format"),
        ),
        (
            json!({"prompt": "x", "model": "dall-e-3"}),
            404,
            "model_not_found",
            Some("model"),
        ),
        (
            json!({"prompt": "x", "background": "transparent"}),
            400,
            "unsupported_value",
            Some("background"),
        ),
        (
            json!({"prompt": "x", "wings": 2}),
            400,
            "unknown_parameter",
            Some("wings"),
        ),
    ];
    for (request, status, code, field) in cases {
        let (found, body) = app.post("/v1/images/generations", request.clone()).await;
        let shown: String = request.to_string().chars().take(80).collect();
        assert_eq!(found, status, "{shown}: {body}");
        assert!(code.is_empty() || body["error"]["code"] == code, "{shown}: {body}");
        assert_eq!(body["error"]["param"].as_str(), field, "{shown}: {body}");
    }
    let url = format!("{}/v1/images/generations", app.url);
    let raw = |body: &'static str, kind: &'static str| app.client.post(&url).header("content-type", kind).body(body);
    for (request, status, code) in [
        (raw("{", "application/json"), 400, "invalid_json"),
        (raw("[1]", "application/json"), 400, "invalid_json"),
        (raw("{}", "text/plain"), 415, "unsupported_media_type"),
    ] {
        let (found, body) = answer(request).await;
        assert_eq!((found, body["error"]["code"].as_str()), (status, Some(code)), "{body}");
    }
    assert_eq!(app.get("/v1/nothing").await.1["error"]["code"], "route_not_found");
    assert_eq!(app.get("/v1/images/generations").await.0, 405);
    assert_eq!(app.delete("/v1/models").await, 405);
    assert_eq!(app.get("/v1/trainings/training_0").await.0, 404);
    assert_eq!(app.get("/v1/images/image_0.png").await.0, 404);
    let answer = app
        .client
        .get(format!("{}/livez", app.url))
        .header("x-request-id", "mine-1")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.headers()["x-request-id"], "mine-1");
}
