//! Where generations run: on this process's device, or on workers reached over the network. The result does not
//! depend on it: the same request gives the same images and the same events.

mod concept_store;
mod fleet;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod member;
mod streams;
mod wire;
mod worker;

use std::sync::Arc;

use crate::registry::{NewGeneration, Registry};
use coar_core::engine::{
    ConceptTokens, ConceptUse, Cost, Costed, EngineError, EngineHandle, GenerateRequest, GenerationEvent,
    GenerationStream, Health, ModelInfo,
};
use coar_core::error::Error;
use concept_store::ConceptStore;
pub use fleet::{Fleet, RemoteStream};
pub use member::{Member, WarmConcepts};
pub use streams::Streams;
pub use wire::GenerationRequest;
pub use worker::{WorkerState, worker_router, worker_token};

/// Where generations run.
#[derive(Debug, Clone)]
pub enum Executor {
    /// In this process.
    Local(Local),
    /// On workers.
    Remote(Fleet),
}

/// This process's device.
#[derive(Debug, Clone)]
pub struct Local {
    pub engine: EngineHandle,
    concepts: ConceptStore,
}

/// A checked generation and its cost.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub cost: Cost,
    request: Arc<GenerationRequest>,
}

/// Events of one generation. Dropping it cancels the generation.
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
    /// On this process's device, with the concepts of a registry; `concept_bytes` of them are cached in memory.
    pub fn local(engine: EngineHandle, registry: &Registry, concept_bytes: usize) -> Self {
        Self::Local(Local::new(engine, registry, concept_bytes))
    }

    /// The base model.
    pub fn info(&self) -> &ModelInfo {
        match self {
            Self::Local(local) => local.engine.info(),
            Self::Remote(fleet) => fleet.info(),
        }
    }

    /// Whether images can be generated. A fleet always reports true: workers come and go.
    pub fn health(&self) -> Health {
        match self {
            Self::Local(local) => local.engine.health(),
            Self::Remote(_) => Health::Ready,
        }
    }

    /// Validates a generation for the model and counts its cost. `tokens` are those of its concepts, in order; no
    /// file is read.
    ///
    /// # Errors
    /// When the prompt cannot be tokenized or is too long.
    pub fn prepare(&self, new: &NewGeneration, tokens: &[ConceptTokens]) -> Result<Prepared, Error> {
        let counter = match self {
            Self::Local(local) => local.engine.counter(),
            Self::Remote(fleet) => fleet.counter(),
        };
        let names = new.concepts.iter().map(|concept| concept.name.as_str());
        let concepts: Vec<_> = names.zip(tokens.iter().copied()).collect();
        let cost = counter.count(Costed {
            prompt: &new.prompt,
            concepts: &concepts,
            sampling: &new.settings.sampling,
            count: new.settings.n,
        });
        Ok(Prepared {
            cost: cost.map_err(EngineError::from)?,
            request: Arc::new(new.into()),
        })
    }

    /// Starts a generation that [`Self::prepare`] has checked.
    ///
    /// # Errors
    /// As [`Self::draw`].
    pub async fn start(&self, prepared: &Prepared) -> Result<EventStream, Error> {
        self.draw(prepared.request.clone()).await
    }

    /// Starts a generation.
    ///
    /// # Errors
    /// `overloaded`, `stopping`; if a concept's file was deleted or does not fit; on a fleet, `no_worker`.
    pub async fn draw(&self, request: Arc<GenerationRequest>) -> Result<EventStream, Error> {
        match self {
            Self::Local(local) => Ok(EventStream::Local(local.draw(&request).await?)),
            Self::Remote(fleet) => Ok(EventStream::Remote(fleet.start(request).await?)),
        }
    }
}

impl Local {
    /// With the concepts of a registry; `concept_bytes` of them are cached in memory.
    pub fn new(engine: EngineHandle, registry: &Registry, concept_bytes: usize) -> Self {
        let concepts = ConceptStore::new(registry.blobs.clone(), concept_bytes);
        Self { engine, concepts }
    }

    /// Starts a generation.
    ///
    /// # Errors
    /// `overloaded`, `stopping`; if a concept's file was deleted or does not fit.
    pub async fn draw(&self, request: &GenerationRequest) -> Result<GenerationStream, Error> {
        let mut concepts = Vec::with_capacity(request.concepts.len());
        for concept in &request.concepts {
            concepts.push(ConceptUse {
                name: concept.name.clone(),
                content_hash: concept.hash.clone(),
                kind: concept.kind,
                tensors: self.concepts.get(self.engine.info(), concept).await?,
            });
        }
        let settings = &request.settings;
        Ok(self.engine.generate(GenerateRequest {
            tenant: request.tenant.clone(),
            prompt: request.prompt.clone(),
            concepts,
            sampling: settings.sampling,
            count: settings.n,
            first_index: settings.first_index,
            partial_images: settings.partial_images,
        })?)
    }
}
