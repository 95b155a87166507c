//! Training settings, and the report of each step.

/// The settings that determine a training's outcome: hyper-parameters and their presets; a concept records them.
pub mod spec;

pub use spec::{Preset, SpecFault, TokenMethod, TrainingSpec};

/// Losses of one optimizer step; disabled terms are absent.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepLosses {
    pub step: u32,
    pub total: f32,
    pub next_token: f32,
    pub prior: Option<f32>,
    pub regularisation: Option<f32>,
}
