//! Every route with another tenant's key and identifiers: refused with the same bytes as for unknown identifiers.
//!
//! The routes are read from `/openapi.json`, so that new ones are tested as soon as they are described. A route whose
//! parameters this file does not know fails the test.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{REX, TestApp};

/// Routes that must be among them.
const BY_NAME: &[(&str, &str)] = &[
    ("GET", "/v1/concepts/{name}"),
    ("DELETE", "/v1/concepts/{name}"),
    ("GET", "/v1/concepts/{name}/weights"),
    ("GET", "/v1/trainings/{id}"),
    ("POST", "/v1/trainings/{id}/cancel"),
    ("GET", "/v1/images/{file}"),
];
const LISTS: &[&str] = &["/v1/concepts", "/v1/models"];

/// Identifiers of the first tenant's objects, or of objects that do not exist.
struct Things {
    concept: String,
    concept_id: String,
    training: String,
    generation: String,
    image: String,
    key: String,
    tenant: String,
}

impl Things {
    fn unknown() -> Self {
        let id = |kind: &str| format!("{kind}_01990000000070008000000000000000");
        Self {
            concept: "zyx".into(),
            concept_id: id("concept"),
            training: id("training"),
            generation: id("generation"),
            image: id("image"),
            key: id("key"),
            // The same length as the other's name: lengths are compared too.
            tenant: "nothing".into(),
        }
    }

    /// Every path of a template: a concept has a name and an identifier.
    fn paths(&self, template: &str) -> Vec<String> {
        let mut parts = template.trim_start_matches('/').splitn(3, '/');
        let (Some("v1"), Some(room)) = (parts.next(), parts.next()) else {
            panic!("{template} is a new kind of route: add its parameters here");
        };
        let first = match room {
            "concepts" => vec![self.concept.clone(), self.concept_id.clone()],
            "trainings" => vec![self.training.clone()],
            "generations" => vec![self.generation.clone()],
            "images" => vec![format!("{}.png", self.image)],
            "models" => vec![format!("coar:{}", self.concept)],
            "admin" if template.contains("/keys/") => vec![self.key.clone()],
            "admin" => vec![self.tenant.clone()],
            _ => panic!("{template} is a new kind of route: add its parameters here"),
        };
        let fill = |first: String| {
            let begin = template.find('{').expect("it has a parameter");
            let end = template[begin..].find('}').expect("the parameter ends") + begin;
            let filled = format!("{}{first}{}", &template[..begin], &template[end + 1..]);
            // All further parameters are numbers: of images, versions, steps.
            filled
                .split('/')
                .map(|part| if part.starts_with('{') { "0" } else { part })
                .collect::<Vec<_>>()
                .join("/")
        };
        first.into_iter().map(fill).collect()
    }

    /// A response with all identifiers replaced by one word.
    fn hide(&self, text: &str) -> String {
        let all = [
            &self.concept_id,
            &self.training,
            &self.generation,
            &self.image,
            &self.key,
            &self.tenant,
            &self.concept,
        ];
        all.into_iter()
            .fold(text.to_owned(), |text, name| text.replace(name.as_str(), "THIS"))
    }
}

/// Method and path of every operation, either with or without parameters in its path.
fn described(document: &Value, with: bool) -> Vec<(String, String)> {
    let paths = document["paths"].as_object().expect("the document has paths");
    let operations = paths.iter().filter(|(path, _)| path.contains('{') == with);
    operations
        .flat_map(|(path, operations)| {
            let methods = operations.as_object().expect("a path has operations").keys();
            methods
                .filter(|method| ["get", "put", "post", "patch", "delete"].contains(&method.as_str()))
                .map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect()
}

/// Status, headers except the date, and body.
type Answer = (u16, Vec<(String, String)>, String);

async fn ask(app: &TestApp, method: &str, path: &str, body: Option<&Value>) -> Answer {
    let request = app.request(Method::from_bytes(method.as_bytes()).unwrap(), path);
    let request = match (method, body) {
        (_, Some(body)) => request.json(body),
        ("POST" | "PUT" | "PATCH", None) => request.json(&json!({})),
        _ => request,
    };
    let response = request.header("x-request-id", "same").send().await.unwrap();
    let text = |value: &reqwest::header::HeaderValue| value.to_str().unwrap().to_owned();
    let headers = response.headers().iter().filter(|(name, _)| *name != "date");
    let mut headers: Vec<_> = headers.map(|(name, value)| (name.to_string(), text(value))).collect();
    headers.sort();
    (response.status().as_u16(), headers, response.text().await.unwrap())
}

/// Median response times. The paths take turns, so that other load on the machine affects both.
async fn medians(app: &TestApp, paths: [&str; 2]) -> [Duration; 2] {
    let mut times = [vec![], vec![]];
    for _ in 0..300 {
        for (path, times) in paths.iter().zip(&mut times) {
            let begun = Instant::now();
            let (status, ..) = ask(app, "GET", path, None).await;
            times.push(begun.elapsed());
            assert_eq!(status, 404, "{path}");
        }
    }
    times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    })
}

