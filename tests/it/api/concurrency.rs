//! Many concurrent callers, and a slow blob store: no request is refused because of it, and none waits for another.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::support::{REX, TestApp, answer, form_named};

/// The longest time that a response may take.
const LONGEST: Duration = Duration::from_secs(1);
/// Delay of the slow store for each request.
const SLOW: Duration = Duration::from_secs(2);

/// Sends all requests at once; returns each one's status and time.
async fn at_once(requests: Vec<RequestBuilder>) -> Vec<(u16, Duration)> {
    join_all(requests.into_iter().map(|request| async move {
        let began = Instant::now();
        (answer(request).await.0, began.elapsed())
    }))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_callers_change_delete_and_import() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 1).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let weights = app.request(Method::GET, "/v1/concepts/rex/weights");
    let file = weights.send().await.unwrap().bytes().await.unwrap();
    let import = |name: &str| {
        let path = format!("/v1/concepts/import?name={name}");
        app.request(Method::POST, &path).body(file.clone())
    };
    let names: Vec<String> = (0..24).map(|number| format!("c{number}")).collect();
    for name in &names {
        assert_eq!(answer(import(name)).await.0, 201);
    }
    let mut requests = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let path = format!("/v1/concepts/{name}");
        requests.push(match number % 2 {
            0 => app.request(Method::DELETE, &path),
            _ => app
                .request(Method::PATCH, &path)
                .json(&json!({"description": "changed"})),
        });
    }
    requests.extend((0..8).map(|number| import(&format!("new{number}"))));
    let answers = at_once(requests).await;
    let longest = answers.iter().map(|(_, took)| *took).max();
    println!("32 callers: the longest answer took {longest:?}");
    assert!(answers.iter().all(|(status, _)| *status < 300), "{answers:?}");
    assert!(longest < Some(LONGEST), "{answers:?}");
    let (_, listed) = app.get("/v1/concepts?limit=100").await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1 + 12 + 8));
}

/// The S3 server of `tests/faults`, until it is dropped.
struct S3 {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl S3 {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("python3")
            .args([concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/s3.py")])
            .arg(dir.path())
            .arg("0")
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is installed");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("its output is piped"))
            .read_line(&mut line)
            .unwrap();
        let url = line
            .trim()
            .strip_prefix("listening on ")
            .expect("it prints its address")
            .to_owned();
        Self { child, url, _dir: dir }
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.url.clone()),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
        ]
    }

    async fn slow_down(&self, app: &TestApp, delay: Duration) {
        let faults = json!({"errors": 0.0, "delay": delay.as_secs_f64()});
        let asked = app.client.post(format!("{}/-/faults", self.url)).json(&faults);
        assert!(asked.send().await.unwrap().status().is_success());
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A new database if COAR_TEST_DATABASE names a PostgreSQL server: see `scripts/with-postgres.sh`.
async fn database() -> Option<String> {
    let server = std::env::var("COAR_TEST_DATABASE").ok()?;
    sqlx::any::install_default_drivers();
    let name = format!("coar_it_{}", uuid::Uuid::new_v4().simple());
    let pool = sqlx::AnyPool::connect(&server).await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
        .execute(&pool)
        .await
        .unwrap();
    Some(format!("--database={}/{name}", server.rsplit_once('/').unwrap().0))
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_tenants_register_while_the_blob_store_is_slow() {
    let s3 = S3::start();
    let mut flags = vec!["--blobs=s3://bucket/coar".to_owned()];
    flags.extend(database().await);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut app = TestApp::start_in("warn", &flags, &s3.variables()).await;
    // Without keys the caller is the tenant `default` with all scopes.
    let mut keys = Vec::new();
    for number in 0..=16 {
        let tenant = match number {
            0 => "default".to_owned(),
            _ => format!("t{number}"),
        };
        if number > 0 {
            let (status, made) = app.post("/v1/admin/tenants", json!({"name": tenant})).await;
            assert_eq!(status, 201, "{made}");
        }
        let scopes = json!({"tenant": tenant, "scopes": ["read", "train", "admin"]});
        let (status, made) = app.post("/v1/admin/keys", scopes).await;
        assert_eq!(status, 201, "{made}");
        let secret = made["secret"].as_str().unwrap().to_owned();
        match number {
            0 => app.key = Some(secret),
            _ => keys.push(secret),
        }
    }
    // A concept to delete in the meantime, whose blobs are slow to remove.
    let (status, body) = app.register(form_named(&REX, "gone")).await;
    assert_eq!(status, 202, "{body}");
    s3.slow_down(&app, SLOW).await;
    let began = Instant::now();
    let register = keys.iter().map(|key| {
        let form = form_named(&REX, "rex").text("steps", "1");
        let request = app.client.post(format!("{}/v1/concepts", app.url)).bearer_auth(key);
        answer(request.multipart(form))
    });
    let delete = app.delete("/v1/concepts/gone");
    let mut longest = Duration::ZERO;
    let done = std::sync::atomic::AtomicBool::new(false);
    let others = async {
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let asked = Instant::now();
            let quotas = json!({"quotas": {"concepts": 10}});
            let change = app.request(Method::PATCH, "/v1/admin/tenants/t1").json(&quotas);
            let (status, body) = answer(change).await;
            assert_eq!(status, 200, "{body}");
            longest = longest.max(asked.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let all = async {
        let all = tokio::join!(join_all(register), delete);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        all
    };
    let ((registered, deleted), ()) = tokio::join!(all, others);
    let took = began.elapsed();
    s3.slow_down(&app, Duration::ZERO).await;
    println!("16 tenants took {took:?}; the longest write beside them {longest:?}");
    let refused: Vec<&(u16, Value)> = registered.iter().filter(|(status, _)| *status != 202).collect();
    assert!(refused.is_empty() && deleted == 204, "{deleted} {refused:?}");
    assert!(longest < LONGEST, "a write beside them took {longest:?}");
    // All tenants register at the same time, each three images one after the other, which may first have to wait until
    // the same three are removed.
    assert!(took < 8 * SLOW, "they took {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_without_a_row_are_not_taken_for_those_that_others_have_ended() {
    let Some(flag) = database().await else { return };
    let s3 = S3::start();
    let app = TestApp::start_in("warn", &["--blobs=s3://bucket/coar", &flag], &s3.variables()).await;
    // Takes longer than the poll interval of the database.
    let body = json!({"prompt": "a cat", "n": 10, "response_format": "b64_json"});
    for _ in 0..2 {
        let began = Instant::now();
        let (status, drawn) = app.post("/v1/images/generations", body.clone()).await;
        assert_eq!(status, 200, "{drawn} after {:?}", began.elapsed());
    }
}
