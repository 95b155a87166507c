//! The door: clonable, bounded, and free of tensors.

use tokio::sync::{mpsc, watch};

use crate::concept::{ConceptFile, ConceptFileError};

use super::command::{EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingRequest};

/// Readiness as the device thread last reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Loading,
    Ready,
    Stopped(String),
}

/// What the loaded base model is; fixed once the engine is ready.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// The model's name in `/v1/models`.
    pub id: String,
    /// Fingerprint of the base model: concepts carry it and are refused on another.
    pub fingerprint: String,
    pub layers: usize,
    pub hidden: usize,
    /// Pictures of exactly these `(width, height)` can be drawn; the first is the default.
    pub sizes: Vec<(u32, u32)>,
    pub default_guidance_scale: f64,
    pub default_temperature: f64,
    pub default_top_k: u32,
    /// The preset whose training defaults fit this model.
    pub preset: crate::training::Preset,
}

impl ModelInfo {
    /// Reads a concept file that is to be used with this model.
    ///
    /// # Errors
    /// When the bytes are no concept file, or one of another base model.
    pub fn read_concept(&self, bytes: &[u8]) -> Result<ConceptFile, ConceptFileError> {
        let file = ConceptFile::from_bytes(bytes)?;
        file.check_model(&self.fingerprint, self.layers, self.hidden)?;
        Ok(file)
    }
}

/// Events of one generation; dropping it cancels the generation.
#[derive(Debug)]
pub struct GenerationStream(pub(super) mpsc::Receiver<GenerationEvent>);

impl GenerationStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        self.0.recv().await
    }
    /// As [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<GenerationEvent> {
        self.0.blocking_recv()
    }
}

/// Events of one training; dropping it cancels the training.
#[derive(Debug)]
pub struct TrainingStream(pub(super) mpsc::Receiver<TrainingEvent>);

impl TrainingStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<TrainingEvent> {
        self.0.recv().await
    }
    /// As [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<TrainingEvent> {
        self.0.blocking_recv()
    }
}

#[derive(Debug)]
pub(super) enum Command {
    Generate {
        request: GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
    },
    Train {
        request: Box<TrainingRequest>,
        events: mpsc::Sender<TrainingEvent>,
    },
    /// Send a checkpoint of every running training, then end it; used before the process stops.
    Drain { done: tokio::sync::oneshot::Sender<()> },
}

/// Clonable door to the device thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) health: watch::Receiver<Health>,
    pub(super) info: std::sync::Arc<ModelInfo>,
}

impl EngineHandle {
    /// What the loaded model is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The device thread's state; never asks the device.
    pub fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    /// Hands a generation to the device thread. Bounded and without waiting.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full, `Stopped` while draining.
    pub fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, EngineError> {
        let (events, stream) = mpsc::channel(EVENTS_PER_REQUEST);
        self.send(Command::Generate { request, events })?;
        Ok(GenerationStream(stream))
    }

    /// Hands a training to the device thread. It runs in slices between the steps of generations.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full, `Stopped` while draining.
    pub fn train(&self, request: TrainingRequest) -> Result<TrainingStream, EngineError> {
        let (events, stream) = mpsc::channel(EVENTS_PER_REQUEST);
        self.send(Command::Train {
            request: Box::new(request),
            events,
        })?;
        Ok(TrainingStream(stream))
    }

    /// Asks every running training for a last checkpoint and stops taking work; returns when that has happened.
    pub async fn drain(&self) {
        let (done, finished) = tokio::sync::oneshot::channel();
        if self.commands.send(Command::Drain { done }).await.is_ok() {
            let _ = finished.await;
        }
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Overloaded {
                limit: self.commands.max_capacity(),
            },
            mpsc::error::TrySendError::Closed(_) => EngineError::Stopped,
        })
    }
}

/// A reader that falls this far behind loses intermediate progress events, never a picture, a checkpoint or the end.
const EVENTS_PER_REQUEST: usize = 64;