/// Other tenants' objects are not read: their responses take as long as those for objects that do not exist.
async fn times_tell_nothing(app: &TestApp, own: &Things, unknown: &Things) {
    for (foreign, absent) in [
        (
            format!("/v1/concepts/{}", own.concept),
            format!("/v1/concepts/{}", unknown.concept),
        ),
        (
            format!("/v1/trainings/{}", own.training),
            format!("/v1/trainings/{}", unknown.training),
        ),
        (
            format!("/v1/generations/{}", own.generation),
            format!("/v1/generations/{}", unknown.generation),
        ),
    ] {
        let [one, other] = medians(app, [&foreign, &absent]).await;
        let bound = one.min(other) / 2 + Duration::from_micros(200);
        assert!(
            one.abs_diff(other) < bound,
            "{foreign}: {one:?}, where nothing is {other:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_hides_what_is_another_tenants() {
    let mut app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let (_, drawn) = app
        .post(
            "/v1/images/generations",
            json!({"prompt": "a <rex> cat", "response_format": "url"}),
        )
        .await;
    let url = drawn["data"][0]["url"].as_str().unwrap();
    let image = url[url.find("image_").expect("it names the image")..]
        .split('.')
        .next()
        .unwrap();
    let (_, concept) = app.get("/v1/concepts/rex").await;
    // If generations are stored, the newest is the one that was just drawn.
    let (_, generations) = app.get("/v1/generations").await;
    let generation = generations["data"][0]["id"].as_str().map(str::to_owned);
    let home = app.create_key("default", "read,generate,train,admin").await;
    let other = app.create_key("acme", "read,generate,train").await;
    app.key = Some(home.clone());
    let (_, keys) = app.get("/v1/admin/keys").await;
    let unknown = Things::unknown();
    let own = Things {
        concept: "rex".into(),
        concept_id: concept["id"].as_str().unwrap().into(),
        training,
        generation: generation.unwrap_or_else(|| unknown.generation.clone()),
        image: image.into(),
        key: keys["data"][1]["id"].as_str().unwrap().into(),
        tenant: "default".into(),
    };
    let (_, document) = app.get("/openapi.json").await;
    app.key = Some(other);
    let mut tried: BTreeSet<_> = described(&document, true).into_iter().collect();
    tried.extend(
        BY_NAME
            .iter()
            .map(|(method, path)| ((*method).to_owned(), (*path).to_owned())),
    );
    for (method, template) in &tried {
        for (foreign, absent) in own.paths(template).iter().zip(unknown.paths(template)) {
            let (status, headers, body) = ask(&app, method, foreign, None).await;
            assert!([403, 404].contains(&status), "{method} {foreign}: {status} {body}");
            let nothing = ask(&app, method, &absent, None).await;
            let shown = (status, headers, own.hide(&body));
            assert_eq!(
                shown,
                (nothing.0, nothing.1, unknown.hide(&nothing.2)),
                "{method} {foreign}"
            );
        }
    }
    times_tell_nothing(&app, &own, &unknown).await;
    lists_show_nothing(&app, &document, &own).await;
    bodies_reach_nothing(&app, &own, &unknown).await;
    // Everything still exists.
    app.key = Some(home);
    for path in [
        "/v1/concepts/rex".to_owned(),
        format!("/v1/trainings/{}", own.training),
        "/v1/concepts/rex/weights".to_owned(),
    ] {
        assert_eq!(app.get(&path).await.0, 200, "{path}");
    }
    assert_eq!(
        app.client
            .get(url)
            .bearer_auth(app.key.as_ref().unwrap())
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
}

async fn lists_show_nothing(app: &TestApp, document: &Value, own: &Things) {
    let mut lists: BTreeSet<_> = described(document, false)
        .into_iter()
        .filter(|(method, path)| method == "GET" && path.starts_with("/v1/"))
        .map(|(_, path)| path)
        .collect();
    lists.extend(LISTS.iter().map(ToString::to_string));
    for path in lists {
        let (status, _, body) = ask(app, "GET", &path, None).await;
        let admin = path.starts_with("/v1/admin/");
        assert_eq!(status, if admin { 403 } else { 200 }, "{path}: {body}");
        for name in [&own.concept_id, &own.training, &own.generation, &own.image, &own.key] {
            assert!(!body.contains(name.as_str()), "{path} shows {name}: {body}");
        }
        assert!(!body.contains("rex"), "{path}: {body}");
    }
}

/// Names of concepts in bodies.
async fn bodies_reach_nothing(app: &TestApp, own: &Things, unknown: &Things) {
    for path in ["/v1/images/generations", "/v1/generations"] {
        for body in [
            json!({"prompt": "a <NAME> cat"}),
            json!({"prompt": "a cat", "model": "coar:NAME"}),
            json!({"prompt": "a cat", "concepts": ["NAME"]}),
        ] {
            let with = |name: &str| serde_json::from_str(&body.to_string().replace("NAME", name)).unwrap();
            let foreign = ask(app, "POST", path, Some(&with(&own.concept))).await;
            let absent = ask(app, "POST", path, Some(&with(&unknown.concept))).await;
            assert!((400..500).contains(&foreign.0), "{path} {body}: {foreign:?}");
            assert_eq!(
                (foreign.0, foreign.1, own.hide(&foreign.2)),
                (absent.0, absent.1, unknown.hide(&absent.2)),
                "{path} {body}"
            );
        }
    }
}
