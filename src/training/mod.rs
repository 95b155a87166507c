//! Concept training.

/// The rules that move trainable tensors.
pub mod optimizer;
/// What to train: hyper-parameters and their presets.
pub mod spec;

pub use spec::{Preset, TrainingSpec};
