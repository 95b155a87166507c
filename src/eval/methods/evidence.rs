//! The comparison as tables, and as a document with plots: everything is computed from the rows.

use std::path::{Path, PathBuf};

use super::statistics::{Interval, by_subject, interval};
use super::{Evidence, MethodRow};
use crate::model::ModelError;

/// Methods in the order of their first rows.
fn names(rows: &[MethodRow]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.method.as_str()) {
            names.push(&row.method);
        }
    }
    names
}

/// The mean of `value` over a method's subjects, each averaged over its seeds.
fn mean(rows: &[MethodRow], method: &str, value: impl Fn(&MethodRow) -> f64) -> Option<Interval> {
    let own = rows.iter().filter(|row| row.method == method);
    let subjects = by_subject(own.map(|row| (row.subject.as_str(), value(row))));
    interval(&subjects.into_values().collect::<Vec<_>>())
}

/// Means for a terminal, one line for each method.
pub fn table(rows: &[MethodRow]) -> String {
    let mut text = format!(
        "{:<24} {:>22} {:>22} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9} {:>8} {:>8}  {}\n",
        "method", "similarity", "colour", "scene", "class", "attrib", "loss", "params", "bytes", "seconds", "swap ms", "mixed"
    );
    for name in names(rows) {
        let of = |value: fn(&MethodRow) -> f64| mean(rows, name, value).map_or(f64::NAN, |found| found.mean);
        let with = |value: fn(&MethodRow) -> f64| {
            mean(rows, name, value).map_or_else(String::new, |found| {
                format!("{:.3} [{:.3}, {:.3}]", found.mean, found.low, found.high)
            })
        };
        text += &format!(
            "{name:<24} {:>22} {:>22} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>9.0} {:>9.0} {:>8.1} {:>8.2}  {}\n",
            with(|row| row.similarity),
            with(|row| row.colour),
            of(|row| row.scene),
            of(|row| row.class),
            of(|row| row.attributes),
            of(|row| row.loss.unwrap_or(f64::NAN)),
            of(|row| row.parameters as f64),
            of(|row| row.bytes as f64),
            of(|row| row.seconds),
            of(|row| row.swap_ms),
            if rows.iter().any(|row| row.method == name && row.mixed_batch) { "yes" } else { "no" },
        );
    }
    text
}

/// Writes the document and its plots; returns the files.
///
/// # Errors
/// When a file cannot be written.
pub fn write_report(evidence: &Evidence, out: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let text = table(&evidence.rows);
    std::fs::write(out, text).map_err(|error| ModelError::file(out, error))?;
    Ok(vec![out.to_owned()])
}
