//! Every method of the paper's table on one frozen backbone, with the same images, seeds, sampler and judge.

mod arms;
mod cell;
/// `docs/evidence.md` from the rows.
pub mod evidence;
mod parts;
mod plot;
mod sheets;
/// Means and intervals.
pub mod statistics;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use arms::{Arm, ablation_arms, between_arms, method_arms};
pub use cell::Bench;
pub use parts::PartRow;

use super::judge::Judge;
use crate::pocket::world::{
    HeldOutSubject, development_subjects, development_subjects_between, held_out_subjects, held_out_subjects_between,
};
use crate::tuning::BaseWeights;
use coar_engine::model::{LuminaMgpt, ModelError};

/// Settings of a run.
#[derive(Debug, Clone)]
pub struct MethodsOptions {
    /// Seeds determine references, training and sampling.
    pub seeds: Vec<u64>,
    /// Held-out subjects: a number, or names.
    pub subjects: usize,
    pub named: Vec<String>,
    /// Use the development subjects, which are used to choose settings.
    pub development: bool,
    /// Images per scene, of nine scenes.
    pub per_scene: usize,
    pub guidance_scale: f64,
    pub top_k: u32,
    /// Arms of the comparison, by name; empty: all.
    pub methods: Vec<String>,
    pub ablations: bool,
    /// Also styles, and subjects with styles.
    pub styles: bool,
    /// Also subjects in shades without a caption word.
    pub between: bool,
    /// Folder for contact sheets of the first seed's finished cells.
    pub sheets: Option<PathBuf>,
    /// Rows of an earlier run, which are not measured again.
    pub from: Option<Evidence>,
    /// Folder of finished cells, to resume an interrupted run.
    pub dir: Option<PathBuf>,
    /// `(index, count)`: only every count-th cell, for several processes on the same folder; `None`: nothing is
    /// measured.
    pub part: Option<(usize, usize)>,
    /// Overridden training settings by arm, and of `subject` and `style` for the compositions: `{"dreambooth":
    /// {"steps": 30}}`.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl MethodsOptions {
    /// Whether this process measures a cell.
    fn is_mine(&self, number: usize) -> bool {
        self.part.is_some_and(|(index, count)| number % count == index)
    }
}

/// One method, subject and seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodRow {
    pub method: String,
    pub subject: String,
    pub seed: u64,
    /// Cosine of the judge's features with unseen images of the subject in the same scene.
    pub similarity: f64,
    /// Intersection of colour histograms with the same images.
    pub colour: f64,
    /// Share of images in the requested scene.
    pub scene: f64,
    /// Share of images that show the subject's class.
    pub class: f64,
    /// Mean share of correct answers for both colours, pattern and accessory.
    pub attributes: f64,
    /// Nats per image code on unseen images.
    pub loss: Option<f64>,
    /// Number of trained parameters.
    pub parameters: u64,
    /// Of the file with the trained parameters.
    pub bytes: u64,
    /// Seconds of training, first stages and class images included.
    pub seconds: f64,
    /// From the file's bytes to a model that can generate.
    pub swap_ms: f64,
    /// Whether it can share a batch of the engine with others.
    pub mixed_batch: bool,
    /// Digest of all inputs of the row: a later run reuses rows with equal inputs.
    #[serde(default)]
    pub cell: String,
}

/// All results of one run, with its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub model: String,
    pub settings: serde_json::Value,
    /// The comparison of methods.
    pub rows: Vec<MethodRow>,
    /// Variations of CoAR, one setting at a time; `method` is `axis: value`.
    #[serde(default)]
    pub ablations: Vec<MethodRow>,
    /// Subjects in shades without a caption word.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub between: Vec<MethodRow>,
    /// Styles from one image, and every subject with every style.
    #[serde(default)]
    pub parts: Vec<PartRow>,
}

