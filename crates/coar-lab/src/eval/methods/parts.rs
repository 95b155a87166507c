//! Styles from one image, and every subject with every style: cells like the methods'.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::cell::{Bench, INSTRUMENTS, digest, kept, write};
use crate::eval::compositions::Pair;
use crate::eval::report::Row;
use crate::eval::run::{Run, Trained};
use crate::pocket::world::{HeldOutStyle, HeldOutSubject, development_styles, held_out_styles};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_engine::model::ModelError;

/// One style or composition under one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartRow {
    /// `style` or `composition`.
    pub part: String,
    /// The style's name, or `subject+style`.
    pub of: String,
    pub condition: String,
    pub seed: u64,
    /// Measured numbers by name.
    pub values: BTreeMap<String, f64>,
    /// Digest of all inputs of the row.
    #[serde(default)]
    pub cell: String,
}

impl PartRow {
    fn new(row: Row, seed: u64, cell: &str) -> Self {
        Self {
            part: row.part,
            of: row.of,
            condition: row.condition,
            seed,
            values: row.values.into_iter().collect(),
            cell: cell.to_owned(),
        }
    }
}

/// Concepts of one seed, trained on demand.
struct Concepts<'r, 'a> {
    run: &'r Run<'a>,
    trained: BTreeMap<(&'static str, bool), Trained>,
}

impl Concepts<'_, '_> {
    fn overrides(&self, few: bool) -> Map<String, Value> {
        if few { self.run.few_layers() } else { Map::new() }
    }

    fn need_subject(&mut self, subject: &'static HeldOutSubject, few: bool) -> Result<(), ModelError> {
        if !self.trained.contains_key(&(subject.name, few)) {
            let pictures = self.run.subject(subject);
            let trained = self.run.train_subject(&pictures, &self.overrides(few))?;
            self.trained.insert((subject.name, few), trained);
        }
        Ok(())
    }

    fn need_style(&mut self, style: &'static HeldOutStyle, few: bool) -> Result<(), ModelError> {
        if !self.trained.contains_key(&(style.name, few)) {
            let trained = self.run.train_style(style, &self.overrides(few))?;
            self.trained.insert((style.name, few), trained);
        }
        Ok(())
    }

    fn file(&self, name: &'static str, few: bool) -> Result<&ConceptFile, ModelError> {
        let found = self.trained.get(&(name, few));
        found
            .map(|trained| &trained.file)
            .ok_or_else(|| ModelError::invalid("concept", format!("{name} is not trained")))
    }
}

impl Bench<'_> {
    /// Every style, and every one of `subjects` with every style: the finished ones, and those in this process's
    /// part.
    ///
    /// # Errors
    /// When the device fails or a file cannot be written.
    pub fn parts(
        &self,
        subjects: &[&'static HeldOutSubject],
        seed: u64,
        progress: &mut dyn FnMut(usize, usize, &str),
    ) -> Result<Vec<PartRow>, ModelError> {
        let mut options = self.eval_options(seed);
        if self.options.seeds.first() == Some(&seed) {
            options.sheets.clone_from(&self.options.dir);
        }
        let run = Run {
            model: self.model,
            judge: self.judge,
            options: &options,
        };
        let styles = match self.options.development {
            true => development_styles(),
            false => held_out_styles(),
        };
        let mut concepts = Concepts {
            run: &run,
            trained: BTreeMap::new(),
        };
        let mut cells: Vec<(Option<&'static HeldOutSubject>, &'static HeldOutStyle)> =
            styles.iter().map(|style| (None, style)).collect();
        for &subject in subjects {
            cells.extend(styles.iter().map(|style| (Some(subject), style)));
        }
        let mut rows = Vec::new();
        for (number, &(subject, style)) in cells.iter().enumerate() {
            let of = subject.map_or_else(|| style.name.to_owned(), |s| format!("{}+{}", s.name, style.name));
            progress(number, cells.len(), &of);
            let decided_by = self.part_decided_by(&run, subject, style)?;
            let file = self.file(&of, seed, &decided_by);
            let cell = format!("{of}.{seed}.{}", digest(&decided_by));
            let finished = file.as_ref().and_then(|file| kept::<Vec<PartRow>>(file, &decided_by));
            let found = finished.unwrap_or_else(|| self.earlier_parts(&cell));
            if !found.is_empty() {
                rows.extend(found);
                continue;
            }
            if !self.options.is_mine(number) {
                continue;
            }
            let measured: Vec<PartRow> = concepts
                .measure(subject, style)?
                .into_iter()
                .map(|row| PartRow::new(row, seed, &cell))
                .collect();
            if let Some(file) = file {
                write(&file, &json!({"made_with": decided_by, "row": measured}))?;
            }
            rows.extend(measured);
        }
        Ok(rows)
    }

    /// Rows of the earlier run with the same inputs.
    fn earlier_parts(&self, cell: &str) -> Vec<PartRow> {
        let from = self.options.from.iter().flat_map(|from| &from.parts);
        from.filter(|row| row.cell == cell).cloned().collect()
    }

    fn part_decided_by(
        &self,
        run: &Run,
        subject: Option<&HeldOutSubject>,
        style: &HeldOutStyle,
    ) -> Result<Value, ModelError> {
        let subject = match subject {
            Some(subject) => Some(run.spec(ConceptKind::Subject, subject.name, Some(subject.class.name()))?),
            None => None,
        };
        Ok(json!({
            "instruments": INSTRUMENTS,
            "model": self.model.fingerprint(),
            "per_scene": self.options.per_scene,
            "guidance_scale": self.options.guidance_scale,
            "top_k": self.options.top_k,
            "subject": subject,
            "style": run.spec(ConceptKind::Style, style.name, None)?,
        }))
    }
}

impl Concepts<'_, '_> {
    fn measure(
        &mut self,
        subject: Option<&'static HeldOutSubject>,
        style: &'static HeldOutStyle,
    ) -> Result<Vec<Row>, ModelError> {
        self.need_style(style, false)?;
        let Some(subject) = subject else {
            return self.run.style(style, &self.trained[&(style.name, false)]);
        };
        self.need_style(style, true)?;
        for few in [false, true] {
            self.need_subject(subject, few)?;
        }
        self.run.composition(&Pair {
            subject: &self.run.subject(subject),
            style,
            all: (self.file(subject.name, false)?, self.file(style.name, false)?),
            few: (self.file(subject.name, true)?, self.file(style.name, true)?),
        })
    }
}
