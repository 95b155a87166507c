//! The report of a run: one JSON line per event, flushed at once, so a killed run keeps what it has.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

/// The file of JSON lines.
#[derive(Debug)]
pub(super) struct Report {
    file: Mutex<File>,
    begun: Instant,
}

impl Report {
    /// Creates `report.jsonl` in `dir`, which is created if missing; an earlier report is replaced.
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self {
            file: Mutex::new(File::create(dir.join("report.jsonl"))?),
            begun: Instant::now(),
        })
    }

    /// Seconds since the run began.
    pub fn at(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Writes one line, with paths reduced to file names. If the disk is full the line is lost, not the run.
    pub fn line(&self, event: &Value) {
        let event = named(event);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = writeln!(file, "{event}").and_then(|()| file.flush()) {
            eprintln!("report.jsonl: {error}");
        }
    }
}

/// The same with every path in its texts reduced to the file's name: reports are published, and the location of
/// files is private and irrelevant.
fn named(value: &Value) -> Value {
    match value {
        Value::String(text) => without_paths(text).into(),
        Value::Array(list) => list.iter().map(named).collect(),
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), named(value))).collect(),
        other => other.clone(),
    }
}

/// Replaces absolute paths in a text by file names.
fn without_paths(text: &str) -> String {
    let ends = |c: char| c.is_whitespace() || "\"'`()[]{}<>=:,;|".contains(c);
    text.split_inclusive(ends)
        .map(|piece| {
            let word = piece.trim_end_matches(ends);
            match word.rsplit_once('/') {
                Some((_, name)) if word.starts_with('/') && !word.starts_with("//") && !name.is_empty() => {
                    format!("{name}{}", &piece[word.len()..])
                }
                _ => piece.to_owned(),
            }
        })
        .collect()
}

/// A measured number and its upper limit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Check {
    pub name: String,
    /// NaN if there was nothing to measure: such a check fails.
    pub measured: f64,
    pub limit: f64,
    pub ok: bool,
}

/// The outcome of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Ok,
    Failed,
    /// The deadline expired; results up to then are kept.
    Late,
    Skipped,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Late => "late",
            Self::Skipped => "skipped",
        }
    }
}

/// A part's end.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub part: &'static str,
    pub outcome: Outcome,
    pub seconds: f64,
    pub error: Option<String>,
    pub found: Found,
}

/// Checks and figures of one part.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub checks: Vec<Check>,
    pub figures: Map<String, Value>,
    /// What could not be measured on this device, with the reason.
    pub skipped: Vec<String>,
    /// The part has been reported; later results are dropped.
    pub closed: bool,
}

impl Found {
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.ok)
    }
}

/// The deadline of a part has expired.
#[derive(Debug, thiserror::Error)]
#[error("the deadline came before the end")]
pub(super) struct Late;

/// A part cannot run on this device.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Skip(pub String);

/// Collects the results of one part; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Findings {
    part: &'static str,
    found: Arc<Mutex<Found>>,
    report: Arc<Report>,
    deadline: Instant,
}

