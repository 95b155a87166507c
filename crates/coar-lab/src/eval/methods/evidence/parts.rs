//! The report's tables of styles and compositions.

use std::collections::{BTreeMap, BTreeSet};

use super::{signed, with_interval};
use crate::eval::methods::PartRow;
use crate::eval::methods::statistics::{by_subject, interval, paired};

/// Measured numbers of a part, in a table's order.
const STYLE_COLUMNS: [&str; 4] = ["style", "palette", "class", "scene"];
const COMPOSITION_COLUMNS: [&str; 7] = ["style", "palette", "class", "scene", "pattern", "accessory", "feature"];

/// Conditions in the order of their first rows.
fn conditions<'a>(rows: &[&'a PartRow]) -> Vec<&'a str> {
    let mut found: Vec<&str> = Vec::new();
    for row in rows {
        if !found.contains(&row.condition.as_str()) {
            found.push(&row.condition);
        }
    }
    found
}

/// The unit of a composition's interval: its subject.
fn subject_of(row: &PartRow) -> &str {
    row.of.split_once('+').map_or(row.of.as_str(), |(subject, _)| subject)
}

fn part_values<'a>(rows: &[&'a PartRow], condition: &str, column: &str) -> BTreeMap<&'a str, f64> {
    let own = rows.iter().filter(|row| row.condition == condition);
    by_subject(own.filter_map(|row| Some((subject_of(row), *row.values.get(column)?))))
}

/// Styles, and subjects with styles, as tables.
pub(super) fn tables(all: &[PartRow]) -> String {
    let of_part = |part: &str| -> Vec<&PartRow> { all.iter().filter(|row| row.part == part).collect() };
    let head = |columns: &[&str]| format!("{} |\n|---|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
    let (styles, pairs) = (of_part("style"), of_part("composition"));
    let mut text = "\n## Styles from one picture\n\n\
        `style`, `class`, `scene`: share of pictures in which the judge finds them; `palette`: intersection of the palettes with \
        pictures of the same things in the style. Means over seeds; two styles allow no interval.\n\n"
        .to_owned();
    text += &format!("| | {}", head(&STYLE_COLUMNS));
    let names: BTreeSet<&str> = styles.iter().map(|row| row.of.as_str()).collect();
    for name in names {
        let own: Vec<&PartRow> = styles.iter().copied().filter(|row| row.of == name).collect();
        for condition in conditions(&own) {
            let cells = STYLE_COLUMNS.map(|column| {
                let mean = part_values(&own, condition, column).into_values().next();
                mean.map_or_else(|| "-".to_owned(), |mean| format!("{mean:.3}"))
            });
            text += &format!("| {name}, {condition} | {} |\n", cells.join(" | "));
        }
    }
    let count = |of: fn(&str) -> &str| pairs.iter().map(|row| of(&row.of)).collect::<BTreeSet<_>>().len();
    text += &format!(
        "\n## Every subject with every style\n\n\
         {} subjects x {} styles, nothing trained for the pair; prompts of nine scenes. `feature`: cosine of the judge's features with the \
         subject drawn in the style. Intervals over subjects. With N = all layers the context positions are overwritten everywhere, so \
         the identity mask cannot matter; it is measured where it acts.\n\n| | {}",
        count(|of| of.split('+').next().unwrap_or(of)),
        count(|of| of.split('+').next_back().unwrap_or(of)),
        head(&COMPOSITION_COLUMNS),
    );
    let conditions = conditions(&pairs);
    for condition in &conditions {
        let cells = COMPOSITION_COLUMNS.map(|column| {
            let values: Vec<f64> = part_values(&pairs, condition, column).into_values().collect();
            with_interval(interval(&values))
        });
        text += &format!("| {condition} | {} |\n", cells.join(" | "));
    }
    let named = |what: &str| conditions.iter().copied().find(|condition| condition.ends_with(what));
    for (one, other) in [
        (named("mask"), named("none")),
        (named("N = all"), named("style alone")),
        (named("N = all"), named("subject alone")),
    ] {
        let (Some(one), Some(other)) = (one, other) else {
            continue;
        };
        let cells = COMPOSITION_COLUMNS.map(|column| {
            let values = |condition| part_values(&pairs, condition, column);
            signed(paired(&values(one), &values(other)))
        });
        text += &format!("| *{one}* less *{other}* | {} |\n", cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compositions_are_averaged_by_subject_and_paired() {
        let part = |of: &str, condition: &str, feature: f64| PartRow {
            part: "composition".into(),
            of: of.into(),
            condition: condition.into(),
            seed: 0,
            values: BTreeMap::from([("feature".to_owned(), feature)]),
            cell: String::new(),
        };
        let rows = [
            part("a+x", "both, N = 3, mask", 0.9),
            part("a+y", "both, N = 3, mask", 0.7),
            part("b+x", "both, N = 3, mask", 0.6),
            part("a+x", "both, N = 3, none", 0.8),
            part("a+y", "both, N = 3, none", 0.6),
            part("b+x", "both, N = 3, none", 0.5),
        ];
        let text = tables(&rows);
        assert!(text.contains("2 subjects x 2 styles"), "{text}");
        // (0.9 + 0.7) / 2 and 0.6: their mean is 0.7.
        assert!(text.contains("0.700 [0.600, 0.800]"), "{text}");
        assert!(
            text.contains("*both, N = 3, mask* less *both, N = 3, none*") && text.contains("**+0.100**"),
            "{text}"
        );
    }
}
