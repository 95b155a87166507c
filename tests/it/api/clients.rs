//! Requests of clients that were written for other servers.

use coar_core::image::{ImageLimits, decode};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::support::{REX, TestApp, answer, image_part, images};

const ROUTE: &str = "/v1/images/generations";

fn error(answer: &(u16, Value)) -> (u16, &str, &str) {
    let text = |field: &str| answer.1["error"][field].as_str().unwrap_or("");
    (answer.0, text("code"), text("param"))
}

fn message(answer: &(u16, Value)) -> &str {
    answer.1["error"]["message"].as_str().unwrap_or("")
}

/// Images are returned in the response unless the request or the operator chooses otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn images_are_answered_as_base64() {
    let app = TestApp::start().await;
    let (status, body) = app.post(ROUTE, json!({"prompt": "a cat", "seed": 1})).await;
    assert_eq!(status, 200, "{body}");
    assert!(body["data"][0]["b64_json"].is_string() && body["data"][0]["url"].is_null());
    let (_, listed) = app.get("/v1/generations").await;
    assert_eq!(listed["data"], json!([]), "it is not stored");
    let by_url = json!({"prompt": "a cat", "seed": 1, "response_format": "url"});
    let (_, body) = app.post(ROUTE, by_url).await;
    assert!(body["data"][0]["url"].is_string() && body["data"][0]["b64_json"].is_null());

    let app = TestApp::start_with(&["--response-format", "url"]).await;
    let (_, body) = app.post(ROUTE, json!({"prompt": "a cat", "seed": 1})).await;
    assert!(body["data"][0]["url"].is_string(), "{body}");
    let (_, body) = app
        .post(ROUTE, json!({"prompt": "a cat", "response_format": "b64_json"}))
        .await;
    assert!(body["data"][0]["b64_json"].is_string(), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_have_the_names_that_clients_know() {
    let app = TestApp::start_with(&["--model-alias", "gpt-image-2=coar,dall-e-3=coar:rex"]).await;
    let refused = app
        .post(ROUTE, json!({"prompt": "a cat", "model": "gpt-image-1"}))
        .await;
    assert_eq!(error(&refused), (404, "model_not_found", "model"));
    assert!(message(&refused).contains("`gpt-image-2`"), "{refused:?}");
    assert!(message(&refused).contains("--model-alias"), "{refused:?}");
    let refused = app.post(ROUTE, json!({"prompt": "a cat", "model": "dall-e-3"})).await;
    assert_eq!(error(&refused), (404, "concept_not_found", "model"));
    let listed = async || {
        let (_, models) = app.get("/v1/models").await;
        let ids = models["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|model| model["id"].clone());
        ids.map(|id| id.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(listed().await, ["coar-pocket", "coar", "gpt-image-2"]);
    assert_eq!(app.get("/v1/models/dall-e-3").await.0, 404);

    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let ids = listed().await;
    assert_eq!(ids, ["coar-pocket", "coar", "coar:rex", "gpt-image-2", "dall-e-3"]);
    for id in ids {
        let (status, model) = app.get(&format!("/v1/models/{id}")).await;
        assert_eq!((status, &model["id"]), (200, &json!(id)));
    }
    let (_, model) = app.get("/v1/models/dall-e-3").await;
    assert_eq!(model["concepts"][0]["name"], "rex");
    for (model, concepts) in [("gpt-image-2", 0), ("dall-e-3", 1)] {
        let (status, body) = app.post(ROUTE, json!({"prompt": "a cat", "model": model})).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(body["concepts"].as_array().unwrap().len(), concepts, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_of_other_models() {
    let app = TestApp::start().await;
    for size in ["", "auto", "96X96"] {
        let (status, body) = app.post(ROUTE, json!({"prompt": "a cat", "size": size})).await;
        assert_eq!((status, &body["size"]), (200, &json!("96x96")), "{size}: {body}");
    }
    let refused = app.post(ROUTE, json!({"prompt": "a cat", "size": "1024x1024"})).await;
    assert_eq!(error(&refused), (400, "invalid_size", "size"));
    assert!(message(&refused).contains("the nearest first, 96x96"), "{refused:?}");
    assert!(message(&refused).len() < 300, "{refused:?}");

    let app = TestApp::start_with(&["--size-policy", "nearest"]).await;
    for (asked, wide) in [("1024x1024", 0), ("1792x1024", 1), ("1024x1536", -1)] {
        for route in [ROUTE, "/v1/generations?validate_only=true"] {
            let (status, body) = app.post(route, json!({"prompt": "a cat", "size": asked})).await;
            assert_eq!(status, 200, "{body}");
            let size = body["size"].as_str().or(body["request"]["size"].as_str()).unwrap();
            let (width, height) = size.split_once('x').unwrap();
            let (width, height): (i32, i32) = (width.parse().unwrap(), height.parse().unwrap());
            assert_eq!((width - height).signum(), wide, "{asked}: {size}");
            if let Some(file) = body["data"][0]["b64_json"].as_str() {
                use base64::Engine as _;
                let file = base64::engine::general_purpose::STANDARD.decode(file).unwrap();
                let image = decode(&file, &ImageLimits::default()).unwrap();
                assert_eq!((image.width as i32, image.height as i32), (width, height));
            }
        }
    }
    for size in ["big", "0x64", "-1x5", "1024"] {
        let refused = app.post(ROUTE, json!({"prompt": "a cat", "size": size})).await;
        assert_eq!(error(&refused), (400, "invalid_size", "size"), "{size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_say_nothing_and_fields_of_other_servers() {
    let app = TestApp::start().await;
    let nothing = json!({
        "prompt": "a cat", "negative_prompt": null, "extra_body": {}, "image": null, "input_fidelity": null, "style": "",
        "model": "", "quality": "", "user": "", "response_format": "", "output_format": "", "frame_count": null, "n": null,
        "wings": null,
    });
    let (status, body) = app.post(ROUTE, nothing).await;
    assert_eq!(status, 200, "{body}");
    assert!(body.get("safety_identifier").is_none());
    assert_eq!(body["quality"], "high");
    let (status, body) = app
        .post(
            "/v1/generations?validate_only=true",
            json!({"prompt": "a cat", "style": null}),
        )
        .await;
    assert_eq!(status, 200, "{body}");

    for (name, value, said) in [
        ("negative_prompt", json!("dogs"), "say in `prompt`"),
        ("extra_body", json!({"seed": 1}), "beside the other parameters"),
        ("image", json!("data:"), "`POST /v1/concepts`"),
        ("frame_count", json!(4), "`png`, `jpeg` or `webp`"),
        ("svg", json!({"model": "x"}), "`png`, `jpeg` or `webp`"),
        ("markup", json!("<svg/>"), "`png`, `jpeg` or `webp`"),
        ("cfg_scale", json!(7), "`guidance_scale`"),
        ("wings", json!(2), "is not a parameter"),
    ] {
        let refused = app.post(ROUTE, json!({"prompt": "a cat", name: value})).await;
        assert_eq!(error(&refused), (400, "unknown_parameter", name), "{refused:?}");
        assert!(message(&refused).contains(said), "{refused:?}");
    }
    for format in ["gif", "svg"] {
        let refused = app
            .post(ROUTE, json!({"prompt": "a cat", "output_format": format}))
            .await;
        assert_eq!(error(&refused), (400, "invalid_value", "output_format"));
        assert!(
            message(&refused).ends_with("expected `png`, `jpeg` or `webp`"),
            "{refused:?}"
        );
    }
    let refused = app
        .post(ROUTE, json!({"prompt": "a cat", "background": "transparent"}))
        .await;
    assert_eq!(error(&refused), (400, "unsupported_value", "background"));
    assert!(message(&refused).ends_with("send `auto` or `opaque`"), "{refused:?}");
    let refused = app.post(ROUTE, json!({"prompt": "x ".repeat(16_000)})).await;
    assert_eq!(error(&refused), (400, "prompt_too_long", "prompt"));
    assert_eq!(refused.1["error"]["limit"], 4000);
    assert!(message(&refused).contains("because"), "{refused:?}");
}

/// The fields of OpenAI's present API; the responses repeat those that OpenAI's repeat.
#[tokio::test(flavor = "multi_thread")]
async fn present_fields_are_taken_and_repeated() {
    let app = TestApp::start().await;
    for (quality, shown) in [
        ("xhigh", "xhigh"),
        ("max", "max"),
        ("auto", "high"),
        ("standard", "medium"),
    ] {
        let body = json!({
            "prompt": "a cat", "quality": quality, "complexity": "high", "safety_identifier": "s-1", "user": "u-1",
        });
        let (status, body) = app.post(ROUTE, body).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!(
            (&body["quality"], &body["safety_identifier"]),
            (&json!(shown), &json!("s-1"))
        );
        let usage = &body["usage"];
        assert_eq!(
            usage["output_tokens_details"],
            json!({"text_tokens": 0, "image_tokens": 144})
        );
    }
    let (_, body) = app
        .post(
            ROUTE,
            json!({"prompt": "a cat", "user": "u-1", "safety_identifier": ""}),
        )
        .await;
    assert_eq!(body["safety_identifier"], "u-1");
    let refused = app.post(ROUTE, json!({"prompt": "a cat", "complexity": "none"})).await;
    assert_eq!(error(&refused), (400, "unsupported_value", "complexity"));
    // A stream without partial images.
    let streamed = json!({"prompt": "a cat", "stream": true, "safety_identifier": "s-1", "quality": "low"});
    let mut events = crate::support::Events::open(app.request(Method::POST, ROUTE).json(&streamed)).await;
    let (name, data) = events.next().await.unwrap();
    assert_eq!(name, "image_generation.completed");
    assert_eq!(
        (&data["safety_identifier"], &data["quality"]),
        (&json!("s-1"), &json!("low"))
    );
    assert!(events.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_have_one_bound() {
    let app = TestApp::start().await;
    let (status, random) = app.post(ROUTE, json!({"prompt": "a cat", "seed": -1})).await;
    assert_eq!(status, 200, "{random}");
    let (_, other) = app.post(ROUTE, json!({"prompt": "a cat", "seed": -1})).await;
    let seed = &random["data"][0]["seed"];
    assert!(seed.is_u64() && *seed != other["data"][0]["seed"], "{seed}");
    let (_, again) = app.post(ROUTE, json!({"prompt": "a cat", "seed": seed})).await;
    assert_eq!(again["data"], random["data"]);
    let bound = "expected 0 to 9007199254740991, or -1 for a random seed";
    for (seed, said) in [
        (json!(u64::MAX), bound),
        (json!(1_u64 << 53), bound),
        (
            json!(-2),
            "expected an integer from 0 to 9007199254740991, or -1 for a random seed",
        ),
        (json!("7"), "without quotes, or -1"),
    ] {
        let refused = app.post(ROUTE, json!({"prompt": "a cat", "seed": seed})).await;
        assert_eq!(error(&refused), (400, "invalid_value", "seed"));
        assert!(message(&refused).contains(said), "{refused:?}");
    }
    for (name, value, said) in [
        (
            "n",
            json!("1"),
            "`n` is \"1\"; expected an integer from 1 to 10, without quotes",
        ),
        ("n", json!(11), "`n` is 11; expected 1 to 10"),
        ("first_index", json!(1_000_001), "expected 0 to 1000000"),
        ("top_k", json!(-5), "expected an integer of 0 or more"),
        ("partial_images", json!(4), "expected 0 to 3"),
    ] {
        let refused = app
            .post("/v1/generations", json!({"prompt": "a cat", name: value}))
            .await;
        assert_eq!(error(&refused), (400, "invalid_value", name));
        assert!(message(&refused).contains(said), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_with_additional_slashes() {
    let app = TestApp::start().await;
    let body = json!({"prompt": "a cat", "seed": 1});
    for path in [
        "/v1//images/generations",
        "//v1/images/generations",
        "/v1/images/generations/",
    ] {
        let (status, answered) = app.post(path, body.clone()).await;
        assert_eq!(status, 200, "{path}: {answered}");
    }
    for path in ["/v1/models/", "/v1//models", "/v1//models/coar"] {
        assert_eq!(app.get(path).await.0, 200, "{path}");
    }
    for (path, meant) in [
        ("/v1/concepts/", "`/v1/concepts`"),
        ("/v1//admin/keys", "`/v1/admin/keys`"),
        ("/images/generations", "`/v1/images/generations`"),
        ("/v1/v1/images/generations", "`/v1/images/generations`"),
    ] {
        let refused = app.post(path, body.clone()).await;
        assert_eq!(error(&refused), (404, "route_not_found", ""), "{path}");
        assert!(message(&refused).contains(meant), "{refused:?}");
    }
    let (_, metrics) = app.get("/metrics").await;
    let route = r#"route="/v1/images/generations",status="2xx"} 3"#;
    assert!(metrics.as_str().unwrap().contains(route), "they use its label");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_looks_like_a_concept() {
    let app = TestApp::start().await;
    let refused = app
        .post(ROUTE, json!({"prompt": "è <think>a plan</think> a cat"}))
        .await;
    assert_eq!(error(&refused), (404, "concept_not_found", "prompt"));
    assert_eq!(
        message(&refused),
        "There is no concept `think`. `<think>` at character 3 of the prompt names one; as text write `< think>`, with a \
         space."
    );
    let plan = "/v1/generations?validate_only=true";
    let as_text = app.post(plan, json!({"prompt": "< think>a plan</think> a cat"})).await;
    assert_eq!(as_text.0, 200, "{as_text:?}");
    assert_eq!(as_text.1["concepts"], json!([]));

    // There is no concept `rex` yet.
    let plain = app.post(plan, json!({"prompt": "a <Rex> cat"})).await;
    assert_eq!(plain.0, 200, "{plain:?}");
    let training = app.register_subject(&REX, 2).await;
    app.until_ended(&training).await;
    let refused = app.post(plan, json!({"prompt": "a <Rex> cat"})).await;
    assert_eq!(error(&refused), (400, "invalid_value", "prompt"));
    assert!(message(&refused).contains("has `<Rex>` at character 3"), "{refused:?}");
    assert!(message(&refused).contains("did you mean `<rex>`?"), "{refused:?}");
    assert_eq!(app.post(plan, json!({"prompt": "a < Rex> cat"})).await.0, 200);
}

/// In the order of the numbers, independent of the order of the parts.
#[tokio::test(flavor = "multi_thread")]
async fn parts_of_a_form_may_have_numbers() {
    let app = TestApp::start().await;
    let all = images(&REX, 3);
    let base = |name: &'static str| {
        Form::new()
            .text("name", name)
            .text("kind", "subject")
            .text("class", "cat")
            .text("steps", "2")
    };
    let numbered = base("numbered")
        .part("images[10]", image_part(all[2].clone()))
        .text("captions[1]", "on the beach")
        .part("images[0]", image_part(all[0].clone()))
        .part("images[1]", image_part(all[1].clone()));
    let (status, body) = app.register(numbered).await;
    assert_eq!(status, 202, "{body}");
    let plain = all.iter().fold(base("plain"), |form, image| {
        form.part("images", image_part(image.clone()))
    });
    assert_eq!(app.register(plain).await.0, 202);
    for index in 0..3 {
        let image = async |name: &str| {
            let path = format!("/v1/concepts/{name}/images/{index}");
            let answer = app.request(Method::GET, &path).send().await.unwrap();
            answer.bytes().await.unwrap()
        };
        assert_eq!(image("numbered").await, image("plain").await, "{index}");
    }
    let twice = base("twice")
        .part("images[0]", image_part(all[0].clone()))
        .part("images[0]", image_part(all[1].clone()));
    assert_eq!(
        error(&app.register(twice).await),
        (400, "repeated_parameter", "images[0]")
    );
    let lost = base("lost")
        .part("images[0]", image_part(all[0].clone()))
        .text("captions[4]", "x");
    assert_eq!(error(&app.register(lost).await), (400, "invalid_value", "captions[4]"));
    let other = base("other").part("photos", image_part(all[0].clone()));
    let refused = app.register(other).await;
    assert_eq!(error(&refused), (400, "unknown_parameter", "photos"));
    assert!(message(&refused).contains("files are sent as `images`"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_other_encodings() {
    let app = TestApp::start().await;
    let url = format!("{}{ROUTE}", app.url);
    let send = async |body: Vec<u8>| {
        let request = app.client.post(&url).header("content-type", "application/json");
        answer(request.body(body)).await
    };
    let text = r#"{"prompt": "a caf\u00e9"}"#;
    let marked = [b"\xef\xbb\xbf".as_slice(), text.as_bytes()].concat();
    assert_eq!(send(marked).await.0, 200);
    let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (body, said) in [
        (wide.clone(), "UTF-16; send it as UTF-8"),
        ([b"\xff\xfe".as_slice(), &wide].concat(), "UTF-16; send it as UTF-8"),
        (b"{\"prompt\": \"a caf\xe9\"}".to_vec(), "perhaps Latin-1"),
    ] {
        let refused = send(body).await;
        assert_eq!(error(&refused), (400, "invalid_json", ""));
        assert!(message(&refused).contains(said), "{refused:?}");
    }
}

/// Pages of applications and of browser extensions.
#[tokio::test(flavor = "multi_thread")]
async fn origins_that_are_not_of_the_web() {
    let app = TestApp::start_with(&["--cors-origin", "app://obsidian.md,chrome-extension://abc"]).await;
    let from = async |origin: &str| {
        let body = json!({"prompt": "a cat"});
        let request = app
            .request(Method::POST, "/v1/generations?validate_only=true")
            .json(&body);
        let answer = request.header("origin", origin).send().await.unwrap();
        let allowed = answer.headers().get("access-control-allow-origin").cloned();
        (
            answer.status().as_u16(),
            allowed.map(|value| value.to_str().unwrap().to_owned()),
        )
    };
    for origin in ["app://obsidian.md", "chrome-extension://abc"] {
        assert_eq!(from(origin).await, (200, Some(origin.to_owned())));
    }
    for origin in ["app://other", "tauri://localhost", "null"] {
        assert_eq!(from(origin).await, (403, None), "{origin}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_nouns_of_other_scripts() {
    let app = TestApp::start().await;
    let plan = "/v1/generations?validate_only=true";
    for (name, class, prompt, drawn) in [
        ("mao", "猫", "一只猫在海滩上", "一只<mao> 猫在海滩上"),
        ("bistro", "café", "a CAFÉ at night", "a <bistro> CAFÉ at night"),
        ("rex", "cat", "two cats", "a photo of <rex> cat, two cats"),
    ] {
        let form = Form::new()
            .text("name", name)
            .text("kind", "subject")
            .text("class", class)
            .text("steps", "1")
            .part("images", image_part(images(&REX, 1).remove(0)));
        let (status, body) = app.register(form).await;
        assert_eq!(status, 202, "{body}");
        app.until_ended(body["training"]["id"].as_str().unwrap()).await;
        let (status, body) = app.post(plan, json!({"prompt": prompt, "concepts": [name]})).await;
        assert_eq!((status, &body["prompt"]), (200, &json!(drawn)), "{body}");
    }
}

/// Captioning programs leave their control tokens in captions.
#[tokio::test(flavor = "multi_thread")]
async fn captions_with_control_tokens() {
    let app = TestApp::start().await;
    let form = |field: &'static str, value: &'static str| {
        let class = if field == "class" { value } else { "cat" };
        let form = Form::new()
            .text("name", "rex")
            .text("kind", "subject")
            .text("class", class);
        let form = form.part("images", Part::bytes(images(&REX, 1).remove(0)).file_name("a.png"));
        if field == "class" {
            form
        } else {
            form.text(field, value)
        }
    };
    for (field, value, param) in [
        ("caption", "</s><s>a cat on the beach</s>", "captions"),
        ("captions[0]", "beside <max> dog", "captions"),
        ("class", "<cat-toy>", "class"),
        ("class", "cat>", "class"),
    ] {
        let refused = app.register(form(field, value)).await;
        assert_eq!(error(&refused), (400, "invalid_value", param), "{value}: {refused:?}");
    }
    let (_, listed) = app.get("/v1/concepts").await;
    assert_eq!(listed["data"], json!([]));
    assert!(app.blobs().is_empty());
    assert_eq!(app.register(form("caption", "1 < 2")).await.0, 202);
    let retrained = app
        .post("/v1/concepts/rex/trainings", json!({"captions": ["<s>"]}))
        .await;
    assert_eq!(error(&retrained), (400, "invalid_value", "captions"));
}
