//! The small default model: a world that it draws itself, and the recipe that trains it.

mod parameters;
/// Trains the VQGAN.
pub mod tokenizer_training;
/// Classes, attributes, scenes, styles, captions, and how they are drawn.
pub mod world;

/// Rows of the pocket tokenizer's codebook.
pub const IMAGE_CODES: i64 = 1024;
