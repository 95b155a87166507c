//! The comparison as tables, and as a document with plots: everything is computed from the rows.

mod ablations;
mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::plot::{Axes, Mark, plot};
use super::statistics::{Interval, by_subject, interval};
use super::{Evidence, MethodRow};
use coar_engine::model::ModelError;

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

/// Means for a terminal, one line per method.
pub fn table(rows: &[MethodRow]) -> String {
    let mut text = format!(
        "{:<24} {:>22} {:>22} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9} {:>8} {:>8}  {}\n",
        "method",
        "similarity",
        "colour",
        "scene",
        "class",
        "attrib",
        "loss",
        "params",
        "bytes",
        "seconds",
        "swap ms",
        "mixed"
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
            if rows.iter().any(|row| row.method == name && row.mixed_batch) {
                "yes"
            } else {
                "no"
            },
        );
    }
    text
}

/// The baseline without training, and the methods that represent CoAR.
const DESCRIBED: &str = "described";
const PLAIN: &str = "plain";
const OURS: [&str; 2] = ["coar", "coar-text"];

/// Writes the document, and its plots into a folder of the same name beside it; returns the files. The folder's
/// `notes.md` becomes the last part; sheets in the folder (`sheet-*.webp`) are included.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write_report(evidence: &Evidence, out: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let folder = out.with_extension("");
    std::fs::create_dir_all(&folder).map_err(|error| ModelError::file(&folder, error))?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let notes = std::fs::read_to_string(folder.join("notes.md")).unwrap_or_default();
    let mut sheets: Vec<String> = std::fs::read_dir(&folder)
        .map_err(|error| ModelError::file(&folder, error))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|file| file.starts_with("sheet-") && file.ends_with(".webp"))
        .collect();
    sheets.sort();
    let (text, plots) = document(evidence, &name, &sheets, &notes);
    let mut files = vec![(out.to_owned(), text)];
    files.extend(plots.into_iter().map(|(file, svg)| (folder.join(file), svg)));
    for (file, text) in &files {
        std::fs::write(file, text).map_err(|error| ModelError::file(file, error))?;
    }
    Ok(files.into_iter().map(|(file, _)| file).collect())
}

