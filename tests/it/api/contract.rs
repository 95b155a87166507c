//! The request bodies in `/openapi.json` are those that the handlers read, field by field.

use reqwest::Method;
use reqwest::multipart::Form;
use serde_json::{Map, Value, json};

use crate::support::{REX, TestApp, answer, image_part, images};

/// A value that no field accepts: the error names the field that contains it.
fn wrong() -> Value {
    json!([[]])
}

const UNKNOWN: &str = "surprise";

/// Resolves a reference, and of two alternatives the one that is not null.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(reference) = schema["$ref"].as_str() {
        let found = document.pointer(reference.trim_start_matches('#'));
        return resolved(document, found.expect("the reference resolves"));
    }
    let choices = schema["oneOf"].as_array().or(schema["anyOf"].as_array());
    match choices.and_then(|choices| choices.iter().find(|choice| choice["type"] != "null")) {
        Some(choice) => resolved(document, choice),
        None => schema,
    }
}

/// The required properties, each with a valid value.
fn required(document: &Value, schema: &Value) -> Map<String, Value> {
    let names = schema["required"].as_array().map(Vec::as_slice).unwrap_or_default();
    let value = |name: &Value| {
        let name = name.as_str().unwrap();
        let example = &resolved(document, &schema["properties"][name])["example"];
        assert!(!example.is_null(), "`{name}` has no example");
        (name.to_owned(), example.clone())
    };
    names.iter().map(value).collect()
}

/// Status, code and parameter of a refusal.
fn refusal(refused: &(u16, Value)) -> (u16, &str, &str) {
    let text = |field: &str| refused.1["error"][field].as_str().unwrap_or("");
    (refused.0, text("code"), text("param"))
}

async fn json_body(app: &TestApp, document: &Value, (method, path): (&Method, &str), schema: &Value) {
    assert_eq!(schema["additionalProperties"], json!(false), "{method} {path}");
    let least = required(document, schema);
    let send = |mut body: Map<String, Value>, name: &str, value: Value| {
        body.insert(name.to_owned(), value);
        answer(app.request(method.clone(), path).json(&body))
    };
    for (name, property) in schema["properties"].as_object().expect("it has properties") {
        let refused = send(least.clone(), name, wrong()).await;
        assert_eq!(
            refusal(&refused),
            (400, "invalid_value", name.as_str()),
            "{method} {path}: {refused:?}"
        );
        let inner = resolved(document, property)["properties"].as_object();
        for part in inner.into_iter().flat_map(Map::keys) {
            let refused = send(least.clone(), name, json!({part: wrong()})).await;
            assert_eq!(
                refusal(&refused),
                (400, "invalid_value", part.as_str()),
                "{method} {path}: {refused:?}"
            );
            let refused = send(least.clone(), name, json!({UNKNOWN: 1})).await;
            assert_eq!(
                refusal(&refused),
                (400, "unknown_parameter", UNKNOWN),
                "{method} {path}: {refused:?}"
            );
        }
    }
    let refused = send(least, UNKNOWN, json!(1)).await;
    assert_eq!(
        refusal(&refused),
        (400, "unknown_parameter", UNKNOWN),
        "{method} {path}: {refused:?}"
    );
}