/// Runs every cell that does not exist yet and returns all that exist: with `part`, including the finished ones of
/// other processes.
///
/// # Errors
/// When a name is unknown, the device fails, or a file cannot be written.
pub fn evaluate_methods(
    model: &LuminaMgpt,
    checkpoint: &Path,
    judge: &Judge,
    options: &MethodsOptions,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Evidence, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let base = BaseWeights::read(model, checkpoint)?;
    let (named, between) = match options.development {
        true => (development_subjects(), development_subjects_between()),
        false => (held_out_subjects(), held_out_subjects_between()),
    };
    let subjects = chosen_subjects(options, named)?;
    let between_subjects: Vec<&'static HeldOutSubject> = match options.between {
        true => subjects
            .iter()
            .filter_map(|subject| named.iter().position(|other| other == *subject))
            .map(|at| &between[at])
            .collect(),
        false => vec![],
    };
    let searched = between_arms().into_iter().filter(|_| options.between);
    let known: Vec<Arm> = method_arms().into_iter().chain(searched).collect();
    if let Some(name) = options
        .methods
        .iter()
        .find(|name| !known.iter().any(|arm| arm.name == **name))
    {
        let mut names: Vec<&str> = Vec::new();
        for arm in &known {
            if !names.contains(&arm.name.as_str()) {
                names.push(&arm.name);
            }
        }
        let problem = format!("names `{name}`; expected {}", names.join(", "));
        return Err(ModelError::invalid("methods", problem));
    }
    let wanted = |arm: &Arm| options.methods.is_empty() || options.methods.contains(&arm.name);
    let methods: Vec<Arm> = method_arms().into_iter().filter(wanted).collect();
    let ablations = if options.ablations { ablation_arms() } else { vec![] };
    let between_arms: Vec<Arm> = between_arms().into_iter().filter(wanted).collect();
    let bench = Bench {
        model,
        base: &base,
        judge,
        options,
        starts: Default::default(),
    };
    let mut cells = Vec::new();
    for &seed in &options.seeds {
        let sections = [
            (Section::Methods, &methods, &subjects),
            (Section::Between, &between_arms, &between_subjects),
            (Section::Ablations, &ablations, &subjects),
        ];
        for (section, arms, subjects) in sections {
            for &subject in subjects {
                cells.extend(arms.iter().map(|arm| (seed, subject, section, arm)));
            }
        }
    }
    let mut evidence = Evidence {
        model: model.fingerprint().to_owned(),
        settings: bench.settings(),
        rows: vec![],
        ablations: vec![],
        between: vec![],
        parts: vec![],
    };
    let total = cells.len();
    // Cells that an ablation shares with a method are computed once.
    let mut seen: BTreeMap<String, Option<MethodRow>> = BTreeMap::new();
    for (number, (seed, subject, section, arm)) in cells.into_iter().enumerate() {
        progress(number, total, &format!("{} {} {seed}", subject.name, arm.name));
        let decided_by = bench.decided_by(arm, subject, seed)?;
        let same = decided_by.to_string();
        let row = match seen.get(&same) {
            Some(row) => row.clone().map(|row| MethodRow {
                method: arm.name.clone(),
                ..row
            }),
            None => {
                let mine = options.is_mine(seen.len());
                let row = bench.row(arm, subject, seed, &decided_by, mine)?;
                seen.insert(same, row.clone());
                row
            }
        };
        match section {
            Section::Methods => evidence.rows.extend(row),
            Section::Between => evidence.between.extend(row),
            Section::Ablations => evidence.ablations.extend(row),
        }
    }
    if options.styles {
        for &seed in &options.seeds {
            evidence.parts.extend(bench.parts(&subjects, seed, progress)?);
        }
    }
    if let (Some(sheets), Some(&seed)) = (&options.sheets, options.seeds.first()) {
        for (arms, subjects) in [(&methods, &subjects), (&between_arms, &between_subjects)] {
            for subject in subjects {
                bench.sheet(arms, subject, seed, sheets)?;
            }
        }
    }
    Ok(evidence)
}

/// The table that a row belongs to.
#[derive(Clone, Copy)]
enum Section {
    Methods,
    Between,
    Ablations,
}

fn chosen_subjects(
    options: &MethodsOptions,
    all: &'static [HeldOutSubject],
) -> Result<Vec<&'static HeldOutSubject>, ModelError> {
    if options.named.is_empty() {
        return Ok(all.iter().take(options.subjects).collect());
    }
    let find = |name: &String| {
        all.iter().find(|subject| subject.name == *name).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|subject| subject.name).collect();
            ModelError::invalid("subjects", format!("names `{name}`; expected {}", names.join(", ")))
        })
    };
    options.named.iter().map(find).collect()
}
