//! Registrations, changes and trainings of concepts.

use coar_core::image::{OutputFormat, RgbImage, encode};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use super::{form, png};
use crate::support::{TestApp, answer, image_part};

/// A PNG header that claims 16000x16000 pixels, and no pixels.
fn bomb() -> Vec<u8> {
    let small = encode(
        &RgbImage {
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
    let with = |fields: &[(&'static str, &'static str)]| form(fields).part("images", image_part(png()));
    let many = (0..11).fold(form(&[]), |form, _| form.part("images", image_part(png())));
    let cases: Vec<(&str, Form, u16, &str, Option<&str>)> = vec![
        (
            "a name that is a route",
            with(&[("name", "import")]),
            400,
            "invalid_value",
            Some("name"),
        ),
        (
            "a description that is too long",
            with(&[]).text("description", "x".repeat(1001)),
            400,
            "value_too_large",
            Some("description"),
        ),
        (
            "metadata that is not JSON",
            with(&[("metadata", "{")]),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (
            "metadata of numbers",
            with(&[("metadata", "{\"a\": 1}")]),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (
            "a webhook that is no address",
            with(&[("webhook_url", "javascript:alert(1)")]),
            400,
            "invalid_value",
            Some("webhook_url"),
        ),
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
        ("no images", form(&[]), 400, "invalid_value", Some("images")),
        ("too many images", many, 400, "too_many_images", Some("images")),
        (
            "not an image",
            form(&[]).part("images", image_part(b"<svg/>".to_vec())),
            400,
            "unknown_image_format",
            Some("images[0]"),
        ),
        (
            "a truncated image",
            form(&[]).part("images", image_part(png()[..200].to_vec())),
            400,
            "",
            Some("images[0]"),
        ),
        (
            "a decompression bomb",
            form(&[]).part("images", image_part(bomb())),
            400,
            "image_too_many_pixels",
            Some("images[0]"),
        ),
        (
            "an oversized image",
            form(&[]).part("images", image_part(vec![0; (20 << 20) + 1])),
            413,
            "image_too_large",
            Some("images[0]"),
        ),
        (
            "one good and one bad",
            with(&[]).part("images", image_part(b"GIF89a".to_vec())),
            400,
            "unknown_image_format",
            Some("images[1]"),
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
    assert_eq!(list, json!({"object": "list", "data": [], "has_more": false}));
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
}

/// An error names the image that cannot be used by index and file name, and says what to do about it.
#[tokio::test(flavor = "multi_thread")]
async fn the_refused_image_is_named() {
    let app = TestApp::start().await;
    let heic = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic".to_vec();
    let arithmetic = include_bytes!("../../../../crates/coar-core/tests/jpeg/arithmetic.jpg").to_vec();
    let cut = png()[..200].to_vec();
    let cases = [
        (
            heic,
            "unknown_image_format",
            "Settings > Camera > Formats > Most Compatible",
        ),
        (
            b"GIF89a".to_vec(),
            "unknown_image_format",
            "is a GIF image; save it as PNG",
        ),
        (Vec::new(), "damaged_image", "is an empty file"),
        (cut, "damaged_image", "is truncated"),
        (arithmetic, "unsupported_image", "is an arithmetic-coded JPEG"),
    ];
    for (bytes, code, said) in cases {
        let bad = Part::bytes(bytes).file_name("folder/IMG_7\u{202e}.jpg");
        let with = (0..6).fold(form(&[]), |form, _| form.part("images", image_part(png())));
        let with = (7..10).fold(with.part("images", bad), |form, _| {
            form.part("images", image_part(png()))
        });
        let (status, body) = app.register(with).await;
        let error = &body["error"];
        assert_eq!(
            (status, error["code"].as_str(), error["param"].as_str()),
            (400, Some(code), Some("images[6]")),
            "{body}"
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("`images[6]` (IMG_7\\u{202e}.jpg) is "), "{message}");
        assert!(message.contains(said), "{message}");
    }
    assert!(app.blobs().is_empty(), "{:?}", app.blobs());
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_and_retrainings() {
    let app = TestApp::start().await;
    let (status, body) = app
        .register(form(&[("steps", "5000")]).part("images", image_part(png())))
        .await;
    assert_eq!(status, 202, "{body}");
    let (_, before) = app.get("/v1/concepts/rex").await;
    let many: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!("x"))).collect();
    let change = "/v1/concepts/rex";
    let train = "/v1/concepts/rex/trainings";
    let cases: Vec<(&str, Value, u16, &str, Option<&str>)> = vec![
        (change, json!({"name": "Rex"}), 400, "invalid_value", Some("name")),
        (change, json!({"name": "import"}), 400, "invalid_value", Some("name")),
        (change, json!({"name": 7}), 400, "invalid_value", Some("name")),
        (
            change,
            json!({"description": "x".repeat(1001)}),
            400,
            "value_too_large",
            Some("description"),
        ),
        (
            change,
            json!({"metadata": many}),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (
            change,
            json!({"metadata": {"k".repeat(65): ""}}),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (
            change,
            json!({"metadata": {"k": "v".repeat(513)}}),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (
            change,
            json!({"metadata": ["a"]}),
            400,
            "invalid_value",
            Some("metadata"),
        ),
        (change, json!({"version": 1}), 404, "version_not_found", Some("version")),
        (change, json!({"version": -1}), 400, "invalid_value", Some("version")),
        (change, json!({"kind": "style"}), 400, "unknown_parameter", Some("kind")),
        (
            "/v1/concepts/nobody",
            json!({"name": "x"}),
            404,
            "concept_not_found",
            None,
        ),
        (train, json!({"steps": 0}), 400, "invalid_value", Some("steps")),
        (train, json!({"steps": "many"}), 400, "invalid_value", Some("steps")),
        (train, json!({"layers": 7}), 400, "invalid_value", Some("layers")),
        (
            train,
            json!({"learning_rate": 2}),
            400,
            "invalid_value",
            Some("learning_rate"),
        ),
        (
            train,
            json!({"captions": ["x".repeat(201)]}),
            400,
            "invalid_value",
            Some("captions"),
        ),
        (
            train,
            json!({"captions": vec!["x"; 11]}),
            400,
            "invalid_value",
            Some("captions"),
        ),
        (
            train,
            json!({"webhook_url": "ftp://x"}),
            400,
            "invalid_value",
            Some("webhook_url"),
        ),
        (train, json!({"name": "max"}), 400, "unknown_parameter", Some("name")),
        (train, json!({}), 409, "training_in_progress", None),
        (
            "/v1/concepts/nobody/trainings",
            json!({}),
            404,
            "concept_not_found",
            None,
        ),
    ];
    for (path, request, status, code, field) in cases {
        let method = match path.ends_with("trainings") {
            true => reqwest::Method::POST,
            false => reqwest::Method::PATCH,
        };
        let (found, body) = answer(app.request(method, path).json(&request)).await;
        let shown: String = request.to_string().chars().take(80).collect();
        assert_eq!(
            (found, body["error"]["code"].as_str()),
            (status, Some(code)),
            "{shown}: {body}"
        );
        assert_eq!(body["error"]["param"].as_str(), field, "{shown}: {body}");
    }
    for (path, status, field) in [
        ("/v1/concepts?kind=animal", 400, Some("kind")),
        ("/v1/concepts?status=done", 400, Some("status")),
        ("/v1/concepts?limit=0", 400, Some("limit")),
        ("/v1/concepts?after=training_0", 400, Some("after")),
        ("/v1/concepts/rex/versions?after=x", 400, Some("after")),
        ("/v1/concepts/rex/weights?version=x", 400, Some("version")),
        ("/v1/concepts/rex/weights?version=1", 404, Some("version")),
        ("/v1/concepts/rex/weights", 409, None),
        ("/v1/concepts/nobody/versions", 404, None),
        ("/v1/concepts/nobody/images/0", 404, None),
        ("/v1/trainings/training_0/events", 404, None),
        ("/v1/trainings/training_0/previews/1", 404, None),
    ] {
        let (found, body) = app.get(path).await;
        assert_eq!(
            (found, body["error"]["param"].as_str()),
            (status, field),
            "{path}: {body}"
        );
    }
    assert_eq!(app.post("/v1/trainings/training_0/retry", json!({})).await.0, 404);
    let (_, after) = app.get("/v1/concepts/rex").await;
    for field in ["name", "description", "metadata", "version", "versions", "updated_at"] {
        assert_eq!(before[field], after[field], "{field}");
    }
}
