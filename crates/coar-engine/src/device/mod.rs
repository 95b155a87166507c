//! The device thread and its door. One process has one device; the thread is the model's only owner.

mod concept_cache;
mod device_time;
mod generations;
mod guard;
mod handle;
mod memory;
mod meters;
mod pictures;
#[cfg(feature = "stand-in")]
mod stand_in;
mod thread;
mod trainings;

pub use concept_cache::ConceptCache;
pub use guard::DEVICE_LOST;
pub use handle::{EngineHandle, GenerationStream, TrainingStream};
pub use memory::{KvMemory, free_bytes, used_bytes};
#[cfg(feature = "stand-in")]
pub use stand_in::{Pace, stand_in};
pub use thread::{EngineOptions, start};
