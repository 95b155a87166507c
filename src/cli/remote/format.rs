//! The server's JSON as lines of text. Missing fields, as from an older server, are shown as a dash.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::cli::printable::printable;

const NONE: &str = "-";

/// A string or number as text that is safe for a terminal.
pub(in crate::cli) fn text(value: &Value) -> String {
    match value {
        Value::Null => NONE.to_owned(),
        Value::String(text) => printable(text).into_owned(),
        other => printable(&other.to_string()).into_owned(),
    }
}

/// The first characters of a hash, to display it.
fn short(hash: &str) -> String {
    printable(&hash.chars().take(12).collect::<String>()).into_owned()
}

/// `3 (1a2b3c4d5e6f)`, from a version's number and hash, or from the hash alone.
pub(in crate::cli) fn version(value: &Value) -> String {
    match value {
        Value::String(hash) => short(hash),
        Value::Object(fields) => {
            let hash = fields.get("hash").and_then(Value::as_str).unwrap_or("");
            let number = fields.get("number").map_or_else(|| NONE.to_owned(), text);
            format!("{number} ({})", short(hash))
        }
        _ => NONE.to_owned(),
    }
}

/// Seconds in the largest unit that fits.
pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The time since a moment in Unix seconds.
pub(in crate::cli) fn age(moment: &Value) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    moment.as_u64().map_or_else(
        || NONE.to_owned(),
        |then| format!("{} ago", duration(now.saturating_sub(then))),
    )
}

/// Rows under a head, each column as wide as its widest entry.
pub(in crate::cli) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let entries = rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|entry| entry.chars().count());
            entries.chain([head[column].len()]).max().unwrap_or(0)
        })
        .collect();
    let line = |entries: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = entries
            .zip(&widths)
            .map(|(entry, width)| format!("{entry:<width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut lines = line(&mut head.iter().copied());
    for row in rows {
        lines += &line(&mut row.iter().map(String::as_str));
    }
    lines
}

/// The columns of `coar concept list`, with a server and without.
pub(in crate::cli) const CONCEPT_COLUMNS: &[&str] = &["NAME", "KIND", "CLASS", "STATUS", "VERSION", "CREATED"];

/// `coar concept list`
pub(super) fn concepts(list: &[Value]) -> String {
    let row = |concept: &Value| {
        vec![
            text(&concept["name"]),
            text(&concept["kind"]),
            text(&concept["class"]),
            status(concept),
            version(&concept["version"]),
            age(&concept["created_at"]),
        ]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    table(CONCEPT_COLUMNS, &rows)
}

/// A concept's status, with the progress of its training.
fn status(concept: &Value) -> String {
    let training = &concept["training"];
    match (concept["status"].as_str(), training["status"].as_str()) {
        (Some("training"), Some("running")) => format!("training {}", progress(&training["progress"])),
        _ => text(&concept["status"]),
    }
}

/// `120/400`
fn progress(progress: &Value) -> String {
    format!("{}/{}", text(&progress["step"]), text(&progress["total_steps"]))
}

/// `coar concept show`
pub(super) fn concept(concept: &Value) -> String {
    let mut lines = vec![
        ("name", text(&concept["name"])),
        ("id", text(&concept["id"])),
        ("kind", text(&concept["kind"])),
        ("class", text(&concept["class"])),
        ("status", status(concept)),
        ("version", version(&concept["version"])),
        ("versions", text(&concept["versions"])),
        ("images", text(&concept["images"])),
        ("description", text(&concept["description"])),
        ("created", age(&concept["created_at"])),
    ];
    if !concept["training"].is_null() {
        lines.push(("training", text(&concept["training"]["id"])));
    }
    facts(&lines)
}

/// `coar concept versions`
pub(super) fn versions(list: &[Value]) -> String {
    let row = |version: &Value| {
        let hash = version["hash"].as_str().unwrap_or(NONE);
        vec![text(&version["number"]), short(hash), age(&version["created_at"])]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    table(&["VERSION", "HASH", "CREATED"], &rows)
}

/// `coar training list`
pub(super) fn trainings(list: &[Value]) -> String {
    let row = |training: &Value| {
        vec![
            text(&training["id"]),
            text(&training["concept"]),
            text(&training["status"]),
            progress(&training["progress"]),
            loss(&training["progress"]),
            age(&training["created_at"]),
        ]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    table(&["ID", "CONCEPT", "STATUS", "STEP", "LOSS", "CREATED"], &rows)
}

/// The loss with three digits.
pub(super) fn loss(progress: &Value) -> String {
    progress["loss"]
        .as_f64()
        .map_or_else(|| NONE.to_owned(), |loss| format!("{loss:.3}"))
}

/// `coar training show`
pub(super) fn training(training: &Value) -> String {
    let now = &training["progress"];
    let eta = now["eta_seconds"].as_f64();
    let mut lines = vec![
        ("id", text(&training["id"])),
        ("concept", text(&training["concept"])),
        ("status", text(&training["status"])),
        ("step", progress(now)),
        ("loss", loss(now)),
        (
            "left",
            eta.map_or_else(|| NONE.to_owned(), |seconds| duration(seconds.ceil() as u64)),
        ),
        ("attempt", text(&training["attempt"])),
        ("created", age(&training["created_at"])),
    ];
    if let Some(message) = training["error"]["message"].as_str() {
        lines.push(("error", printable(message).into_owned()));
    }
    facts(&lines)
}

fn facts(lines: &[(&str, String)]) -> String {
    lines
        .iter()
        .map(|(name, value)| format!("{name:<12} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_entries() {
        let list = [
            json!({"name": "rex", "kind": "subject", "class": "cat", "status": "ready",
                   "version": {"number": 2, "hash": "0123456789abcdef"}}),
            json!({"name": "a-longer-name", "kind": "style", "class": null, "status": "training",
                   "version": null, "training": {"status": "running", "progress": {"step": 7, "total_steps": 40}}}),
        ];
        assert_eq!(
            concepts(&list),
            "NAME           KIND     CLASS  STATUS         VERSION           CREATED\n\
             rex            subject  cat    ready          2 (0123456789ab)  -\n\
             a-longer-name  style    -      training 7/40  -                 -\n"
        );
    }

    #[test]
    fn both_forms_of_a_version_are_read() {
        assert_eq!(version(&json!("0123456789abcdef")), "0123456789ab");
        assert_eq!(version(&json!({"number": 3, "hash": "ff"})), "3 (ff)");
        assert_eq!(version(&Value::Null), "-");
    }

    #[test]
    fn a_failed_training_says_why() {
        let failed = json!({"id": "training_1", "status": "failed", "attempt": 3,
            "progress": {"step": 5, "total_steps": 40, "loss": 1.23456, "eta_seconds": null},
            "error": {"message": "the device failed"}});
        let shown = training(&failed);
        for line in [
            "step         5/40",
            "loss         1.235",
            "error        the device failed",
        ] {
            assert!(shown.lines().any(|got| got == line), "{line}\n{shown}");
        }
    }

    #[test]
    fn durations_take_the_largest_unit() {
        let shown = [5, 119, 120, 7_199, 7_200, 172_800].map(duration);
        assert_eq!(shown, ["5 s", "119 s", "2 min", "119 min", "2 h", "2 d"]);
    }
}
