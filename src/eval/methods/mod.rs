//! Every method of the paper's table on one frozen backbone, with the same pictures, seeds, sampler and judge.

mod arms;
mod cell;
/// `docs/evidence.md` from the rows.
pub mod evidence;
mod plot;
/// Means and intervals.
pub mod statistics;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use arms::{Arm, ablation_arms, method_arms};
pub use cell::Bench;

use super::judge::Judge;
use crate::model::{LuminaMgpt, ModelError};
use crate::pocket::world::{HeldOutSubject, development_subjects, held_out_subjects};
use crate::training::tuning::BaseWeights;

/// What is measured.
#[derive(Debug, Clone)]
pub struct MethodsOptions {
    /// Seeds decide references, training and drawing.
    pub seeds: Vec<u64>,
    /// Held-out subjects, from the first; or those that are named.
    pub subjects: usize,
    pub named: Vec<String>,
    /// On the development subjects, on which settings are chosen.
    pub development: bool,
    /// Pictures of each of the nine scenes.
    pub per_scene: usize,
    pub guidance_scale: f64,
    pub top_k: i64,
    /// Arms of the comparison, by name; empty: all.
    pub methods: Vec<String>,
    pub ablations: bool,
    /// Where finished cells are kept, so that an interrupted run goes on.
    pub dir: Option<PathBuf>,
    /// `(index, count)`: only every count-th cell, for several processes on the same folder.
    pub part: (usize, usize),
    /// Replaced training settings by arm: `{"dreambooth": {"steps": 30}}`.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

/// One method, subject and seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodRow {
    pub method: String,
    pub subject: String,
    pub seed: u64,
    /// Cosine of the judge's features with unseen pictures of the subject in the same scene.
    pub similarity: f64,
    /// Intersection of colour histograms with the same pictures.
    pub colour: f64,
    /// Share of pictures in the scene that was asked for.
    pub scene: f64,
    /// Share of pictures that show the subject's class.
    pub class: f64,
    /// Mean share of right answers for both colours, pattern and accessory.
    pub attributes: f64,
    /// Nats per image code on unseen pictures.
    pub loss: Option<f64>,
    /// Trained numbers.
    pub parameters: u64,
    /// Of the file that holds what was learned.
    pub bytes: u64,
    /// Of training, first stages and class pictures included.
    pub seconds: f64,
    /// From the file's bytes to something that can draw.
    pub swap_ms: f64,
    /// Whether one batch of the engine can mix it with others.
    pub mixed_batch: bool,
}

/// Everything that one run measured, with what decides it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub model: String,
    pub settings: serde_json::Value,
    /// The comparison of methods.
    pub rows: Vec<MethodRow>,
    /// Variations of CoAR, one setting at a time; `method` is `axis: value`.
    #[serde(default)]
    pub ablations: Vec<MethodRow>,
}

/// Runs every cell that is not there yet and returns all that are: with `part`, the others' as far as they are finished.
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
    let subjects = chosen_subjects(options)?;
    let known = method_arms();
    if let Some(name) = options
        .methods
        .iter()
        .find(|name| !known.iter().any(|arm| arm.name == **name))
    {
        let names: Vec<&str> = known.iter().map(|arm| arm.name.as_str()).collect();
        let problem = format!("names `{name}`; expected {}", names.join(", "));
        return Err(ModelError::invalid("methods", problem));
    }
    let mut arms: Vec<(bool, Arm)> = known
        .into_iter()
        .filter(|arm| options.methods.is_empty() || options.methods.contains(&arm.name))
        .map(|arm| (false, arm))
        .collect();
    if options.ablations {
        arms.extend(ablation_arms().into_iter().map(|arm| (true, arm)));
    }
    let bench = Bench {
        model,
        base: &base,
        judge,
        options,
    };
    let mut cells = Vec::new();
    for &seed in &options.seeds {
        for &subject in &subjects {
            cells.extend(arms.iter().map(|(ablation, arm)| (seed, subject, *ablation, arm)));
        }
    }
    let mut evidence = Evidence {
        model: model.fingerprint().to_owned(),
        settings: bench.settings(),
        rows: vec![],
        ablations: vec![],
    };
    let total = cells.len();
    let (index, count) = options.part;
    for (number, (seed, subject, ablation, arm)) in cells.into_iter().enumerate() {
        let name = format!("{} {} {seed}", subject.name, arm.name);
        progress(number, total, &name);
        let mine = number % count == index;
        if let Some(row) = bench.row(arm, subject, seed, mine)? {
            match ablation {
                true => evidence.ablations.push(row),
                false => evidence.rows.push(row),
            }
        }
    }
    Ok(evidence)
}

fn chosen_subjects(options: &MethodsOptions) -> Result<Vec<&'static HeldOutSubject>, ModelError> {
    let all = match options.development {
        true => development_subjects(),
        false => held_out_subjects(),
    };
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
