//! The networks that DreamBench scores with: DINO ViT-S/16 and CLIP ViT-B/32, of whatever size their folders state.
//! `docs/judges.md` says what is read and how it was compared with `transformers`.

mod clip;
mod config;
mod dino;
mod encoder;
mod fields;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod preprocessor;
mod tokenizer;
mod weights;

pub use clip::Clip;
pub use dino::Dino;
pub use preprocessor::Preprocessing;

#[cfg(test)]
mod tests;
