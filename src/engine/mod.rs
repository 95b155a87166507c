//! The device thread and its door. One process has one device; the thread is the model's only owner.

mod command;
mod concept_cache;
mod cost;
mod device_time;
mod generations;
mod guard;
mod handle;
mod memory;
mod meters;
mod pictures;
mod plan;
mod scheduler;
mod stand_in;
mod thread;
mod trainings;

pub use command::{
    ConceptUse, EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingProgress, TrainingRequest,
};
pub use concept_cache::ConceptCache;
pub use cost::Cost;
pub use generations::Load;
pub use guard::DEVICE_LOST;
pub use handle::{EngineHandle, GenerationStream, Health, ModelInfo, TrainingStream};
pub use memory::{KvMemory, free_bytes, used_bytes};
pub use plan::{DrawSettings, PlannedConcept, PlannedSequence, draw_alone, draw_together, plan_sequence};
pub use stand_in::{Pace, stand_in};
pub use thread::{EngineOptions, start};
