//! Training of the model of the designers' world: stage by stage, on any device, resumable.

/// Trained stages packed into small files.
pub mod bundle;
/// The decoder, with frozen codes.
pub mod decoder;
mod discriminator;
/// The finished checkpoint folder.
pub mod export;
mod feed;
/// Metrics of a tokenizer.
pub mod measure;
mod pairs;
/// A stage's folder, state and curve.
pub mod run;
mod sequences;
mod stage;
/// The tokenizer.
pub mod tokenizer;
/// The transformer.
pub mod transformer;

pub use run::{Budget, Scale};