/// Plots by file name.
type Plots = Vec<(&'static str, String)>;

/// The document and its plots, as a pure function of the arguments.
pub fn document(evidence: &Evidence, folder: &str, sheets: &[String], notes: &str) -> (String, Plots) {
    let rows = &evidence.rows;
    let count = |of: fn(&MethodRow) -> String| rows.iter().map(of).collect::<BTreeSet<_>>().len();
    let (subjects, seeds) = (count(|row| row.subject.clone()), count(|row| row.seed.to_string()));
    let settings = &evidence.settings;
    let mut text = format!(
        "# Evidence: every method on one frozen backbone\n\n\
         Made by `coar-lab eval report` from `{folder}/results.json`; not written by hand, but for the last part (`{folder}/notes.md`).\n\n\
         {subjects} held-out subjects x {seeds} seeds (a seed decides reference pictures, training and drawing), {} pictures for each \
         cell (`cells`: how many subjects and seeds a method has), guidance {}, top-k {}; model `{}`. Means over subjects, each averaged over its seeds; in brackets the 95 % bootstrap \
         interval over subjects. Only figures of this model: a pocket model on a drawn world says how methods compare on equal \
         terms, not how good a 7B is.\n\n",
        settings["pictures_per_cell"], settings["guidance_scale"], settings["top_k"], evidence.model,
    );
    text += "## Fidelity and prompt following\n\n\
        `similarity`: cosine of the judge's features with unseen pictures of the subject in the same scene; `colour`: intersection of \
        colour histograms with them; `scene`, `class`: share of pictures that show what was asked for; `attributes`: mean over both colours, \
        pattern, accessory; `loss`: nats per code on unseen pictures. `real`: the subject's own pictures, the ceiling.\n\n";
    text += &fidelity(rows);
    text += "\n## What it costs\n\n\
        `swap`: from the file's bytes to something that can draw; `one batch`: whether the engine mixes it with other customers' in one batch.\n\n\
        | method | trained numbers | file bytes | seconds | swap ms | one batch |\n|---|---|---|---|---|---|\n";
    for method in names(rows)
        .into_iter()
        .filter(|method| of(rows, method, |row| row.parameters as f64) > 0.0)
    {
        let mixed = rows.iter().all(|row| row.method != method || row.mixed_batch);
        text += &format!(
            "| {method} | {:.0} | {:.0} | {:.1} | {:.2} | {} |\n",
            of(rows, method, |row| row.parameters as f64),
            of(rows, method, |row| row.bytes as f64),
            of(rows, method, |row| row.seconds),
            of(rows, method, |row| row.swap_ms),
            if mixed { "yes" } else { "no, a copy of the model each" },
        );
    }
    text += "\n## CoAR less the others, subject by subject\n";
    text += &differences(rows);
    text += "\n## What was to be shown\n";
    text += &wanted(rows);
    if !evidence.between.is_empty() {
        text += &between(&evidence.between);
    }
    let mut plots = method_plots(rows);
    text += "\n## Plots\n\n";
    for (file, _) in &plots {
        text += &format!("![{file}]({folder}/{file})\n\n");
    }
    if !sheets.is_empty() {
        text += "## Contact sheets\n\nOne line for each method in the order of the table, one column for each scene, the first picture drawn.\n\n";
        for sheet in sheets {
            text += &format!("![{sheet}]({folder}/{sheet})\n\n");
        }
    }
    if !evidence.ablations.is_empty() {
        let (part, more) = ablations::tables(&evidence.ablations, rows, folder);
        text += &part;
        plots.extend(more);
    }
    if !evidence.parts.is_empty() {
        text += &parts::tables(&evidence.parts);
    }
    if !notes.is_empty() {
        text += &format!("\n{}\n", notes.trim());
    }
    (text, plots)
}

/// Means of every method, with their intervals.
fn fidelity(rows: &[MethodRow]) -> String {
    let mut text =
        "| method | cells | similarity | colour | scene | class | attributes | loss |\n|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for method in names(rows) {
        let cell = |value: fn(&MethodRow) -> f64| with_interval(mean(rows, method, value));
        let loss = mean(rows, method, |row| row.loss.unwrap_or(f64::NAN)).map_or(f64::NAN, |found| found.mean);
        let loss = if loss.is_finite() {
            format!("{loss:.3}")
        } else {
            "-".to_owned()
        };
        text += &format!(
            "| {method} | {} | {} | {} | {} | {} | {} | {loss} |\n",
            cells(rows, method),
            cell(|row| row.similarity),
            cell(|row| row.colour),
            cell(|row| row.scene),
            cell(|row| row.class),
            cell(|row| row.attributes),
        );
    }
    text
}

/// The same subjects in shades without a caption word.
fn between(rows: &[MethodRow]) -> String {
    let mut text = "\n## Shades that no word means\n\n\
        The subjects above are what their descriptions say, and nothing else: their shades lie within 6 of 255 of the colours that the \
        captions name. A customer's own thing is not like that. Here both colours of each subject lie halfway to a neighbouring colour \
        (rex is an orchid cat with lime stripes), which pre-training shows on no subject; `described` has the words of the colours that they \
        started from, `searched` the words that CoAR's search finds in the references, untrained. `attributes` counts against the \
        starting colours' names and is not wanted here.\n\n"
        .to_owned();
    text += &fidelity(rows);
    text += &differences(rows);
    text += &wanted(rows);
    text
}

/// The number of subjects and seeds of a method.
fn cells(rows: &[MethodRow], method: &str) -> String {
    let mut seeds: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.method == method) {
        *seeds.entry(&row.subject).or_default() += 1;
    }
    let (least, most) = (seeds.values().min().unwrap_or(&0), seeds.values().max().unwrap_or(&0));
    match least == most {
        true => format!("{} x {most}", seeds.len()),
        false => format!("{} x {least} to {most}", seeds.len()),
    }
}

fn with_interval(found: Option<Interval>) -> String {
    found.map_or_else(
        || "-".to_owned(),
        |found| format!("{:.3} [{:.3}, {:.3}]", found.mean, found.low, found.high),
    )
}

/// A mean, or NaN without rows.
fn of(rows: &[MethodRow], method: &str, value: fn(&MethodRow) -> f64) -> f64 {
    mean(rows, method, value).map_or(f64::NAN, |found| found.mean)
}

