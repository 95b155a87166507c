//! Rows of numbers, as a table and as JSON.

use serde::Serialize;

/// Numbers by name, in the order of a table's columns.
pub type Values = Vec<(String, f64)>;

/// One line: the mean over subjects of a measurement under one condition.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// `base`, `subject`, `ablation`, `style`, `composition`.
    pub part: String,
    /// A subject's or style's name, or `mean`.
    pub of: String,
    /// `plain`, `described`, `concept`, ...
    pub condition: String,
    pub values: Values,
}

/// All rows of one run, with its settings.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub model: String,
    pub seed: u64,
    pub settings: serde_json::Value,
    pub rows: Vec<Row>,
}

impl Report {
    /// Adds the mean of the rows that have `part` and `condition`.
    pub fn add_mean(&mut self, part: &str, condition: &str) {
        let rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| row.part == part && row.condition == condition)
            .collect();
        let Some(first) = rows.first() else { return };
        let values = first
            .values
            .iter()
            .map(|(name, _)| {
                let all: Vec<f64> = rows
                    .iter()
                    .filter_map(|row| row.values.iter().find(|(n, _)| n == name).map(|(_, v)| *v))
                    .collect();
                (name.clone(), all.iter().sum::<f64>() / all.len() as f64)
            })
            .collect();
        self.rows.push(Row {
            part: part.to_owned(),
            of: "mean".to_owned(),
            condition: condition.to_owned(),
            values,
        });
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "model {}  seed {}", self.model, self.seed)?;
        let mut part = "";
        for row in &self.rows {
            if row.part != part {
                part = &row.part;
                let names: Vec<String> = row.values.iter().map(|(name, _)| format!("{name:>9}")).collect();
                writeln!(f, "\n{part:<12} {:<22} {}", "", names.join(" "))?;
            }
            let values: Vec<String> = row.values.iter().map(|(_, value)| format!("{value:>9.3}")).collect();
            writeln!(f, "{:<12} {:<22} {}", row.of, row.condition, values.join(" "))?;
        }
        Ok(())
    }
}
