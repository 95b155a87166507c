//! The device thread and its handle. One process has one device; the thread is the model's only owner.

mod concept_cache;
mod device_time;
mod ending;
mod generations;
mod guard;
mod images;
mod memory;
mod meters;
mod thread;
mod trainings;

pub use crate::model::decoding::Speculation;
pub use concept_cache::ConceptCache;
pub use guard::DEVICE_LOST;
pub use memory::{KvMemory, free_bytes, used_bytes};
pub(crate) use thread::set_threads;
pub use thread::{EngineOptions, start};
