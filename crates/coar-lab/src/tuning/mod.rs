//! Methods that the paper compares with and that change weights: DreamBooth, LoRA, PersonalAR, Proxy-Tuning.
//!
//! They train and draw on a copy of the transformer, so that no batch can hold two of their results; what they cost beside
//! context tokens is measured by `coar-lab eval methods`.

mod file;
mod spec;
mod tuner;
mod weights;

pub use file::TuningFile;
pub use spec::{TuningSpec, WeightMethod};
pub use tuner::Tuner;
pub use weights::BaseWeights;
