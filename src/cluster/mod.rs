//! Where generations are drawn: on this process's device, or by workers that are reached over the network. What drawing
//! means does not change: the same request gives the same pictures, and the same events in between.

mod fleet;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod member;
mod streams;
mod wire;
mod worker;

use std::sync::Arc;

use crate::registry::{BlobError, GenerationConcept, NewGeneration, Registry};
use coar_core::concept::ConceptFileError;
use coar_core::engine::{
    ConceptUse, Cost, EngineHandle, GenerateRequest, GenerationEvent, GenerationStream, Health, ModelInfo,
};
use coar_core::error::{Error, ErrorKind};
pub use fleet::{Fleet, RemoteStream};
pub use member::{Hot, Member};
pub use streams::Streams;
pub use worker::{WorkerState, worker_router, worker_token};

/// Where generations are drawn.
#[derive(Debug, Clone)]
pub enum Executor {
    /// By this process.
    Local(Local),
    /// By workers.
    Remote(Fleet),
}

/// This process's device.
#[derive(Debug, Clone)]
pub struct Local {
    pub engine: EngineHandle,
    registry: Registry,
}

/// A generation that can be drawn, and what it costs.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub cost: Cost,
    work: Work,
}

#[derive(Debug, Clone)]
enum Work {
    Local(Box<GenerateRequest>),
    Remote(Arc<wire::Order>),
}

/// Events of one generation; dropping it cancels the generation.
#[derive(Debug)]
pub enum EventStream {
    Local(GenerationStream),
    Remote(RemoteStream),
}

impl EventStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        match self {
            Self::Local(stream) => stream.next().await,
            Self::Remote(stream) => stream.next().await,
        }
    }
}

impl Executor {
    /// On this process's device, with the concepts of a registry.
    pub fn local(engine: EngineHandle, registry: Registry) -> Self {
        Self::Local(Local { engine, registry })
    }

    /// What the base model is.
    pub fn info(&self) -> &ModelInfo {
        match self {
            Self::Local(local) => local.engine.info(),
            Self::Remote(fleet) => fleet.info(),
        }
    }

    /// Whether pictures can be drawn. Workers come and go; where they draw, that is always so.
    pub fn health(&self) -> Health {
        match self {
            Self::Local(local) => local.engine.health(),
            Self::Remote(_) => Health::Ready,
        }
    }

    /// Checks a generation as far as the model is concerned, and counts its cost.
    ///
    /// # Errors
    /// What is wrong with it; a concept's file that is gone or does not fit; where workers draw, `no_worker`.
    pub async fn prepare(&self, new: &NewGeneration) -> Result<Prepared, Error> {
        match self {
            Self::Local(local) => local.prepare(new).await,
            Self::Remote(fleet) => {
                let order = Arc::new(wire::Order::of(new));
                Ok(Prepared {
                    cost: fleet.cost(&order).await?,
                    work: Work::Remote(order),
                })
            }
        }
    }

    /// Begins to draw.
    ///
    /// # Errors
    /// `overloaded`, `stopping`; where workers draw, `no_worker`.
    pub async fn start(&self, prepared: &Prepared) -> Result<EventStream, Error> {
        match (self, &prepared.work) {
            (Self::Local(local), Work::Local(request)) => {
                Ok(EventStream::Local(local.engine.generate(request.as_ref().clone())?))
            }
            (Self::Remote(fleet), Work::Remote(order)) => Ok(EventStream::Remote(fleet.start(order.clone()).await?)),
            _ => Err(Error::internal("a generation was prepared for another executor")),
        }
    }
}

impl Local {
    /// # Errors
    /// As [`Executor::prepare`].
    pub async fn prepare(&self, new: &NewGeneration) -> Result<Prepared, Error> {
        let mut concepts = Vec::new();
        for concept in &new.concepts {
            let bytes = match self.registry.blobs.get(&concept.hash).await {
                Err(BlobError::Missing(_)) => {
                    let message = format!("The concept `{}` was deleted before this was drawn.", concept.name);
                    return Err(Error::new(ErrorKind::NotFound, "concept_not_found", message));
                }
                other => other?,
            };
            concepts.push(self.concept_use(concept, &bytes).map_err(|error| {
                let message = format!("The concept `{}` cannot be used: {error}.", concept.name);
                Error::new(ErrorKind::Conflict, "concept_unusable", message)
            })?);
        }
        let request = engine_request(new, concepts);
        Ok(Prepared {
            cost: self.engine.cost(&request)?,
            work: Work::Local(Box::new(request)),
        })
    }

    /// A concept's file as the engine takes it.
    fn concept_use(&self, concept: &GenerationConcept, file: &[u8]) -> Result<ConceptUse, ConceptFileError> {
        let file = self.engine.info().read_concept(file)?;
        Ok(ConceptUse {
            name: concept.name.clone(),
            content_hash: concept.hash.clone(),
            kind: concept.kind,
            tensors: Arc::new(file.tensors),
        })
    }
}

/// A generation as the engine takes it.
fn engine_request(new: &NewGeneration, concepts: Vec<ConceptUse>) -> GenerateRequest {
    let settings = &new.settings;
    GenerateRequest {
        tenant: new.tenant.to_string(),
        prompt: new.prompt.clone(),
        concepts,
        sampling: settings.sampling,
        count: settings.n,
        first_index: settings.first_index,
        partial_images: settings.partial_images,
    }
}
