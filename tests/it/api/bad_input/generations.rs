//! Requests for images, and requests that no route accepts.

use serde_json::{Value, json};

use crate::support::{TestApp, answer};

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
        (json!({"prompt": "x", "seed": -2}), 400, "invalid_value", Some("seed")),
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
