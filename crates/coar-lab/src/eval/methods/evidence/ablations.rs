//! The report's tables and plots of CoAR's settings, one at a time.

use std::collections::BTreeSet;

use super::{OURS, Plots, cells, difference, mean, names, of, signed, with_interval};
use crate::eval::methods::MethodRow;
use crate::eval::methods::plot::{Axes, Mark, plot};

/// Axes whose values are numbers, with their plots' files.
const PLOTTED: [(&str, &str); 7] = [
    ("focus", "focus.svg"),
    ("rate", "rate.svg"),
    ("N", "layers.svg"),
    ("T", "text-tokens.svg"),
    ("K", "image-tokens.svg"),
    ("steps", "steps.svg"),
    ("references", "references.svg"),
];

/// The default value of an axis: its cells are those of a method.
fn default_of<'a>(rows: &'a [MethodRow], axis: &str, methods: &[MethodRow]) -> Option<&'a str> {
    OURS.iter().rev().find_map(|ours| {
        let own = methods.iter().filter(|row| row.method == *ours && !row.cell.is_empty());
        let cells: BTreeSet<&str> = own.map(|row| row.cell.as_str()).collect();
        let found = rows.iter().find(|row| {
            let of_axis = row.method.split_once(": ").is_some_and(|(own, _)| own == axis);
            of_axis && cells.contains(row.cell.as_str())
        });
        found.map(|row| row.method.as_str())
    })
}

/// One table and, for numeric values, one plot per axis.
pub(super) fn tables(rows: &[MethodRow], methods: &[MethodRow], folder: &str) -> (String, Plots) {
    let mut axes: Vec<&str> = Vec::new();
    for name in names(rows) {
        let axis = name.split_once(": ").map_or(name, |(axis, _)| axis);
        if !axes.contains(&axis) {
            axes.push(axis);
        }
    }
    let mut text = "\n## One setting at a time\n\n\
        Everything else as in `coar-text` (`terms` and K above 0: as in `coar`). *less*: means of differences from the axis's own default, subject \
        by subject and seed by seed, with their 95 % bootstrap intervals (**bold**: 0 is outside).\n"
        .to_owned();
    let mut plots = Plots::new();
    for axis in axes {
        text += &format!(
            "\n| {axis} | cells | similarity | *less* | colour | *less* | scene | *less* | class | loss | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        );
        let default = default_of(rows, axis, methods);
        let mut marks = Vec::new();
        for name in names(rows) {
            let Some((_, value)) = name.split_once(": ").filter(|(own, _)| *own == axis) else {
                continue;
            };
            let cell = |of: fn(&MethodRow) -> f64| {
                let less = match default {
                    Some(default) if default != name => signed(difference(rows, name, default, of)),
                    Some(_) => "the default".to_owned(),
                    None => "-".to_owned(),
                };
                format!("{} | {less}", with_interval(mean(rows, name, of)))
            };
            text += &format!(
                "| {value} | {} | {} | {} | {} | {} | {:.3} | {:.1} |\n",
                cells(rows, name),
                cell(|row| row.similarity),
                cell(|row| row.colour),
                cell(|row| row.scene),
                with_interval(mean(rows, name, |row| row.class)),
                of(rows, name, |row| row.loss.unwrap_or(f64::NAN)),
                of(rows, name, |row| row.seconds),
            );
            if let (Ok(x), Some(found)) = (value.parse::<f64>(), mean(rows, name, |row| row.similarity)) {
                marks.push(Mark {
                    name: value.to_owned(),
                    x,
                    y: found.mean,
                    low: found.low,
                    high: found.high,
                });
            }
        }
        let file = PLOTTED.iter().find(|(own, _)| *own == axis).map(|(_, file)| *file);
        if let Some(file) = file.filter(|_| marks.len() > 2) {
            let shown = Axes {
                title: &format!("Similarity against {axis}"),
                x: axis,
                y: "similarity",
                logarithmic: ["steps", "rate"].contains(&axis),
            };
            plots.push((file, plot(shown, &marks, true)));
            text += &format!("\n![{file}]({folder}/{file})\n");
        }
    }
    (text, plots)
}