impl Findings {
    pub fn new(part: &'static str, report: Arc<Report>, time: Duration) -> Self {
        Self {
            part,
            found: Arc::default(),
            report,
            deadline: Instant::now() + time,
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Found) -> T) -> Option<T> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        (!found.closed).then(|| change(&mut found))
    }

    /// Records whether `measured` is at most `limit`.
    pub fn check(&self, name: impl Into<String>, measured: f64, limit: f64) {
        let check = Check {
            name: name.into(),
            measured,
            limit,
            ok: measured <= limit,
        };
        self.with(|found| found.checks.push(check));
    }

    /// Runs one comparison. An error becomes a failed check, so later comparisons still run.
    ///
    /// # Errors
    /// Only [`Late`].
    pub fn attempt(&self, name: &str, compare: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.in_time()?;
        match compare() {
            Err(error) if error.is::<Late>() => Err(error),
            Err(error) => {
                self.check(name, f64::NAN, 0.0);
                self.figure(&format!("{name}: error"), format!("{error:#}"));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Records a figure, and writes it at once.
    pub fn figure(&self, name: &str, value: impl Into<Value>) {
        let value = value.into();
        self.report
            .line(&json!({"event": "figure", "part": self.part, "name": name, "value": value}));
        self.with(|found| found.figures.insert(name.to_owned(), value));
    }

    /// Adds a row to the table `name`, and writes it at once.
    pub fn row(&self, name: &str, row: Value) {
        self.report
            .line(&json!({"event": "figure", "part": self.part, "name": name, "row": row}));
        self.with(|found| {
            let table = found.figures.entry(name).or_insert_with(|| json!([]));
            if let Value::Array(rows) = table {
                rows.push(row);
            }
        });
    }

    /// Sets the part's most important figure, as text.
    pub fn headline(&self, text: String) {
        self.with(|found| found.figures.insert("headline".to_owned(), text.into()));
    }

    /// Records what cannot be measured on this device.
    pub fn skip(&self, what: &str, reason: &str) {
        self.with(|found| found.skipped.push(format!("{what}: {reason}")));
    }

    /// The largest value of the checks whose names begin with `prefix`; NaN if there are none.
    pub fn worst(&self, prefix: &str) -> f64 {
        let largest = |found: &mut Found| {
            let named = found.checks.iter().filter(|check| check.name.starts_with(prefix));
            named.map(|check| check.measured).fold(f64::NAN, f64::max)
        };
        self.with(largest).unwrap_or(f64::NAN)
    }

    /// A figure that was recorded as a number; NaN otherwise.
    pub fn number(&self, name: &str) -> f64 {
        let number = |found: &mut Found| found.figures.get(name).and_then(Value::as_f64);
        self.with(number).flatten().unwrap_or(f64::NAN)
    }

    /// Time until the deadline.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// # Errors
    /// [`Late`] after the deadline.
    pub fn in_time(&self) -> Result<(), Late> {
        match self.left().is_zero() {
            true => Err(Late),
            false => Ok(()),
        }
    }

    /// Takes the results; later ones are dropped.
    pub fn close(&self) -> Found {
        self.with(|found| {
            let all = found.clone();
            found.closed = true;
            all
        })
        .unwrap_or_default()
    }
}

impl Ended {
    /// The final line of a part.
    pub fn line(&self, at: f64) -> Value {
        let mut line = json!({
            "event": "end",
            "part": self.part,
            "at_s": at,
            "seconds": self.seconds,
            "outcome": self.outcome,
            "checks": self.found.checks,
            "figures": self.found.figures,
        });
        if let Some(error) = &self.error {
            line["error"] = error.clone().into();
        }
        if !self.found.skipped.is_empty() {
            line["skipped"] = self.found.skipped.clone().into();
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(dir: &Path, time: Duration) -> Findings {
        Findings::new("parity", Arc::new(Report::create(dir).unwrap()), time)
    }

    #[test]
    fn nan_and_errors_are_failed_checks() {
        let dir = tempfile::tempdir().unwrap();
        let findings = findings(dir.path(), Duration::from_secs(60));
        findings.check("good", 0.5, 0.5);
        findings.check("nothing", f64::NAN, 1.0);
        findings.attempt("broken", || anyhow::bail!("no kernel")).unwrap();
        findings.row("steps", json!({"images": 1}));
        let found = findings.close();
        findings.check("too late", 0.0, 1.0);
        let failed: Vec<_> = found.failed().map(|check| check.name.as_str()).collect();
        assert_eq!(failed, ["nothing", "broken"]);
        assert_eq!(found.figures["broken: error"], "no kernel");
        assert!(findings.close().checks.is_empty());
        let lines = std::fs::read_to_string(dir.path().join("report.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
    }

    #[test]
    fn report_contains_no_folder_names() {
        for (text, expected) in [
            ("0x1ec9 in /tmp/a.0y/coar) | frame", "0x1ec9 in coar) | frame"),
            ("/usr/lib/libcuda.so.580.1", "libcuda.so.580.1"),
            ("open `/data/x.json`: no such file", "open `x.json`: no such file"),
            ("--model=/models/7b --seconds=9", "--model=7b --seconds=9"),
            (
                "3.7 GB/s of 4 GB/s, https://example.org/a, a / b",
                "3.7 GB/s of 4 GB/s, https://example.org/a, a / b",
            ),
        ] {
            assert_eq!(without_paths(text), expected);
        }
        let dir = tempfile::tempdir().unwrap();
        let report = Report::create(dir.path()).unwrap();
        report.line(&json!({"libraries": ["/opt/torch/lib/libgomp.so.1"], "cores": 16}));
        let line = std::fs::read_to_string(dir.path().join("report.jsonl")).unwrap();
        assert_eq!(line.trim(), r#"{"cores":16,"libraries":["libgomp.so.1"]}"#);
    }

    #[test]
    fn deadline_ends_a_comparison_without_a_failed_check() {
        let dir = tempfile::tempdir().unwrap();
        let findings = findings(dir.path(), Duration::ZERO);
        let error = findings.attempt("any", || Ok(())).unwrap_err();
        assert!(error.is::<Late>() && findings.close().checks.is_empty());
    }
}
