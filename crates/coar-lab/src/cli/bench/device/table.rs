//! The summary printed at the end of a run.

use super::report::{Ended, Outcome};

/// Maximum number of failed checks printed; the report has all of them.
const MAX_FAILED: usize = 12;

fn short(text: &str, most: usize) -> String {
    let one_line = text.lines().next().unwrap_or("");
    match one_line.char_indices().nth(most) {
        Some((at, _)) => format!("{}...", &one_line[..at]),
        None => one_line.to_owned(),
    }
}

/// At most 30 lines: every part with outcome, seconds and its most important figure, then the failed checks.
pub(super) fn table(title: &str, parts: &[Ended]) -> String {
    let mut lines = vec![
        title.to_owned(),
        format!(
            "{:<9} {:<8} {:>7}  {:>7}  figure",
            "part", "outcome", "seconds", "checks"
        ),
    ];
    for part in parts {
        let headline = part.found.figures.get("headline").and_then(|text| text.as_str());
        let note = match (&part.error, headline) {
            (Some(error), _) => short(error, 100),
            (None, Some(headline)) => short(headline, 100),
            (None, None) => part
                .found
                .skipped
                .first()
                .map(|text| short(text, 100))
                .unwrap_or_default(),
        };
        let good = part.found.checks.iter().filter(|check| check.ok).count();
        lines.push(format!(
            "{:<9} {:<8} {:>7.1}  {:>7}  {note}",
            part.part,
            part.outcome.as_str(),
            part.seconds,
            format!("{good}/{}", part.found.checks.len()),
        ));
    }
    let failed: Vec<String> = parts
        .iter()
        .flat_map(|part| {
            part.found.failed().map(|check| {
                let name = short(&check.name, 60);
                format!(
                    "FAILED {}: {name}: {:.3e}, limit {:.3e}",
                    part.part, check.measured, check.limit
                )
            })
        })
        .collect();
    lines.extend(failed.iter().take(MAX_FAILED).cloned());
    if failed.len() > MAX_FAILED {
        lines.push(format!(
            "and {} more failed checks in the report",
            failed.len() - MAX_FAILED
        ));
    }
    let count = |outcome| parts.iter().filter(|part| part.outcome == outcome).count();
    lines.push(format!(
        "{} ok, {} failed, {} late, {} skipped; {} checks failed",
        count(Outcome::Ok),
        count(Outcome::Failed),
        count(Outcome::Late),
        count(Outcome::Skipped),
        failed.len()
    ));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::report::{Check, Found};
    use super::*;

    #[test]
    fn summary_is_at_most_thirty_lines() {
        let check = Check {
            name: "logits ".repeat(40),
            measured: f64::NAN,
            limit: 1e-3,
            ok: false,
        };
        let part = Ended {
            part: "concepts",
            outcome: Outcome::Failed,
            seconds: 12.3,
            error: Some("x\n".repeat(50)),
            found: Found {
                checks: vec![check; 20],
                ..Found::default()
            },
        };
        let text = table("coar", &vec![part; 11]);
        assert!(text.lines().count() <= 30, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 140), "{text}");
        assert!(
            text.contains("and 208 more") && text.ends_with("220 checks failed"),
            "{text}"
        );
    }
}
