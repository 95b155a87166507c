//! The device thread and its door. One process has one device; the thread is the model's only owner.

mod command;
mod concept_cache;
mod cost;
mod generations;
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
pub use handle::{EngineHandle, GenerationStream, Health, ModelInfo, TrainingStream};
pub use memory::{free_bytes, used_bytes};
pub use plan::{DrawSettings, PlannedConcept, PlannedSequence, draw_alone, draw_together, plan_sequence};
pub use stand_in::{Pace, stand_in};
pub use thread::{EngineOptions, start};

/// Exit status of a process whose device does not answer any more (EX_UNAVAILABLE of sysexits.h).
pub const DEVICE_LOST: i32 = 69;

/// Ends the process at once, without destructors: those of libtorch would run beside a thread that still computes, or wait
/// for a device that is gone. What was acknowledged is in the database; a new process goes on from there.
fn end_process() -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(DEVICE_LOST) }
}
