//! Metrics and the access log.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use coar_core::metrics::TABLE;
use serde_json::{Value, json};

use crate::support::{REX, TestApp};

/// Samples of the text format: `name{labels}` and value.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in `{line}`"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number in `{line}`"));
        assert!(samples.insert(name.to_owned(), value).is_none(), "`{name}` twice");
    }
    samples
}

async fn scrape(app: &TestApp) -> BTreeMap<String, f64> {
    let answer = app.client.get(format!("{}/metrics", app.url)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    parse(&answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_move_when_a_image_is_drawn_and_a_concept_is_trained() {
    // A training's preview images would be counted too.
    let app = TestApp::start_with(&["--training-previews", "0"]).await;
    let before = scrape(&app).await;
    assert_eq!(before["coar_ready"], 1.0);
    assert_eq!(before["coar_images_total"], 0.0);
    assert!(before["coar_kv_cache_bytes"] > 0.0 && before["coar_resident_memory_bytes"] > 1e6);
    let training = app.register_subject(&REX, 6).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let body = json!({"prompt": "a photo of <rex> cat on the beach", "n": 2, "seed": 1, "response_format": "b64_json"});
    for _ in 0..2 {
        assert_eq!(app.post("/v1/images/generations", body.clone()).await.0, 200);
    }
    // A stored generation is a job in the database.
    let kept = json!({"prompt": "a photo of <rex> cat on the beach", "n": 1, "seed": 1});
    assert_eq!(app.post("/v1/generations", kept).await.0, 200);
    assert_eq!(app.get("/nowhere/at/all").await.0, 404);
    let after = app
        .until("the jobs' count", || async {
            let now = scrape(&app).await;
            let ended = now.get(r#"coar_jobs{kind="training",status="succeeded"}"#) == Some(&1.0)
                && now.get(r#"coar_jobs{kind="generation",status="succeeded"}"#) == Some(&1.0);
            // The device thread publishes after its step, which ends after the response.
            let rest = now["coar_batch_images"] == 0.0 && now["coar_http_requests_in_flight"] == 1.0;
            (ended && rest).then_some(now)
        })
        .await;
    let exact = [
        ("coar_images_total", 5.0),
        ("coar_image_decode_seconds_count", 5.0),
        ("coar_decode_codes_total", 5.0 * 144.0),
        (r#"coar_generation_seconds_count{outcome="succeeded"}"#, 3.0),
        ("coar_generation_queue_seconds_count", 3.0),
        ("coar_generation_first_code_seconds_count", 3.0),
        ("coar_generations_waiting", 0.0),
        ("coar_concept_cache_misses_total", 1.0),
        ("coar_concept_cache_hits_total", 2.0),
        ("coar_training_steps_total", 6.0),
        ("coar_training_step_seconds_count", 6.0),
        ("coar_kv_cache_rows_used", 0.0),
        (
            r#"coar_http_request_seconds_count{method="POST",route="/v1/images/generations",status="2xx"}"#,
            2.0,
        ),
        (
            r#"coar_http_request_seconds_count{method="GET",route="unmatched",status="4xx"}"#,
            1.0,
        ),
    ];
    for (name, value) in exact {
        assert_eq!(after.get(name), Some(&value), "{name}");
    }
    for name in [
        "coar_decode_step_seconds_sum",
        "coar_batch_fill_ratio_sum",
        "coar_decode_tokens_per_second",
        "coar_prefill_seconds_count",
        "coar_concept_cache_bytes",
        "coar_training_last_loss",
        "coar_device_generation_seconds_total",
        "coar_device_training_seconds_total",
        "coar_http_response_bytes_total",
        "coar_uptime_seconds",
    ] {
        assert!(after[name] > 0.0, "{name}");
    }
    // By now every metric of the table is exported, and no other.
    let told: BTreeSet<&str> = after.keys().map(|sample| base(sample)).collect();
    let known: BTreeSet<&str> = TABLE.iter().map(|metric| metric.name).collect();
    assert_eq!(told, known);
    // Labels contain no names of customers' objects.
    assert!(after.keys().all(|sample| !sample.contains("rex")));
}

/// A sample's metric: without labels and the suffixes of histograms.
fn base(sample: &str) -> &str {
    let name = sample.split('{').next().unwrap_or(sample);
    let histogram = |name: &str| {
        TABLE
            .iter()
            .any(|metric| metric.name == name && !metric.buckets.is_empty())
    };
    ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|end| name.strip_suffix(end).filter(|name| histogram(name)))
        .unwrap_or(name)
}

/// Changing this list breaks dashboards and alerts that use it.
#[test]
fn the_names_of_the_metrics() {
    let names: Vec<&str> = TABLE.iter().map(|metric| metric.name).collect();
    assert_eq!(names.join("\n"), include_str!("metrics.txt").trim_end());
}

/// Metrics that a text names.
fn named(text: &str) -> BTreeSet<&str> {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices("coar_")
        .filter(|(at, _)| !text[..*at].ends_with(letter))
        .map(|(at, _)| text[at..].split(|c| !letter(c)).next().unwrap_or(""))
        .collect()
}

#[test]
fn the_dashboard_shows_every_metric_and_no_other() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docker/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(dashboard["templating"]["list"][0]["type"], "datasource");
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut shown = BTreeSet::new();
    for panel in panels {
        assert!(
            ids.insert(panel["id"].as_i64().unwrap()),
            "two panels have one id: {panel}"
        );
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
        for target in panel["targets"].as_array().unwrap() {
            shown.extend(named(target["expr"].as_str().unwrap()).into_iter().map(base));
        }
    }
    let known: BTreeSet<&str> = TABLE.iter().map(|metric| metric.name).collect();
    assert_eq!(shown, known);
}

/// The access log of a server after a few requests.
#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_has_one_json_line_for_each_request() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--device",
            "cpu",
            "--log-format",
            "json",
            "--data",
        ])
        .arg(dir.path().join("data"))
        .env("COAR_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut first).unwrap();
    let url = first.trim().strip_prefix("listening on ").unwrap().to_owned();
    coar::client::install_tls();
    let client = reqwest::Client::new();
    // Metrics respond before the model is loaded.
    let early = client.get(format!("{url}/metrics")).send().await.unwrap();
    assert_eq!(early.status(), 200);
    parse(&early.text().await.unwrap());
    let mut answers = Vec::new();
    for _ in 0..2 {
        let request = client
            .get(format!("{url}/v1/concepts/secret-name"))
            .header("x-request-id", "asked-1");
        let answer = request.send().await.unwrap();
        answers.push((answer.status().as_u16(), answer.text().await.unwrap().len()));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let log = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    child.wait().unwrap();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let told: Vec<&Value> = lines.iter().filter(|line| line["message"] == "http").collect();
    assert_eq!(told.len(), 2, "{log}");
    for (line, (status, bytes)) in told.iter().zip(answers) {
        assert_eq!(line["route"], "/v1/concepts/{name}");
        assert_eq!(
            (&line["method"], &line["request_id"]),
            (&json!("GET"), &json!("asked-1"))
        );
        assert_eq!(
            (line["status"].as_u64(), line["bytes"].as_u64()),
            (Some(status.into()), Some(bytes as u64))
        );
        assert!(line["ms"].is_u64() && line["complete"] == true, "{line}");
    }
    assert!(!log.contains("secret-name"), "{log}");
}
