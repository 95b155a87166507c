//! Third-party networks that judge images. DreamBench scores with DINO ViT-S/16 and CLIP ViT-B/32, with the sizes
//! given by their folders; the designers' world uses EfficientNet-Lite0. [`Classifier`] is the architecture of the
//! judges that this project trains itself. `docs/judges.md` describes the files and the comparison with an
//! independent implementation.

mod classifier;
mod clip;
mod config;
mod dino;
pub(crate) mod efficientnet;
mod encoder;
mod fields;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod preprocessor;
mod tokenizer;
mod weights;

pub use classifier::{Classifier, ClassifierShape};
pub use clip::Clip;
pub use dino::Dino;
pub use efficientnet::{EfficientNet, Outputs};
pub use preprocessor::Preprocessing;

#[cfg(test)]
mod tests;
