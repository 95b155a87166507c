//! Concept training (arXiv 2508.07341, section 3): data, losses, a resumable trainer.

mod checkpoint;
mod emphasis;
/// The terms of the loss.
pub mod losses;
mod memory;
/// The update rules of trainable tensors.
pub mod optimizer;
mod passes;
mod prior;
mod references;
mod start;
mod step;
mod trainer;

pub use losses::next_token;
pub use memory::{Estimate, StepSize};
pub use passes::{Graph, Row, observed_logits, row_logits, rows, token_logits};
pub use prior::PRIOR_SEED;
pub use references::{Reference, References};
pub use trainer::{Advance, Trainer};

#[cfg(test)]
pub(crate) mod tests {
    use coar_core::image::{ImageLimits, RgbImage, decode};

    /// Reference image `number`, from 1, of the sample subject `rex`: a cat on the beach, in the snow, …
    pub(crate) fn rex(number: usize) -> RgbImage {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let bytes = std::fs::read(root.join(format!("concepts/rex/{number}.png"))).unwrap();
        decode(&bytes, &ImageLimits::default()).unwrap()
    }
}
