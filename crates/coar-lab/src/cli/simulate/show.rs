//! Reports as tables.

use serde_json::Value;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Prints the output of `run` or `plan`.
pub(super) fn table(report: &Value) {
    let text = |key: &str| report[key].as_str().unwrap_or("?").to_owned();
    println!("{}: {}", text("times"), text("origin"));
    println!(
        "a worker draws {:.3} pictures/s at most\n",
        number(&report["most_pictures_per_second_and_worker"])
    );
    let rows = report["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    match report["kind"].as_str() {
        Some("plan") => plan(rows),
        _ => run(rows),
    }
}

fn plan(rows: &[Value]) {
    println!("pictures/s  trainings/h  p95 goal  workers  at least  p50 s  p95 s  p99 s  busy  rows  refused");
    for row in rows {
        let report = &row["report"];
        let latency = &report["latency"];
        let workers = row["workers"]
            .as_u64()
            .map_or("none".to_owned(), |count| count.to_string());
        println!(
            "{:>10.2}  {:>11.0}  {:>8.1}  {workers:>7}  {:>8}  {:>5.2}  {:>5.2}  {:>5.2}  {:>3.0}%  {:>4.1}  {:>6.2}%",
            number(&row["pictures_per_second"]),
            number(&row["trainings_per_hour"]),
            number(&row["p95"]),
            row["at_least"],
            number(&latency["p50"]),
            number(&latency["p95"]),
            number(&latency["p99"]),
            100.0 * number(&report["utilisation"]),
            number(&report["rows"]),
            100.0 * number(&report["refused"]),
        );
    }
}

fn run(rows: &[Value]) {
    println!(
        "workers  asked/s   done/s  p50 s  p95 s  p99 s  p99.9   max s  1st code  busy  train  rows  refused  warm  cut off  train p95 s"
    );
    for row in rows {
        let report = &row["report"];
        let latency = |key: &str| number(&report["latency"][key]);
        println!(
            "{:>7}  {:>7.2}  {:>7.2}  {:>5.2}  {:>5.2}  {:>5.2}  {:>5.1}  {:>6.1}  {:>8.3}  {:>3.0}%  {:>4.0}%  {:>4.1}  {:>6.2}%  {:>3.0}%  {:>7}  {:>11.0}",
            report["workers"],
            number(&report["pictures_per_second"]),
            number(&report["done_per_second"]),
            latency("p50"),
            latency("p95"),
            latency("p99"),
            latency("p999"),
            latency("largest"),
            number(&report["first_code"]["p50"]),
            100.0 * number(&report["utilisation"]),
            100.0 * number(&report["training"]),
            number(&report["rows"]),
            100.0 * number(&report["refused"]),
            100.0 * number(&report["concept_hits"]),
            report["interrupted"],
            number(&report["trainings"]["duration"]["p95"]),
        );
    }
}
