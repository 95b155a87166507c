//! Training of the model of the designers' world: stage by stage, on whatever device there is, resumable.

/// Figures of a tokenizer.
pub mod measure;
mod pairs;
/// A stage's folder, state and curve.
pub mod run;
/// The tokenizer.
pub mod tokenizer;

pub use run::Budget;
