//! The small default model: a world that is rendered procedurally, and the recipe that trains it.

/// The checkpoint folder: written, shipped, unpacked.
pub mod checkpoint;
mod codebook;
/// A world of designers' drawings, and the recipe of its model.
pub mod designers;
/// Measures of the tokenizer and the transformer on fresh images.
pub mod measure;
/// Trainable parameters and their files.
pub(crate) mod parameters;
mod sequences;
/// Trains the VQGAN.
pub mod tokenizer_training;
/// Trains the transformer.
pub mod transformer_training;
/// The vocabulary and its file.
pub mod vocabulary;
/// Classes, attributes, scenes, styles, captions, and their rendering.
pub mod world;

pub use sequences::Corpus;

/// Rows of the pocket tokenizer's codebook.
pub const IMAGE_CODES: i64 = 1024;
