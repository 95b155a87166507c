use serde::{Deserialize, Serialize};

use crate::concept::ConceptKind;

/// Which set of defaults a training starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// The paper's values, for Lumina-mGPT 7B and larger.
    Paper,
    /// What the measurements favour on the pocket model.
    Pocket,
}

/// How a context token's values depend on the trained parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parametrisation {
    /// The trained parameter is the context token itself.
    Absolute,
    /// `init + sigma_layer * delta`, delta trained: learning rates become comparable between layers.
    LayerRelative,
}

/// Everything that decides a training's outcome, besides the pictures and the base model. Recorded in the concept file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSpec {
    /// The concept's name: `<name>` is its placeholder.
    pub name: String,
    pub kind: ConceptKind,
    /// The class noun of a subject ("cat"); `None` for styles.
    pub class_noun: Option<String>,
    /// N
    pub layers: u32,
    pub steps: u32,
    pub learning_rate: f64,
    pub batch_size: u32,
    /// T
    pub text_tokens: u32,
    /// K; 0 switches the image context token off.
    pub image_tokens: u32,
    pub parametrisation: Parametrisation,
    /// alpha of the dual prior preservation; 0 switches it off.
    pub prior_weight: f64,
    /// beta of the context-aware self-regularisation; 0 switches it off.
    pub regularisation_weight: f64,
    /// Class pictures that the frozen model draws for the prior term.
    pub prior_pictures: u32,
    /// Random crop offsets and mirrored references, instead of the centre crop alone.
    pub augment: bool,
    pub seed: u64,
}

impl TrainingSpec {
    /// The defaults of `preset` for a concept of `kind` on a model with `model_layers` decoder layers.
    pub fn preset(
        preset: Preset,
        kind: ConceptKind,
        name: &str,
        class_noun: Option<&str>,
        model_layers: usize,
    ) -> Self {
        let all = model_layers as u32;
        let base = Self {
            name: name.to_owned(),
            kind,
            class_noun: class_noun.map(str::to_owned),
            layers: 9.min(all),
            steps: 1000,
            learning_rate: 1e-2,
            batch_size: 1,
            text_tokens: 1,
            image_tokens: 1,
            parametrisation: Parametrisation::Absolute,
            prior_weight: 1e-2,
            regularisation_weight: 5e-4,
            prior_pictures: 8,
            augment: false,
            seed: 0,
        };
        match (preset, kind) {
            (Preset::Paper, ConceptKind::Subject) => base,
            (Preset::Paper, ConceptKind::Style) => Self {
                layers: 3.min(all),
                steps: 600,
                ..base
            },
            (Preset::Pocket, ConceptKind::Subject) => Self {
                layers: all,
                steps: 90,
                batch_size: 5,
                text_tokens: 4,
                parametrisation: Parametrisation::LayerRelative,
                ..base
            },
            (Preset::Pocket, ConceptKind::Style) => Self {
                layers: all,
                steps: 60,
                batch_size: 4,
                text_tokens: 2,
                parametrisation: Parametrisation::LayerRelative,
                augment: true,
                ..base
            },
        }
    }
}
