//! The use cases, shared by HTTP and the command line. What may be said to whom and how much is decided here.

mod concepts;
mod generate;

use std::sync::Arc;

pub use concepts::{ConceptView, Registration};
pub use generate::{GenerateInput, Generated, GeneratedImage, UsedConcept};

use crate::engine::{EngineError, EngineHandle};
use crate::error::{Error, ErrorKind};
use crate::jobs::Wake;
use crate::picture::PictureLimits;
use crate::registry::{Registry, RegistryError};

/// Everything that a use case needs.
#[derive(Debug, Clone)]
pub struct Service {
    pub registry: Registry,
    pub engine: EngineHandle,
    pub wake: Wake,
    pub limits: Arc<Limits>,
}

/// What callers may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub picture: PictureLimits,
    /// Reference pictures of one concept.
    pub pictures: usize,
    /// Pictures of one generation.
    pub count: u32,
    /// Characters of a prompt.
    pub prompt: usize,
    /// Trainings that may wait.
    pub queued_trainings: i64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            picture: PictureLimits::default(),
            pictures: crate::training::spec::PICTURES_LIMIT,
            count: 10,
            prompt: 4000,
            queued_trainings: 100,
        }
    }
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::NameTaken(name) => Self::field(
                "name_taken",
                "name",
                format!("is `{name}`, which another concept has; choose another name or delete that concept"),
            )
            .of_kind(ErrorKind::Conflict),
            other => Self::internal(other),
        }
    }
}

impl From<crate::registry::BlobError> for Error {
    fn from(error: crate::registry::BlobError) -> Self {
        Self::internal(error)
    }
}

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Invalid { field, problem } => Self::field("invalid_value", field, problem),
            EngineError::Overloaded { limit, retry_after } => Self::new(
                ErrorKind::Overloaded,
                "overloaded",
                "Too many requests are waiting; try again soon.",
            )
            .limit(limit as u64)
            .retry_after(retry_after),
            EngineError::Stopped => Self::new(ErrorKind::Unavailable, "stopping", "The server is stopping."),
            EngineError::Device(cause) => Self::internal(cause),
        }
    }
}

impl From<crate::concept::spec::SpecFault> for Error {
    fn from(fault: crate::concept::spec::SpecFault) -> Self {
        Self::field("invalid_value", fault.field, fault.problem)
    }
}
