//! Concept training (arXiv 2508.07341, section 3): data, losses, a resumable trainer.

mod checkpoint;
mod emphasis;
mod losses;
mod memory;
/// The rules that move trainable tensors.
pub mod optimizer;
mod passes;
mod references;
mod start;
mod step;
mod trainer;
/// Methods that change the model's weights, on a copy.
pub mod tuning;

pub use crate::concept::spec::{self, Preset, SpecFault, TokenMethod, TrainingSpec};
pub use losses::next_token;
pub use memory::{Estimate, StepSize};
pub use passes::{Graph, Row, row_logits, token_logits};
pub use references::{Reference, References};
pub use trainer::{Advance, StepLosses, Trainer};
