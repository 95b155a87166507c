//! The flags of a base model, in a build with the feature `device`.

use coar_core::engine::ModelInfo;
use coar_engine::device::{EngineOptions, KvMemory};
use coar_engine::loading::{LoadError, ModelSource};
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::model::{LuminaMgpt, ModelError};

use crate::config::{EngineArgs, ModelArgs};

impl EngineArgs {
    /// The options that the flags set; the rest are defaults.
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            queue: self.queue,
            kv_bytes: self.kv_memory.bytes().map_or(KvMemory::Auto, KvMemory::Bytes),
            rows: self.rows,
            concept_bytes: self.concept_memory << 20,
            training_share: self.training_share,
            training_bytes: self.training_memory.bytes(),
            deterministic: self.deterministic.is_on(),
            speculation: self.speculate,
            ..EngineOptions::default()
        }
    }
}

impl ModelArgs {
    /// Which base model, and where it runs.
    pub fn source(&self) -> ModelSource {
        ModelSource {
            model: self.model.clone(),
            tokenizer: self.tokenizer.clone(),
            target_size: self.target_size,
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            tf32: self.tf32.is_on(),
            threads: self.threads,
            cache: self.cache.clone(),
        }
    }

    /// The checkpoint's files; unpacks the pocket model if no other is given.
    ///
    /// # Errors
    /// When a file is missing.
    pub fn files(&self) -> Result<CheckpointFiles, ModelError> {
        self.source().files()
    }

    /// Loads the model on this thread.
    ///
    /// # Errors
    /// When the device is absent, or a file or tensor is missing or misshapen.
    pub fn load(&self) -> Result<(LuminaMgpt, ModelInfo), LoadError> {
        self.source().load()
    }
}
