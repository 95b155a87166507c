//! Golden parity: every case of a manifest against this implementation, at the manifest's tolerances.
//!
//! `COAR_GOLDEN` names the directory (default: the repository's copy). The runner has no built-in sizes or seeds; an
//! unknown kind of case, a missing file and a directory without cases are failures.

mod data;
mod images;
mod network;
mod report;
mod text;

use std::path::{Path, PathBuf};

use report::Report;
use serde::Deserialize;
use serde_json::Value;

use crate::support::repository;

#[derive(Debug, Deserialize)]
struct Manifest {
    format: u32,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
pub struct Case {
    id: String,
    kind: String,
    files: Vec<String>,
    parameters: Value,
    tolerance: Value,
}

pub type Outcome = Result<(), String>;

/// A case with its directory.
pub struct Run<'a> {
    root: &'a Path,
    case: &'a Case,
}

impl Run<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
    /// The first file with that ending.
    fn file(&self, ending: &str) -> Result<PathBuf, String> {
        let name = self.case.files.iter().find(|name| name.ends_with(ending));
        name.map(|name| self.path(name))
            .ok_or_else(|| format!("no file ends with {ending}"))
    }
    fn json(&self, ending: &str) -> Result<Value, String> {
        let text = std::fs::read_to_string(self.file(ending)?).map_err(|error| error.to_string())?;
        serde_json::from_str(&text).map_err(|error| error.to_string())
    }
    fn parameter(&self, key: &str) -> Result<&Value, String> {
        self.case
            .parameters
            .get(key)
            .ok_or_else(|| format!("parameter `{key}` is missing"))
    }
    fn int(&self, key: &str) -> Result<i64, String> {
        self.parameter(key)?
            .as_i64()
            .ok_or_else(|| format!("parameter `{key}` is no integer"))
    }
    fn float(&self, key: &str) -> Result<f64, String> {
        self.parameter(key)?
            .as_f64()
            .ok_or_else(|| format!("parameter `{key}` is no number"))
    }
    fn text(&self, key: &str) -> Result<&str, String> {
        self.parameter(key)?
            .as_str()
            .ok_or_else(|| format!("parameter `{key}` is no text"))
    }
    fn tolerance(&self, key: &str) -> Result<f64, String> {
        self.case
            .tolerance
            .get(key)
            .and_then(Value::as_f64)
            .ok_or_else(|| format!("tolerance `{key}` is missing"))
    }
}

/// Runs every case below `root`; the report lists each check with its largest difference.
pub fn run(root: &Path) -> Result<Report, String> {
    let file = root.join("manifest.json");
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    if manifest.format != 1 {
        return Err(format!(
            "the manifest has format {}; this runner knows 1",
            manifest.format
        ));
    }
    if manifest.cases.is_empty() {
        return Err(format!("{} has no cases", file.display()));
    }
    let mut report = Report::default();
    for case in &manifest.cases {
        let run = Run { root, case };
        let missing = case.files.iter().find(|name| !run.path(name).exists());
        let outcome = match missing {
            Some(name) => Err(format!("{name} is missing")),
            None => dispatch(&run, &mut report),
        };
        if let Err(problem) = outcome {
            report.failed(&case.id, &problem);
        }
    }
    Ok(report)
}

fn dispatch(run: &Run, report: &mut Report) -> Outcome {
    match run.case.kind.as_str() {
        "checkpoint" => network::checkpoint(run, report),
        "logits" => network::logits(run, report),
        "mask_image_logits" => network::mask_image_logits(run, report),
        "inject" => network::inject(run, report),
        "decode" => network::decode(run, report),
        "vq_encode" => images::vq_encode(run, report),
        "vq_decode" => images::vq_decode(run, report),
        "whiten" => images::whiten(run, report),
        "crop" => images::crop(run, report),
        "crop_table" => images::crop_table(run, report),
        "ckpt_pickle" => data::ckpt_pickle(run, report),
        "topk" => text::topk(run, report),
        "grammar" => text::grammar(run, report),
        "vocab" => text::vocab(run, report),
        "vocab_map" => text::vocab_map(run, report),
        "tokenize" => text::tokenize(run, report),
        "item" => text::item(run, report),
        other => Err(format!("the kind `{other}` is unknown to this runner")),
    }
}

fn golden() -> PathBuf {
    repository().join("tests/golden")
}

#[test]
fn every_case_is_within_its_tolerance() {
    let root = std::env::var_os("COAR_GOLDEN").map_or_else(golden, PathBuf::from);
    let report = run(&root).unwrap_or_else(|problem| panic!("{problem}"));
    print!("{report}");
    assert!(report.passed(), "\n{report}");
}

#[test]
fn the_runner_fails_where_it_must() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(dir.path().join("manifest.json"), text).unwrap();
    assert!(run(dir.path()).is_err(), "no manifest");
    write(r#"{"format": 1, "cases": []}"#);
    assert!(run(dir.path()).unwrap_err().contains("no cases"));
    write(
        r#"{"format": 1, "cases": [{"id": "x", "kind": "telepathy", "files": [], "parameters": {}, "tolerance": {}}]}"#,
    );
    assert!(!run(dir.path()).unwrap().passed());
    write(
        r#"{"format": 1, "cases": [{"id": "x", "kind": "vocab_map", "files": ["gone.json"], "parameters": {}, "tolerance": {}}]}"#,
    );
    assert!(!run(dir.path()).unwrap().passed());
    // One wrong number in a copy of a real case.
    let source = golden().join("cases/vocab_permuted.json");
    let mut value: Value = serde_json::from_str(&std::fs::read_to_string(source).unwrap()).unwrap();
    std::fs::write(dir.path().join("map.json"), value.to_string()).unwrap();
    write(
        r#"{"format": 1, "cases": [{"id": "x", "kind": "vocab_map", "files": ["map.json"], "parameters": {}, "tolerance": {}}]}"#,
    );
    assert!(run(dir.path()).unwrap().passed());
    value["code_to_id"][3] = 0.into();
    std::fs::write(dir.path().join("map.json"), value.to_string()).unwrap();
    assert!(!run(dir.path()).unwrap().passed());
}
