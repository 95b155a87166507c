//! Concept training.

/// What to train: hyper-parameters and their presets.
pub mod spec;

pub use spec::{Preset, TrainingSpec};
