//! Concept training (arXiv 2508.07341, section 3): data, losses, a resumable trainer.

mod checkpoint;
mod losses;
/// The rules that move trainable tensors.
pub mod optimizer;
mod references;
mod start;
mod trainer;

pub use crate::concept::spec::{self, Preset, SpecFault, TrainingSpec};
pub use losses::next_token;
pub use references::{Reference, References};
pub use trainer::{Advance, StepLosses, Trainer, reference_loss, token_logits};
