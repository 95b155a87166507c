//! `coar-lab bench device-report`: generates the document from the JSON lines of a report of `coar-lab bench
//! device`.

mod layout;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value};

use layout::{Column, FIGURES, LIMITS, PARTS, TABLES, Table};

/// Write docs/performance-gpu.md from a report of `coar-lab bench device`. Missing values become `not measured`. If
/// reports of several runs are concatenated, each part is taken from the last run that started it.
#[derive(Debug, Args)]
pub(in crate::cli) struct DeviceReportArgs {
    /// Folder of report.jsonl.
    dir: PathBuf,
    /// The document to write.
    #[arg(long, value_name = "FILE", default_value = "docs/performance-gpu.md")]
    out: PathBuf,
}

const ABSENT: &str = "not measured";

/// A parsed report.
#[derive(Debug, Default)]
struct Report {
    /// The first line of each run.
    runs: Vec<Map<String, Value>>,
    /// The last line of each part that ended, with the number of its run.
    ends: BTreeMap<String, Value>,
    /// Figures of each part, as they were written.
    figures: BTreeMap<String, Map<String, Value>>,
}

impl Report {
    /// Lines that are not JSON objects, such as the last one of a killed run, are skipped.
    fn read(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            let Ok(Value::Object(event)) = serde_json::from_str(line) else {
                continue;
            };
            let part = event.get("part").and_then(Value::as_str).unwrap_or_default().to_owned();
            match event.get("event").and_then(Value::as_str) {
                Some("run") => report.runs.push(event),
                Some("begin") => {
                    report.figures.remove(&part);
                    report.ends.remove(&part);
                }
                Some("figure") => report.add_figure(part, &event),
                Some("end") => {
                    if let Some(Value::Object(figures)) = event.get("figures") {
                        report.figures.insert(part.clone(), figures.clone());
                    }
                    let mut event = event;
                    event.insert("run".to_owned(), report.runs.len().into());
                    report.ends.insert(part, Value::Object(event));
                }
                _ => {}
            }
        }
        report
    }

    fn add_figure(&mut self, part: String, event: &Map<String, Value>) {
        let Some(name) = event.get("name").and_then(Value::as_str) else {
            return;
        };
        let figures = self.figures.entry(part).or_default();
        match (event.get("value"), event.get("row")) {
            (Some(value), _) => drop(figures.insert(name.to_owned(), value.clone())),
            (None, Some(row)) => {
                let rows = figures.entry(name).or_insert_with(|| Value::Array(vec![]));
                if let Value::Array(rows) = rows {
                    rows.push(row.clone());
                }
            }
            (None, None) => {}
        }
    }

    fn figure(&self, part: &str, name: &str) -> Option<&Value> {
        self.figures.get(part)?.get(name).filter(|value| !value.is_null())
    }

    /// Checks of a part whose names begin with the prefix.
    fn checks<'a>(&'a self, part: &str, prefix: &'a str) -> impl Iterator<Item = &'a Value> {
        let checks = self.ends.get(part).and_then(|end| end["checks"].as_array());
        checks
            .into_iter()
            .flatten()
            .filter(move |check| check["name"].as_str().is_some_and(|name| name.starts_with(prefix)))
    }
}

/// A value in a table.
fn cell(value: Option<&Value>, decimals: usize) -> String {
    match value {
        None | Some(Value::Null) => ABSENT.to_owned(),
        Some(Value::Number(number)) => match number.as_i64() {
            Some(whole) => whole.to_string(),
            None => format!("{:.decimals$}", number.as_f64().unwrap_or(f64::NAN)),
        },
        Some(Value::String(text)) => sentences(&text.replace(['\n', '|'], " ")),
        Some(other) => other.to_string().replace('|', " "),
    }
}

/// Truncates a long text after the last sentence within the limit.
fn sentences(text: &str) -> String {
    const LONGEST: usize = 240;
    let Some((end, _)) = text.char_indices().nth(LONGEST) else {
        return text.to_owned();
    };
    let head = &text[..end];
    match head.rfind(". ") {
        Some(end) => format!("{} …", &head[..=end]),
        None => format!("{head}…"),
    }
}

/// A limit, without meaningless digits.
fn limit(number: f64) -> String {
    format!("{number:.4}")
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_owned()
}

