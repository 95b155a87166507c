//! Concept training (arXiv 2508.07341, section 3): data, losses, a resumable trainer.

/// The rules that move trainable tensors.
pub mod optimizer;
/// What to train: hyper-parameters and their presets.
pub mod spec;

pub use spec::{Preset, SpecFault, TrainingSpec};