async fn form_body(app: &TestApp, path: &str, schema: &Value) {
    for name in schema["properties"].as_object().expect("it has properties").keys() {
        let form = match name.as_str() {
            "images" => Form::new().part("images", image_part(images(&REX, 1).remove(0))),
            _ => Form::new().text(name.clone(), "x"),
        };
        let form = form.text(UNKNOWN, "x");
        let refused = answer(app.request(Method::POST, path).multipart(form)).await;
        // Parts are read in order: either this one is refused for its value, or the next one.
        let (status, code, param) = refusal(&refused);
        let known = (code, param) == ("unknown_parameter", UNKNOWN) || (code, param) == ("invalid_value", name);
        assert!(status == 400 && known, "{path} `{name}`: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_described_field_is_read_and_an_unknown_one_refused() {
    let app = TestApp::start().await;
    let (_, document) = app.get("/openapi.json").await;
    let (mut bodies, mut forms) = (0, 0);
    for (template, operations) in document["paths"].as_object().unwrap() {
        // Bodies are read before anything is looked up.
        let path: Vec<&str> = template
            .split('/')
            .map(|part| if part.starts_with('{') { "nothing" } else { part })
            .collect();
        let path = path.join("/");
        for (method, operation) in operations.as_object().unwrap() {
            let content = &operation["requestBody"]["content"];
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let schema = |kind: &str| Some(resolved(&document, content.get(kind)?.get("schema")?));
            if let Some(schema) = schema("application/json") {
                json_body(&app, &document, (&method, &path), schema).await;
                bodies += 1;
            }
            if let Some(schema) = schema("multipart/form-data") {
                form_body(&app, &path, schema).await;
                forms += 1;
            }
        }
    }
    assert!(bodies >= 7 && forms >= 1, "{bodies} bodies, {forms} forms");
    // Nothing was created.
    let (_, concepts) = app.get("/v1/concepts").await;
    assert_eq!(concepts["data"], json!([]));
}

/// One line for each operation, response and property of the document, without its prose.
fn summary(document: &Value) -> String {
    let mut lines = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let parameters: Vec<_> = parameters
                .iter()
                .map(|parameter| {
                    format!(
                        "{}:{}",
                        parameter["in"].as_str().unwrap(),
                        parameter["name"].as_str().unwrap()
                    )
                })
                .collect();
            let responses: Vec<_> = operation["responses"].as_object().unwrap().keys().cloned().collect();
            lines.push(format!(
                "{} {path} {} [{}] -> {}",
                method.to_uppercase(),
                operation["operationId"].as_str().unwrap(),
                parameters.join(" "),
                responses.join(" ")
            ));
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        let required: Vec<_> = schema["required"].as_array().into_iter().flatten().collect();
        lines.push(format!("{name}: {}", kind(schema)));
        for (property, of) in schema["properties"].as_object().into_iter().flatten() {
            let mark = if required.iter().any(|name| *name == property) {
                "!"
            } else {
                ""
            };
            lines.push(format!("  {property}{mark}: {}", kind(of)));
        }
    }
    lines.join("\n")
}

/// A schema's type in a word or two.
fn kind(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return reference.rsplit('/').next().unwrap_or("").to_owned();
    }
    for choices in ["oneOf", "anyOf", "allOf"] {
        if let Some(choices) = schema[choices].as_array() {
            return choices.iter().map(kind).collect::<Vec<_>>().join(" | ");
        }
    }
    let word = match &schema["type"] {
        Value::String(word) => word.clone(),
        Value::Array(words) => words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" | "),
        _ => "any".to_owned(),
    };
    match (&schema["items"], schema["enum"].as_array()) {
        (items, _) if items.is_object() => format!("{word} of {}", kind(items)),
        (_, Some(values)) => format!("{word} {}", Value::from(values.clone())),
        _ => word,
    }
}

/// What callers see changes only on purpose: `INSTA_UPDATE=always cargo test -p coar --test it snapshots` rewrites the
/// files, and the difference is reviewed.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_the_document_and_of_every_object() {
    let app = TestApp::start().await;
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.set_sort_maps(true);
    let _bound = settings.bind_to_scope();
    let (_, document) = app.get("/openapi.json").await;
    insta::assert_snapshot!("openapi", summary(&document));

    let training = app.register_subject(&REX, 2).await;
    let ended = app.until_ended(&training).await;
    let hidden = "[changes from run to run]";
    insta::assert_json_snapshot!("training", ended, {
        ".**.id" => hidden, ".**.concept_id" => hidden, ".**.created_at" => hidden, ".**.started_at" => hidden,
        ".**.finished_at" => hidden, ".**.loss" => hidden, ".**.losses" => hidden, ".**.report" => hidden,
        ".**.version_hash" => hidden, ".**.hash" => hidden, ".**.seconds" => hidden, ".**.estimated_finish_at" => hidden,
        ".**.input_fingerprint" => hidden, ".**.preview" => hidden, ".**.previews" => hidden,
        ".**.checkpoint_bytes" => hidden, ".**.steps_per_second" => hidden,
    });
    let (_, concept) = app.get("/v1/concepts/rex").await;
    insta::assert_json_snapshot!("concept", concept, {
        ".**.id" => hidden, ".**.concept_id" => hidden, ".**.created_at" => hidden, ".**.updated_at" => hidden,
        ".**.started_at" => hidden, ".**.finished_at" => hidden, ".**.loss" => hidden, ".**.losses" => hidden,
        ".**.hash" => hidden, ".**.version_hash" => hidden, ".**.report" => hidden, ".**.training_id" => hidden,
        ".**.input_fingerprint" => hidden, ".**.estimated_finish_at" => hidden, ".**.previews" => hidden,
        ".**.steps_per_second" => hidden,
    });
    let (_, generation) = app
        .post("/v1/generations", json!({"prompt": "a red car", "seed": 7}))
        .await;
    insta::assert_json_snapshot!("generation", generation, {
        ".**.id" => hidden, ".**.created_at" => hidden, ".**.started_at" => hidden, ".**.finished_at" => hidden,
        ".**.expires_at" => hidden, ".**.url" => hidden, ".**.content_hash" => hidden,
    });
    let (_, refused) = app
        .post("/v1/generations", json!({"prompt": "a red car", "n": 11}))
        .await;
    insta::assert_json_snapshot!("refusal", refused, { ".**.request_id" => hidden });
}