/// A measured number of a check, to four digits.
fn measured(check: &Value) -> String {
    match check["measured"].as_f64() {
        None => "no number".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(number) if (0.01..1e6).contains(&number.abs()) => {
            let decimals = (3.0 - number.abs().log10().floor()).clamp(0.0, 5.0) as usize;
            format!("{number:.decimals$}")
        }
        Some(number) => format!("{number:.3e}"),
    }
}

/// Lines of a Markdown table.
fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&headings.iter().map(|heading| (*heading).to_owned()).collect::<Vec<_>>());
    text.push_str(&line(&vec!["---".to_owned(); headings.len()]));
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

impl Report {
    fn document(&self) -> String {
        let mut text = String::from(
            "# Performance on a GPU\n\nWritten by `coar-lab bench device-report` from a report of `coar-lab bench device`; edit neither \
             by hand. `not measured` stands wherever the\nreport has nothing. How to run it: \
             [the 7B on a GPU](howto/gpu-7b.md). The figures of a CPU are in [performance](performance.md).\n\n",
        );
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{}\n## What was wanted\n\n{}\n## Parts\n\n{}{}",
            self.head(),
            self.limits(),
            self.parts(),
            self.failed()
        );
        text.push_str("\n## Figures\n\n");
        let figures = FIGURES.map(|(part, name, what, decimals)| {
            vec![
                part.to_owned(),
                what.to_owned(),
                cell(self.figure(part, name), decimals),
            ]
        });
        text.push_str(&table(&["part", "figure", "measured"], &figures));
        for one in TABLES {
            let _ = write!(text, "\n## {}\n\n{}", one.heading, self.table(&one));
        }
        text
    }

    fn head(&self) -> String {
        let none = Map::new();
        let runs: Vec<_> = match &self.runs[..] {
            [] => vec![&none],
            runs => runs.iter().collect(),
        };
        let run = |key: &str| -> Vec<String> {
            let of = |run: &&Map<String, Value>| cell(run.get(key).filter(|value| *value != ""), 0);
            runs.iter().map(of).collect()
        };
        let rows = [
            ("card", run("card")),
            ("device", run("device")),
            ("driver", run("driver")),
            ("libtorch", run("libtorch")),
            ("coar", run("coar")),
            ("commit", run("commit")),
            ("date", run("time")),
            ("model", run("model")),
            ("pixels along a side", run("target_size")),
            ("small", run("small")),
        ];
        let mut rows: Vec<Vec<String>> = rows
            .into_iter()
            .map(|(name, values)| std::iter::once(name.to_owned()).chain(values).collect())
            .collect();
        let mut cudnn = vec!["cuDNN".to_owned(), cell(self.figure("env", "cudnn"), 0)];
        cudnn.resize(runs.len() + 1, String::new());
        rows.push(cudnn);
        let numbers: Vec<String> = (1..=runs.len()).map(|number| format!("run {number}")).collect();
        let headings = match runs.len() {
            1 => vec!["", ""],
            _ => std::iter::once("").chain(numbers.iter().map(String::as_str)).collect(),
        };
        table(&headings, &rows)
    }

    fn limits(&self) -> String {
        let rows = LIMITS.map(|(what, part, prefix)| {
            let number = |check: &Value, key: &str| check[key].as_f64().unwrap_or(f64::NAN);
            // Of several checks the one nearest to its limit or furthest beyond it; NaN is beyond every limit.
            let worst = self.checks(part, prefix).max_by(|one, other| {
                let over = |check: &Value| {
                    let over = number(check, "measured") - number(check, "limit");
                    if over.is_nan() { f64::INFINITY } else { over }
                };
                over(one).total_cmp(&over(other))
            });
            match worst {
                None => vec![what.to_owned(), ABSENT.to_owned(), ABSENT.to_owned(), String::new()],
                Some(check) => vec![
                    what.to_owned(),
                    limit(number(check, "limit")),
                    measured(check),
                    if check["ok"] == true { "yes" } else { "**no**" }.to_owned(),
                ],
            }
        });
        table(&["", "at most", "measured", "kept"], &rows)
    }

    fn parts(&self) -> String {
        let rows = PARTS.map(|part| {
            let Some(end) = self.ends.get(part) else {
                return vec![
                    part.to_owned(),
                    ABSENT.to_owned(),
                    String::new(),
                    String::new(),
                    String::new(),
                ];
            };
            let checks: Vec<&Value> = self.checks(part, "").collect();
            let kept = checks.iter().filter(|check| check["ok"] == true).count();
            let skipped = end["skipped"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str);
            let run = (self.runs.len() > 1).then(|| format!("run {}", cell(end.get("run"), 0)));
            let notes: Vec<String> = end["error"]
                .as_str()
                .map(|error| error.lines().next().unwrap_or("").to_owned())
                .into_iter()
                .chain(run)
                .chain(skipped.map(|what| format!("skipped: {what}")))
                .collect();
            vec![
                part.to_owned(),
                cell(end.get("outcome"), 0),
                cell(end.get("seconds"), 1),
                format!("{kept} of {}", checks.len()),
                notes.join("; ").replace('|', " "),
            ]
        });
        table(&["part", "outcome", "seconds", "checks kept", ""], &rows)
    }

    /// Every failed check, if any.
    fn failed(&self) -> String {
        let of_part = |part: &'static str| {
            let failed = self.checks(part, "").filter(|check| check["ok"] != true);
            failed.map(move |check| {
                let limit = check["limit"].as_f64().unwrap_or(f64::NAN);
                vec![
                    part.to_owned(),
                    cell(check.get("name"), 0),
                    self::limit(limit),
                    measured(check),
                ]
            })
        };
        let rows: Vec<_> = PARTS.into_iter().flat_map(of_part).collect();
        match rows.is_empty() {
            true => String::new(),
            false => format!(
                "\n## Checks that failed\n\n{}",
                table(&["part", "check", "at most", "measured"], &rows)
            ),
        }
    }

    fn table(&self, one: &Table) -> String {
        let rows = self.figure(one.part, one.figure).and_then(Value::as_array);
        let Some(rows) = rows.filter(|rows| !rows.is_empty()) else {
            return format!("{ABSENT}\n");
        };
        // The error column is only shown if there are errors.
        let columns: Vec<&Column> = one
            .columns
            .iter()
            .filter(|(key, ..)| *key != "error" || rows.iter().any(|row| row.get("error").is_some()))
            .collect();
        let headings: Vec<&str> = columns.iter().map(|(_, heading, _)| *heading).collect();
        let cells = |row: &Value| {
            let of = |(key, _, decimals): &&Column| match (*key, row.get(key)) {
                ("error", None) => String::new(),
                (_, value) => cell(value, *decimals),
            };
            columns.iter().map(of).collect::<Vec<_>>()
        };
        table(&headings, &rows.iter().map(cells).collect::<Vec<_>>())
    }
}