/// The mean over subjects of `a - b`, for the subjects and seeds that both have.
fn difference(rows: &[MethodRow], a: &str, b: &str, value: fn(&MethodRow) -> f64) -> Option<Interval> {
    let of_other = rows.iter().filter(|row| row.method == b);
    let other: BTreeMap<(&str, u64), f64> = of_other
        .map(|row| ((row.subject.as_str(), row.seed), value(row)))
        .collect();
    let own = rows.iter().filter(|row| row.method == a);
    let apart = own.filter_map(|row| {
        let of_both = other.get(&(row.subject.as_str(), row.seed))?;
        Some((row.subject.as_str(), value(row) - of_both))
    });
    interval(&by_subject(apart).into_values().collect::<Vec<_>>())
}

/// Differences of CoAR and each other method, subject by subject: an interval that excludes 0 is significant.
fn differences(rows: &[MethodRow]) -> String {
    let mut text = "\nMeans of paired differences with their 95 % bootstrap intervals: one that does not hold 0 is a difference (**bold**).\n\n\
        | | similarity | colour | scene | class |\n|---|---|---|---|---|\n"
        .to_owned();
    for ours in OURS {
        for other in names(rows)
            .into_iter()
            .filter(|name| !OURS.contains(name) && *name != "real")
        {
            let cell = |value: fn(&MethodRow) -> f64| signed(difference(rows, ours, other, value));
            text += &format!(
                "| {ours} - {other} | {} | {} | {} | {} |\n",
                cell(|row| row.similarity),
                cell(|row| row.colour),
                cell(|row| row.scene),
                cell(|row| row.class),
            );
        }
    }
    text
}

/// The targets of this comparison, each evaluated from the rows.
fn wanted(rows: &[MethodRow]) -> String {
    let mut text = "\n| | similarity | colour |\n|---|---|---|\n".to_owned();
    let answer = |yes: bool| if yes { "yes" } else { "**no**" };
    for ours in OURS {
        for other in ["textual-inversion", DESCRIBED] {
            let beats = |value: fn(&MethodRow) -> f64| {
                difference(rows, ours, other, value).map_or("-", |found| answer(found.low > 0.0))
            };
            let apart = |value: fn(&MethodRow) -> f64| match (mean(rows, ours, value), mean(rows, other, value)) {
                (Some(a), Some(b)) => answer(a.low > b.high),
                _ => "-",
            };
            text += &format!(
                "| {ours} beats {other}, pair by pair | {} | {} |\n| the same, intervals of the means apart | {} | {} |\n",
                beats(|row| row.similarity),
                beats(|row| row.colour),
                apart(|row| row.similarity),
                apart(|row| row.colour),
            );
        }
    }
    text.push('\n');
    for ours in OURS {
        let kept = of(rows, ours, |row| row.scene) / of(rows, PLAIN, |row| row.scene);
        let share =
            of(rows, ours, |row| row.parameters as f64) / of(rows, "dreambooth-lora", |row| row.parameters as f64);
        if kept.is_finite() {
            text += &format!(
                "- {ours} keeps {:.1} % of the plain prompt's scene accuracy (wanted 95): {}\n",
                100.0 * kept,
                answer(kept >= 0.95)
            );
        }
        if share.is_finite() {
            text += &format!(
                "- {ours} has {:.2} % of the low-rank method's trained numbers (wanted at most 1): {}\n",
                100.0 * share,
                answer(share <= 0.01)
            );
        }
    }
    text
}

fn method_plots(rows: &[MethodRow]) -> Plots {
    let marks = |x: fn(&MethodRow) -> f64| -> Vec<Mark> {
        names(rows)
            .into_iter()
            .filter_map(|method| {
                let found = mean(rows, method, |row| row.similarity)?;
                Some(Mark {
                    name: method.to_owned(),
                    x: of(rows, method, x),
                    y: found.mean,
                    low: found.low,
                    high: found.high,
                })
            })
            .collect()
    };
    let axes = |title, x, logarithmic| Axes {
        title,
        x,
        y: "similarity",
        logarithmic,
    };
    vec![
        (
            "scene.svg",
            plot(
                axes("Similarity against prompt following", "scene accuracy", false),
                &marks(|row| row.scene),
                false,
            ),
        ),
        (
            "parameters.svg",
            plot(
                axes("Similarity against trained numbers", "trained numbers", true),
                &marks(|row| row.parameters as f64),
                false,
            ),
        ),
        (
            "seconds.svg",
            plot(
                axes("Similarity against training time", "seconds on this machine", true),
                &marks(|row| row.seconds),
                false,
            ),
        ),
    ]
}

