//! The device thread and its door.

mod command;
mod handle;

pub use command::{
    ConceptUse, EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingProgress, TrainingRequest,
};
pub use handle::{EngineHandle, GenerationStream, Health, ModelInfo, TrainingStream};