impl DeviceReportArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let file = self.dir.join("report.jsonl");
        let text = std::fs::read_to_string(&file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
        std::fs::write(&self.out, Report::read(&text).document())
            .map_err(|error| anyhow::anyhow!("{}: {error}", self.out.display()))?;
        println!("{}", self.out.display());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"event":"run","coar":"0.1.0","time":"2026-11-27T10:30:45Z","device":"cuda:0","card":"NVIDIA H100 80GB HBM3","driver":"580.1","libtorch":"2.11.0","model":"7b random weights","target_size":768,"small":false}
{"event":"begin","part":"parity","at_s":1,"deadline_s":45}
{"event":"end","part":"parity","at_s":9,"seconds":8.25,"outcome":"failed","checks":[{"name":"pocket f32: logits, largest difference","measured":3e-5,"limit":1e-3,"ok":true},{"name":"pocket bf16: logits, relative","measured":null,"limit":1e-2,"ok":false}],"figures":{}}
{"event":"figure","part":"decode","name":"steps","row":{"images":1,"attention":"as chosen","tokens":1100,"step_ms":7.1234,"floor_ms":4.5}}
{"event":"figure","part":"decode","name":"bandwidth_gb_per_second","value":2990.4}
{"event":"end","part":"train","at_s":30,"seconds":20.0,"outcome":"ok","checks":[{"name":"512 pixels, kept: peak over estimate, off by","measured":0.11,"limit":0.15,"ok":true}],"figures":{"steps":[{"side":512,"graph":"kept","step_seconds":0.21}],"training_share":0.49},"skipped":["a: b"]}
{"event":"en"#;

    #[test]
    fn figures_survive_a_killed_part() {
        let text = Report::read(LINES).document();
        for expected in [
            "| card | NVIDIA H100 80GB HBM3 |",
            "| driver | 580.1 |",
            "| date | 2026-11-27T10:30:45Z |",
            "| logits, f32 without TF32: largest difference from the CPU | 0.001 | 3.000e-5 | yes |",
            "| logits, bf16: relative | 0.01 | no number | **no** |",
            "| parity | failed | 8.2 | 1 of 2 |  |",
            "| parity | pocket bf16: logits, relative | 0.01 | no number |",
            "| peak of a step against the estimate: off by, 512 kept | 0.15 | 0.1100 | yes |",
            "| decode | not measured |",
            "| decode | memory read, GB/s | 2990 |",
            "| 1 | as chosen | 1100 | 7.123 |",
            "| 512 | kept | not measured | 0.2100 |",
            "| train | ok | 20.0 | 1 of 1 | skipped: a: b |",
            "| same seed, same image: codes that differ | not measured | not measured |",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn last_run_of_a_part_wins() {
        let second = r#"
{"event":"run","coar":"0.1.0","commit":"abc","card":"NVIDIA H200","driver":"","model":"7b random weights"}
{"event":"begin","part":"decode","at_s":1,"deadline_s":45}
{"event":"figure","part":"decode","name":"steps","row":{"images":1,"attention":"as chosen","tokens":1100,"step_ms":5.5,"floor_ms":4.5}}
{"event":"end","part":"decode","at_s":9,"seconds":4.0,"outcome":"ok","checks":[],"figures":{"steps":[{"images":1,"attention":"as chosen","tokens":1100,"step_ms":5.5}]}}
{"event":"begin","part":"parity","at_s":1,"deadline_s":45}"#;
        let text = Report::read(&format!("{LINES}{second}")).document();
        for expected in [
            "|  | run 1 | run 2 |",
            "| card | NVIDIA H100 80GB HBM3 | NVIDIA H200 |",
            "| driver | 580.1 | not measured |",
            "| 1 | as chosen | 1100 | 5.500 |",
            "| decode | ok | 4.0 | 0 of 0 | run 2 |",
            "| train | ok | 20.0 | 1 of 1 | run 1; skipped: a: b |",
            "| parity | not measured |",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        assert!(!text.contains("7.123"), "{text}");
    }

    #[test]
    fn cells_are_short_and_plain() {
        let of = |number: f64| measured(&serde_json::json!({"measured": number}));
        let found = [0.0, 45.462_175, 225.58, 0.400_59, -6.9e-4, 3e-5].map(of);
        assert_eq!(found, ["0", "45.46", "225.6", "0.4006", "-6.900e-4", "3.000e-5"]);
        let long = format!("Out of memory. {}. {}", "é".repeat(100), "x".repeat(300));
        assert_eq!(sentences(&long), format!("Out of memory. {}. …", "é".repeat(100)));
        assert_eq!(sentences(&"x".repeat(300)), format!("{}…", "x".repeat(240)));
        assert_eq!(sentences("short. one"), "short. one");
    }

    #[test]
    fn document_depends_on_the_numbers() {
        let (before, after) = (
            Report::read(LINES),
            Report::read(&LINES.replace("7.1234", "6.5").replace("0.49", "0.61")),
        );
        let (before, after) = (before.document(), after.document());
        let changed: Vec<_> = before.lines().zip(after.lines()).filter(|(a, b)| a != b).collect();
        assert_eq!(changed.len(), 2, "{changed:?}");
        assert!(after.contains("| 1 | as chosen | 1100 | 6.500 |") && after.contains("| 0.610 |"));
    }

    #[test]
    fn empty_report_has_no_measurements() {
        let text = Report::read("").document();
        let parts = PARTS.map(|part| format!("| {part} | not measured |"));
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(!text.contains("yes") && !text.contains("NaN"), "{text}");
    }

    /// Until a GPU's report is committed there, the document says that nothing was measured.
    #[test]
    fn committed_document_matches_the_committed_report() {
        let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let report = std::fs::read_to_string(docs.join("gpu/report.jsonl")).unwrap_or_default();
        let document = std::fs::read_to_string(docs.join("performance-gpu.md")).unwrap();
        assert_eq!(
            document,
            Report::read(&report).document(),
            "regenerate it: coar-lab bench device-report docs/gpu"
        );
    }
}
