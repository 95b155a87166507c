//! Text that cannot be stored.

use serde_json::json;

use super::{form, png};
use crate::support::{TestApp, image_part};

/// PostgreSQL cannot store U+0000; what is accepted must not depend on the database.
#[tokio::test(flavor = "multi_thread")]
async fn no_text_has_the_character_u0000() {
    let app = TestApp::start().await;
    let cases = [
        ("/v1/images/generations", json!({"prompt": "a cat\0"}), "prompt"),
        (
            "/v1/images/generations",
            json!({"prompt": "a cat", "user": "\0"}),
            "user",
        ),
        (
            "/v1/generations",
            json!({"prompt": "a", "negative_prompt": "x\0y"}),
            "negative_prompt",
        ),
        (
            "/v1/generations",
            json!({"prompt": "a", "concepts": ["re\0x"]}),
            "concepts",
        ),
        (
            "/v1/generations",
            json!({"prompt": "a", "metadata": {"k\0": "v"}}),
            "metadata",
        ),
        (
            "/v1/generations",
            json!({"prompt": "a", "metadata": {"k": "\0"}}),
            "metadata",
        ),
        (
            "/v1/generations",
            json!({"prompt": "a", "webhook_url": "https://a.example/\0"}),
            "webhook_url",
        ),
        ("/v1/admin/tenants", json!({"name": "a\0"}), "name"),
        ("/v1/admin/keys", json!({"tenant": "default\0"}), "tenant"),
        ("/v1/admin/keys", json!({"tenant": "default", "name": "\0"}), "name"),
    ];
    for (path, body, field) in cases {
        let (status, told) = app.post(path, body.clone()).await;
        let error = &told["error"];
        assert_eq!(
            (status, &error["code"]),
            (400, &json!("invalid_value")),
            "{body}: {told}"
        );
        assert_eq!(error["param"], field, "{body}");
    }
    for (field, value) in [
        ("name", "re\0x"),
        ("class", "c\0t"),
        ("description", "\0"),
        ("captions", "on the beach\0"),
        ("webhook_url", "https://a.example/\0"),
        ("metadata", r#"{"k": "\u0000"}"#),
        ("metadata", r#"{"\u0000": "v"}"#),
    ] {
        let (status, told) = app
            .register(form(&[(field, value)]).part("images", image_part(png())))
            .await;
        let error = &told["error"];
        assert_eq!(
            (status, &error["code"]),
            (400, &json!("invalid_value")),
            "{field}: {told}"
        );
        assert_eq!(error["param"], field, "{told}");
    }
    for path in [
        "/v1/concepts/a%00b",
        "/v1/concepts/a%00b/versions",
        "/v1/concepts/a%00b/weights",
        "/v1/trainings/a%00b",
        "/v1/generations/a%00b",
        "/v1/models/coar:a%00b",
        "/v1/admin/tenants/a%00b",
    ] {
        let (status, body) = app.get(path).await;
        assert_eq!(status, 404, "{path}: {body}");
    }
    for path in [
        "/v1/concepts?after=%00",
        "/v1/concepts?status=%00",
        "/v1/trainings?concept=%00",
        "/v1/generations?status=%00",
        "/v1/generations?after=%00",
    ] {
        let (status, body) = app.get(path).await;
        assert!(matches!(status, 200 | 400 | 404), "{path}: {status} {body}");
    }
}
