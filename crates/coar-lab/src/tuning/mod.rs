//! The paper's baselines that change weights: DreamBooth, LoRA, PersonalAR, Proxy-Tuning.
//!
//! They train and generate on a copy of the transformer, so no batch can contain two of their results; `coar-lab
//! eval methods` measures their cost relative to context tokens.

mod file;
mod spec;
mod tuner;
mod weights;

pub use file::TuningFile;
pub use spec::{TuningSpec, WeightMethod};
pub use tuner::Tuner;
pub use weights::BaseWeights;
