//! Concept training (arXiv 2508.07341, section 3): data, losses, a resumable trainer.

mod checkpoint;
mod losses;
/// The rules that move trainable tensors.
pub mod optimizer;
mod references;
/// What to train: hyper-parameters and their presets.
pub mod spec;
mod trainer;

pub use references::{Reference, References};
pub use spec::{Preset, SpecFault, TrainingSpec};
pub use trainer::{Advance, StepLosses, Trainer, reference_loss, token_logits};
