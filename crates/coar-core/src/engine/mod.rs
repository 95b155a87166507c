//! The engine's protocol: owned data only, no libtorch tensors.

mod cost;
mod handle;
mod sampling;
mod trace;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::concept::{ConceptFile, ConceptFileError, ConceptTensors};
use crate::image::RgbImage;
use crate::image::preprocessing::{CropPlan, ReducedImage};
use crate::tokenizer::TokenizerError;
use crate::training::{StepLosses, TrainingSpec};

pub use cost::{ConceptTokens, Cost, Costed, TokenCounter, prompt_parts};
pub use handle::{Command, DeviceThread, EngineHandle, Gauge, GenerationStream, Ticket, TrainingStream};
pub use sampling::SamplingParams;
pub use trace::{GenerationClock, Prefill, Trace};

/// A concept of a request; it replaces every `<name>` in the prompt.
#[derive(Debug, Clone)]
pub struct ConceptUse {
    pub name: String,
    /// Hex SHA-256 of the concept file: the key of every cache.
    pub content_hash: String,
    pub kind: crate::concept::ConceptKind,
    pub tensors: Arc<ConceptTensors>,
}

/// One request for `count` images.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The tenant, for fair scheduling by cost in tokens. Empty if there is only one.
    pub tenant: String,
    /// The user's prompt with `<name>` placeholders.
    pub prompt: String,
    pub concepts: Vec<ConceptUse>,
    pub sampling: SamplingParams,
    pub count: u32,
    /// Index of the first image within the seed, so that image i of a larger request can be generated alone.
    pub first_index: u32,
    /// Partial images per image, evenly spread over its rows.
    pub partial_images: u32,
}

/// Events of a running generation.
#[derive(Debug)]
pub enum GenerationEvent {
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    /// Image `index` so far; missing parts are grey.
    Partial {
        index: u32,
        /// 0 for the first partial image of this index.
        number: u32,
        image: RgbImage,
    },
    /// Image `index` is complete.
    Image {
        index: u32,
        image: RgbImage,
    },
    /// The last event of a successful request, with its cost in tokens.
    Done {
        text_tokens: u64,
        image_tokens: u64,
    },
    /// The last event of a request that failed.
    Failed(EngineError),
}

/// A training to start or to resume.
#[derive(Debug, Clone)]
pub struct TrainingRequest {
    pub spec: TrainingSpec,
    /// The decoded reference images, reduced by [`ModelInfo::crop_plan`].
    pub images: Vec<ReducedImage>,
    /// The newest checkpoint, to resume from.
    pub checkpoint: Option<Bytes>,
    /// Steps after which a preview concept file is sent.
    pub previews: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingProgress {
    pub step: u32,
    pub total_steps: u32,
    pub losses: StepLosses,
    pub steps_per_second: f32,
}

/// Events of a running training. Dropping the stream cancels the training.
#[derive(Debug)]
pub enum TrainingEvent {
    Progress(TrainingProgress),
    /// The concept after that step: a concept file (safetensors).
    Preview {
        step: u32,
        file: Bytes,
    },
    /// The complete training state, to resume from.
    Checkpoint {
        step: u32,
        bytes: Bytes,
    },
    /// The finished concept file (safetensors) and its report (JSON: loss curve, seconds).
    Done {
        file: Bytes,
        report: serde_json::Value,
    },
    Failed(EngineError),
}

/// Why the engine rejected or failed a request.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// A value of the request is outside the model's limits.
    #[error("`{field}` {problem}")]
    Invalid { field: &'static str, problem: String },
    /// The queue is full.
    #[error("engine queue is full ({limit} requests)")]
    Overloaded {
        limit: usize,
        /// Estimated time to process the queue at the current speed.
        retry_after: std::time::Duration,
    },
    /// The engine is stopping or has stopped.
    #[error("the engine is stopping")]
    Stopped,
    /// Every worker that ran it was lost, and no other one is available.
    #[error("all workers that ran it were lost")]
    Lost,
    /// libtorch or the device failed.
    #[error("the device failed: {0}")]
    Device(String),
}

/// Readiness as the device thread last reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Loading,
    Ready,
    /// There is work, but no progress for this long.
    Stuck(Duration),
    Stopped(String),
}

/// The loaded base model; fixed once the engine is ready.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModelInfo {
    /// The model's name in `/v1/models`.
    pub id: String,
    /// Fingerprint of the base model: concepts record it and are rejected by other models.
    pub fingerprint: String,
    pub layers: usize,
    pub hidden: usize,
    /// The supported image sizes `(width, height)`; the first is the default.
    pub sizes: Vec<(u32, u32)>,
    pub default_guidance_scale: f64,
    pub default_temperature: f64,
    pub default_top_k: u32,
    /// The preset with the training defaults for this model.
    pub preset: crate::training::Preset,
}

impl ModelInfo {
    /// The model's default size and sampling.
    pub fn sampling(&self, seed: u64) -> SamplingParams {
        let (width, height) = self.sizes[0];
        SamplingParams {
            width,
            height,
            seed,
            guidance_scale: self.default_guidance_scale,
            temperature: self.default_temperature,
            top_k: self.default_top_k,
            identity_mask: true,
        }
    }

    /// How images are converted to one of the sizes.
    pub fn crop_plan(&self) -> CropPlan {
        CropPlan::of_sizes(self.sizes.clone())
    }

    /// The largest concept file of this model, in bytes.
    pub fn concept_limit(&self) -> usize {
        crate::concept::file::file_limit(self.layers, self.hidden)
    }

    /// Reads a concept file for use with this model.
    ///
    /// # Errors
    /// When the bytes are not a valid concept file, it was trained on another base model, or it is outside the limits
    /// of a training on this model.
    pub fn read_concept(&self, bytes: &[u8]) -> Result<ConceptFile, ConceptFileError> {
        let limit = self.concept_limit();
        if bytes.len() > limit {
            return Err(ConceptFileError::TooLarge {
                actual: bytes.len(),
                limit,
            });
        }
        let file = ConceptFile::from_bytes(bytes)?;
        file.check_model(&self.fingerprint, self.layers, self.hidden)?;
        Ok(file)
    }
}

/// The device thread's load after its last iteration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Load {
    /// Tokens of all images that wait for rows.
    pub waiting_tokens: u64,
    /// Tokens per second over the last steps; 0 before the first.
    pub tokens_per_second: f64,
    /// Images being generated.
    pub images: usize,
    /// Free rows of the batch.
    pub free_rows: usize,
    /// Hits and misses of the concept cache on the device, and its size in bytes.
    pub concept_hits: u64,
    pub concept_misses: u64,
    pub concept_bytes: usize,
    /// Seconds of device time for images and for trainings, if measured.
    pub generation_seconds: f64,
    pub training_seconds: f64,
}

impl From<TokenizerError> for EngineError {
    fn from(error: TokenizerError) -> Self {
        match error {
            TokenizerError::Invalid { field, problem } => Self::Invalid { field, problem },
            other @ TokenizerError::File { .. } => Self::Device(other.to_string()),
        }
    }
}
