//! The engine's protocol: owned data only, never a tensor of libtorch.

mod cost;
mod handle;
mod sampling;
mod trace;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::concept::{ConceptFile, ConceptFileError, ConceptTensors};
use crate::image::RgbImage;
use crate::tokenizer::TokenizerError;
use crate::training::{StepLosses, TrainingSpec};

pub use cost::{ConceptTokens, Cost, Costed, TokenCounter, prompt_parts};
pub use handle::{Command, DeviceThread, EngineHandle, Gauge, GenerationStream, Ticket, TrainingStream};
pub use sampling::SamplingParams;
pub use trace::{GenerationClock, Prefill, Trace};

/// A concept as one request uses it: wherever `<name>` stands in the prompt.
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
    /// Who asks: tenants share the device by cost in tokens. Empty for the only one.
    pub tenant: String,
    /// The user's prompt with `<name>` placeholders as written.
    pub prompt: String,
    pub concepts: Vec<ConceptUse>,
    pub sampling: SamplingParams,
    pub count: u32,
    /// Which image of the seed the first one is: image i of a larger request, alone.
    pub first_index: u32,
    /// Unfinished images to show of each image, evenly spread over its rows.
    pub partial_images: u32,
}

/// What a generation tells while it runs.
#[derive(Debug)]
pub enum GenerationEvent {
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    /// Image `index` as far as it is drawn; what is missing is grey.
    Partial {
        index: u32,
        /// 0 for the first unfinished image of this index.
        number: u32,
        image: RgbImage,
    },
    /// Image `index` is complete.
    Image {
        index: u32,
        image: RgbImage,
    },
    /// The last event of a request that succeeded, with its cost in tokens.
    Done {
        text_tokens: u64,
        image_tokens: u64,
    },
    /// The last event of a request that failed.
    Failed(EngineError),
}

/// A training to run or to continue.
#[derive(Debug, Clone)]
pub struct TrainingRequest {
    pub spec: TrainingSpec,
    /// The reference images, as decoded.
    pub images: Vec<RgbImage>,
    /// The newest checkpoint, to continue from.
    pub checkpoint: Option<Bytes>,
    /// Steps after which the concept as it stands is handed out.
    pub previews: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingProgress {
    pub step: u32,
    pub total_steps: u32,
    pub losses: StepLosses,
    pub steps_per_second: f32,
}

/// What a training tells while it runs. Dropping the stream cancels the training.
#[derive(Debug)]
pub enum TrainingEvent {
    Progress(TrainingProgress),
    /// The concept as it stands after that step: a concept file (safetensors).
    Preview {
        step: u32,
        file: Bytes,
    },
    /// Everything that is needed to continue from here.
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

/// Why the engine refused or failed a request.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// A value of the request is outside the model's limits.
    #[error("`{field}` {problem}")]
    Invalid { field: &'static str, problem: String },
    /// The queue is full.
    #[error("the engine has {limit} requests waiting, its limit")]
    Overloaded {
        limit: usize,
        /// How long what waits will take, at the present speed.
        retry_after: std::time::Duration,
    },
    /// The engine is stopping or has stopped.
    #[error("the engine is stopping")]
    Stopped,
    /// The workers that drew it were lost, one after the other, and no other is there.
    #[error("the workers that drew it were lost")]
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
    /// Nothing has moved for this long, though there is work.
    Stuck(Duration),
    Stopped(String),
}

/// What the loaded base model is; fixed once the engine is ready.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModelInfo {
    /// The model's name in `/v1/models`.
    pub id: String,
    /// Fingerprint of the base model: concepts carry it and are refused on another.
    pub fingerprint: String,
    pub layers: usize,
    pub hidden: usize,
    /// Images of exactly these `(width, height)` can be drawn; the first is the default.
    pub sizes: Vec<(u32, u32)>,
    pub default_guidance_scale: f64,
    pub default_temperature: f64,
    pub default_top_k: u32,
    /// The preset whose training defaults fit this model.
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

/// What the device thread had to do after its last turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Load {
    /// Tokens of all images that wait for rows.
    pub waiting_tokens: u64,
    /// Tokens per second over the last steps; 0 before the first.
    pub tokens_per_second: f64,
    /// Images being drawn.
    pub images: usize,
    /// Rows of the batch that are free.
    pub free_rows: usize,
    /// Concepts that were found on the device, that were not, and the bytes that they take there.
    pub concept_hits: u64,
    pub concept_misses: u64,
    pub concept_bytes: usize,
    /// Seconds of the device's time for images and for trainings, where they are measured.
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
