//! OpenAI's route and the URLs of images.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use coar_core::image::{ImageLimits, decode};
use image::ImageDecoder as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Events, REX, TestApp};

const ROUTE: &str = "/v1/images/generations";

fn bytes(entry: &Value) -> Vec<u8> {
    STANDARD.decode(entry["b64_json"].as_str().unwrap()).unwrap()
}

/// A signed URL, split into path, `expires` and `signature`.
fn parts<'a>(app: &TestApp, url: &'a str) -> (&'a str, &'a str, &'a str) {
    let (path, query) = url.strip_prefix(app.url.as_str()).unwrap().split_once('?').unwrap();
    let (expires, signature) = query
        .strip_prefix("expires=")
        .unwrap()
        .split_once("&signature=")
        .unwrap();
    (path, expires, signature)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_of_a_larger_request_is_drawn_alone() {
    let app = TestApp::start().await;
    let body = json!({"prompt": "a red car", "n": 3, "seed": 7, "response_format": "b64_json"});
    let (status, all) = app.post(ROUTE, body).await;
    assert_eq!(status, 200, "{all}");
    let all = all["data"].as_array().unwrap();
    let body = json!({"prompt": "a red car", "seed": 7, "first_index": 2, "response_format": "b64_json"});
    let (_, alone) = app.post(ROUTE, body).await;
    assert_eq!(alone["data"][0]["b64_json"], all[2]["b64_json"]);
    assert_eq!(
        (&alone["data"][0]["index"], &alone["data"][0]["seed"]),
        (&json!(2), &json!(7))
    );
    assert_ne!(all[1]["b64_json"], all[2]["b64_json"]);
    let usage = &alone["usage"];
    assert_eq!(usage["output_tokens"], 144);
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["input_tokens"].as_u64().unwrap() + 144
    );
    assert_eq!(usage["input_tokens_details"]["text_tokens"], usage["input_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_of_openai_are_accepted_where_they_change_nothing() {
    let app = TestApp::start().await;
    let plain = json!({"prompt": "a cat", "seed": 1, "response_format": "b64_json"});
    let (_, first) = app.post(ROUTE, plain.clone()).await;
    let mut same = plain;
    for (name, value) in [
        ("model", "coar-pocket"),
        ("quality", "high"),
        ("background", "opaque"),
        ("moderation", "low"),
        ("style", "natural"),
        ("user", "somebody"),
        ("size", "auto"),
    ] {
        same[name] = value.into();
    }
    same["output_compression"] = 100.into();
    let (status, second) = app.post(ROUTE, same).await;
    assert_eq!(status, 200, "{second}");
    assert_eq!(first["data"], second["data"]);
    for (refused, param, code) in [
        (
            json!({"prompt": "a", "output_compression": 50}),
            "output_compression",
            "unsupported_value",
        ),
        (
            json!({"prompt": "a", "output_format": "webp", "output_compression": 101}),
            "output_compression",
            "invalid_value",
        ),
        (
            json!({"prompt": "a", "output_format": "gif"}),
            "output_format",
            "invalid_value",
        ),
        (
            json!({"prompt": "a", "partial_images": 1}),
            "partial_images",
            "unsupported_value",
        ),
        (
            json!({"prompt": "a", "partial_images": 4, "stream": true}),
            "partial_images",
            "invalid_value",
        ),
        (
            json!({"prompt": "a", "quality": "ultra"}),
            "quality",
            "unsupported_value",
        ),
        (
            json!({"prompt": "a", "first_index": 1_000_001}),
            "first_index",
            "invalid_value",
        ),
        (
            json!({"prompt": "a", "webhook_url": "https://example.com"}),
            "webhook_url",
            "unknown_parameter",
        ),
        (json!({"prompt": "a", "concepts": "rex"}), "concepts", "invalid_value"),
    ] {
        let (status, body) = app.post(ROUTE, refused).await;
        assert_eq!(
            (status, &body["error"]["code"], &body["error"]["param"]),
            (400, &json!(code), &json!(param))
        );
    }
    for (request, param, code) in [
        (
            json!({"prompt": "a", "model": "coar:nobody"}),
            "model",
            "concept_not_found",
        ),
        (json!({"prompt": "a", "model": "coar:"}), "model", "model_not_found"),
        (
            json!({"prompt": "a", "concepts": ["nobody"]}),
            "concepts",
            "concept_not_found",
        ),
    ] {
        let (status, body) = app.post(ROUTE, request).await;
        assert_eq!(
            (status, &body["error"]["code"], &body["error"]["param"]),
            (404, &json!(code), &json!(param))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concepts_are_placed_and_images_say_what_made_them() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let draw = async |more: Value| {
        let mut body = json!({"seed": 3, "response_format": "b64_json"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = app.post(ROUTE, body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let written = draw(json!({"prompt": "a photo of a <rex> cat"})).await;
    let by_model = draw(json!({"prompt": "a photo of a cat", "model": "coar:rex"})).await;
    let by_field = draw(json!({"prompt": "a photo of a cat", "concepts": ["rex"]})).await;
    assert_eq!(written["data"], by_model["data"]);
    assert_eq!(written["data"], by_field["data"]);
    assert_eq!(written["concepts"], by_model["concepts"]);
    assert_eq!(
        (&written["concepts"][0]["name"], &written["concepts"][0]["version"]),
        (&json!("rex"), &json!(1))
    );

    let png = bytes(&written["data"][0]);
    let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
    let text = &reader.info().utf8_text[0];
    assert_eq!(text.keyword, "coar");
    let said: Value = serde_json::from_str(&text.get_text().unwrap()).unwrap();
    assert_eq!((&said["seed"], &said["index"]), (&json!(3), &json!(0)));
    assert_eq!(said["concepts"], written["concepts"]);
    assert_eq!(said["model"], "coar-pocket");
    assert_eq!(said["sampler"], "gumbel_max");
    assert!(said.get("prompt").is_none());

    let webp = bytes(&draw(json!({"prompt": "a cat", "output_format": "webp"})).await["data"][0]);
    let jpeg =
        bytes(&draw(json!({"prompt": "a cat", "output_format": "jpeg", "output_compression": 30})).await["data"][0]);
    let best =
        bytes(&draw(json!({"prompt": "a cat", "output_format": "jpeg", "output_compression": 100})).await["data"][0]);
    assert!(jpeg.len() < best.len());
    let lossy =
        bytes(&draw(json!({"prompt": "a cat", "output_format": "webp", "output_compression": 30})).await["data"][0]);
    assert!(lossy.len() < webp.len());
    let cursor = std::io::Cursor::new;
    let packets = [
        image::codecs::webp::WebPDecoder::new(cursor(&webp))
            .unwrap()
            .xmp_metadata()
            .unwrap(),
        image::codecs::webp::WebPDecoder::new(cursor(&lossy))
            .unwrap()
            .xmp_metadata()
            .unwrap(),
        image::codecs::jpeg::JpegDecoder::new(cursor(&jpeg))
            .unwrap()
            .xmp_metadata()
            .unwrap(),
    ];
    for packet in packets {
        let packet = String::from_utf8(packet.unwrap()).unwrap();
        let inside = packet
            .split("<c:coar>")
            .nth(1)
            .unwrap()
            .split("</c:coar>")
            .next()
            .unwrap();
        let said: Value = serde_json::from_str(inside).unwrap();
        assert_eq!((&said["seed"], &said["concepts"]), (&json!(3), &json!([])));
    }
    for file in [&webp, &lossy, &jpeg] {
        let image = decode(file, &ImageLimits::default()).unwrap();
        assert_eq!((image.width, image.height), (96, 96));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_unfinished_images_and_then_the_image() {
    let app = TestApp::start_with(&["--provenance", "off"]).await;
    let body = json!({"prompt": "a red car", "seed": 7, "n": 2, "stream": true, "partial_images": 2});
    let mut events = Events::open(app.request(Method::POST, ROUTE).json(&body)).await;
    let mut completed = vec![None, None];
    let mut partials = vec![vec![]; 2];
    while let Some((name, data)) = events.next().await {
        assert_eq!(data["type"], name.as_str());
        assert_eq!(
            (&data["size"], &data["output_format"], &data["seed"]),
            (&json!("96x96"), &json!("png"), &json!(7))
        );
        assert!(data["created_at"].as_i64().unwrap() > 1_700_000_000);
        let index = data["index"].as_u64().unwrap() as usize;
        let image = decode(&bytes(&data), &ImageLimits::default()).unwrap();
        match name.as_str() {
            "image_generation.partial_image" => {
                assert_eq!(
                    data["partial_image_index"].as_u64().unwrap() as usize,
                    partials[index].len()
                );
                partials[index].push(image);
            }
            "image_generation.completed" => {
                assert_eq!(data["usage"]["output_tokens"], 144);
                completed[index] = Some((bytes(&data), image));
            }
            other => panic!("an event `{other}`"),
        }
    }
    let body = json!({"prompt": "a red car", "seed": 7, "n": 2, "response_format": "b64_json"});
    let (_, whole) = app.post(ROUTE, body).await;
    let finished: Vec<_> = completed
        .into_iter()
        .map(|one| one.expect("each is completed"))
        .collect();
    for index in 0..2 {
        assert_eq!(finished[index].0, bytes(&whole["data"][index]));
        assert_eq!(partials[index].len(), 2);
        // The decoder sees only a part of the image, so its rows differ slightly from the finished ones, but they are
        // its own.
        let row = 3 * 96;
        let far = |a: &[u8], b: &[u8]| -> u64 {
            let drawn = a.iter().zip(b).take(28 * row);
            drawn.map(|(a, b)| u64::from(a.abs_diff(*b))).sum()
        };
        let unfinished = &partials[index][0].rgb;
        let own = far(unfinished, &finished[index].1.rgb);
        let other = far(unfinished, &finished[1 - index].1.rgb);
        assert!(own * 2 < other, "{own} of its own, {other} of the other's");
        assert!(partials[index][0].rgb[90 * row..].iter().all(|value| *value == 128));
    }
    let png = bytes(&whole["data"][0]);
    let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
    assert!(reader.info().utf8_text.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_up_frees_the_device() {
    let app = TestApp::start_with(&["--rows", "2"]).await;
    let long = json!({"prompt": "a red car", "n": 10, "stream": true, "partial_images": 1});
    let mut events = Events::open(app.request(Method::POST, ROUTE).json(&long)).await;
    let (first, _) = events.next().await.unwrap();
    assert_eq!(first, "image_generation.partial_image");
    drop(events);
    // There is capacity for one image at a time, and nine of the ten are left.
    let (status, _) = app
        .post(ROUTE, json!({"prompt": "a cat", "response_format": "url"}))
        .await;
    assert_eq!(status, 200);
    let (_, metrics) = app.get("/metrics").await;
    let drawn = metrics
        .as_str()
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("coar_images_total "));
    assert!(
        drawn.unwrap().parse::<u32>().unwrap() <= 3,
        "{drawn:?} images were drawn"
    );
    let (_, listed) = app.get("/v1/generations").await;
    assert_eq!(listed["data"].as_array().unwrap().len(), 1, "a stream is not stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_signed_and_need_no_key() {
    let mut app = TestApp::start().await;
    let key = app.create_key("acme", "read,generate").await;
    app.key = Some(key);
    let body = json!({"prompt": "a red car", "output_format": "jpeg", "response_format": "url"});
    let (status, answer) = app.post(ROUTE, body).await;
    assert_eq!(status, 200, "{answer}");
    let url = answer["data"][0]["url"].as_str().unwrap().to_owned();
    let (path, expires, signature) = parts(&app, &url);
    let file = app.client.get(&url).send().await.unwrap();
    assert_eq!(file.status(), 200);
    let headers = file.headers().clone();
    assert_eq!(headers["content-type"], "image/jpeg");
    assert_eq!(headers["x-content-type-options"], "nosniff");
    let cache = headers["cache-control"].to_str().unwrap();
    assert!(
        cache.starts_with("private, max-age=") && cache.ends_with(", immutable"),
        "{cache}"
    );
    let image = decode(&file.bytes().await.unwrap(), &ImageLimits::default()).unwrap();
    assert_eq!((image.width, image.height), (96, 96));
    let again = app
        .client
        .get(&url)
        .header("if-none-match", &headers["etag"])
        .send()
        .await
        .unwrap();
    assert_eq!(again.status(), 304);
    assert!(again.bytes().await.unwrap().is_empty());

    let other = if signature.starts_with('0') { "1" } else { "0" };
    let forged = format!("{other}{}", &signature[1..]);
    for query in [
        String::new(),
        format!("?expires={expires}"),
        format!("?expires={expires}&signature={forged}"),
        format!("?expires=9{expires}&signature={signature}"),
        format!("?expires={expires}&signature=nothex"),
    ] {
        let (status, body) = app.get(&format!("{path}{query}")).await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (404, &json!("image_not_found")),
            "{query}"
        );
    }
    let png = format!(
        "{}?expires={expires}&signature={signature}",
        path.replace(".jpg", ".png")
    );
    assert_eq!(app.get(&png).await.0, 404);
    // The generation is in its tenant's list only; deleting it removes the file.
    let (_, listed) = app.get("/v1/generations").await;
    let generation = &listed["data"][0];
    assert_eq!(generation["images"][0]["url"], url.as_str());
    let id = generation["id"].as_str().unwrap().to_owned();
    let acme = app.key.take();
    app.key = Some(app.create_key("other", "read,generate").await);
    assert_eq!(app.get("/v1/generations").await.1["data"], json!([]));
    let foreign = app.get(&format!("/v1/generations/{id}")).await;
    assert_eq!(
        (foreign.0, &foreign.1["error"]["code"]),
        (404, &json!("generation_not_found"))
    );
    assert_eq!(app.delete(&format!("/v1/generations/{id}")).await, 404);
    app.key = acme;
    assert_eq!(app.delete(&format!("/v1/generations/{id}")).await, 204);
    assert_eq!(app.client.get(&url).send().await.unwrap().status(), 404);
    assert!(app.blobs().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_public_url_begins_the_addresses() {
    let app = TestApp::start_with(&["--public-url", "https://images.example.com/coar/"]).await;
    let body = json!({"prompt": "a red car", "response_format": "url"});
    let (_, answer) = app.post(ROUTE, body).await;
    let url = answer["data"][0]["url"].as_str().unwrap();
    assert!(
        url.starts_with("https://images.example.com/coar/v1/images/image_"),
        "{url}"
    );
}

/// OpenAI's other endpoints report what to use instead, after the whole image has been sent.
#[tokio::test(flavor = "multi_thread")]
async fn edits_and_variations_say_what_to_use_instead() {
    let app = TestApp::start().await;
    for route in ["/v1/images/edits", "/v1/images/variations"] {
        let image = reqwest::multipart::Part::bytes(vec![7; 5 << 20]).file_name("image.png");
        let form = reqwest::multipart::Form::new()
            .text("prompt", "a hat")
            .part("image", image);
        let response = app.request(Method::POST, route).multipart(form).send().await.unwrap();
        assert_eq!(response.status(), 400, "{route}");
        assert_eq!(response.headers()["x-should-retry"], "false");
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], "unsupported_endpoint");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert!(
            body["error"]["message"]
                .as_str()
                .unwrap()
                .contains("/v1/images/generations")
        );
    }
}