/// A difference with its interval, bold if it excludes 0.
fn signed(found: Option<Interval>) -> String {
    match found {
        Some(found) if found.low > 0.0 || found.high < 0.0 => {
            format!("**{:+.3}** [{:+.3}, {:+.3}]", found.mean, found.low, found.high)
        }
        Some(found) => format!("{:+.3} [{:+.3}, {:+.3}]", found.mean, found.low, found.high),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, subject: &str, similarity: f64) -> MethodRow {
        MethodRow {
            method: method.to_owned(),
            subject: subject.to_owned(),
            seed: 0,
            similarity,
            colour: similarity,
            scene: 1.0,
            class: 1.0,
            attributes: 0.5,
            loss: Some(1.0),
            parameters: 100,
            bytes: 400,
            seconds: 2.0,
            swap_ms: 0.1,
            mixed_batch: method != "dreambooth-lora",
            cell: String::new(),
        }
    }

    fn evidence(ours: f64) -> Evidence {
        let mut rows = Vec::new();
        for (subject, shift) in [("a", 0.0), ("b", 0.01), ("c", 0.02)] {
            for (method, value) in [
                ("plain", 0.5),
                ("described", 0.8),
                ("textual-inversion", 0.6),
                ("coar", ours),
                ("coar-text", ours),
            ] {
                rows.push(row(method, subject, value + shift));
            }
            rows.push(MethodRow {
                parameters: 50_000,
                ..row("dreambooth-lora", subject, 0.7)
            });
        }
        Evidence {
            model: "m".into(),
            settings: serde_json::json!({"pictures_per_cell": 18, "guidance_scale": 2.0, "top_k": 20}),
            rows,
            between: vec![],
            ablations: vec![row("N: 1", "a", 0.5), row("N: 2", "a", 0.6), row("N: 3", "a", 0.7)],
            parts: vec![],
        }
    }

    #[test]
    fn document_depends_on_the_rows() {
        let (good, plots) = document(&evidence(0.9), "evidence", &[], "## Notes\n\nnone");
        assert!(good.contains("3 held-out subjects x 1 seeds"));
        assert!(good.contains("| coar | 3 x 1 | 0.910 [0.900, 0.920] |"), "{good}");
        assert!(good.contains("| coar beats described, pair by pair | yes | yes |"));
        assert!(good.contains("coar has 0.20 % of the low-rank method's trained numbers (wanted at most 1): yes"));
        assert!(good.contains("**+0.100** [+0.100, +0.100]"));
        assert!(good.contains("no, a copy of the model each") && good.ends_with("## Notes\n\nnone\n"));
        assert_eq!(plots.len(), 4);
        // The default value is identified by its cells only.
        assert!(good.contains("| 3 | 1 x 1 | 0.700 [0.700, 0.700] | - |"), "{good}");
        let mut known = evidence(0.9);
        let own = known.rows.iter_mut().find(|row| row.method == "coar-text").unwrap();
        own.cell = "c".into();
        known.ablations[2].cell = "c".into();
        let (known, _) = document(&known, "evidence", &[], "");
        assert!(
            known.contains("| 2 | 1 x 1 | 0.600 [0.600, 0.600] | **-0.100** [-0.100, -0.100] |"),
            "{known}"
        );
        assert!(
            known.contains("| 3 | 1 x 1 | 0.700 [0.700, 0.700] | the default |"),
            "{known}"
        );
        assert_eq!(plots[0].1.matches("<circle").count(), 6);
        // Subjects that only one of two methods has do not enter their difference.
        let mut uneven = evidence(0.9);
        uneven.rows.push(MethodRow {
            seed: 1,
            ..row("coar", "a", 0.0)
        });
        let (uneven, _) = document(&uneven, "evidence", &[], "");
        assert!(
            uneven.contains("| coar | 3 x 1 to 2 |") && uneven.contains("**+0.100** [+0.100, +0.100]"),
            "{uneven}"
        );
        let mut more = evidence(0.8);
        more.between = evidence(0.9).rows;
        let (more, _) = document(&more, "evidence", &[], "");
        let (first, second) = more.split_once("## Shades that no word means").unwrap();
        assert!(first.contains("| coar beats described, pair by pair | **no** |"));
        assert!(second.contains("| coar beats described, pair by pair | yes |"));
        let (bad, _) = document(&evidence(0.8), "evidence", &[], "");
        assert!(bad.contains("| coar beats described, pair by pair | **no** | **no** |"));
        assert!(bad.contains("| coar beats textual-inversion, pair by pair | yes | yes |"));
    }
}
