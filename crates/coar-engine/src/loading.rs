//! Choosing and loading a base model.

use std::path::PathBuf;

use tch::{Device, Kind};

use coar_core::engine::{EngineHandle, ModelInfo};
use coar_core::training::Preset;

use crate::device::{EngineOptions, set_threads, start};
use crate::model::accelerator::{load_cuda, set_tf32, synchronize, use_own_stream};
use crate::model::cpu::multiplies_bf16;
use crate::model::lumina::CheckpointFiles;
use crate::model::{LuminaMgpt, ModelConfig, ModelError};
use crate::pocket::unpack;

/// Why a base model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A flag names a device or kind that is not available.
    #[error("{0}")]
    Flag(String),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Which base model to use and where to run it: the flags shared by several commands.
#[derive(Debug, Clone)]
pub struct ModelSource {
    /// Checkpoint folder; `None`: the shipped pocket model.
    pub model: Option<PathBuf>,
    /// Folder of the tokenizer files if they are not with the checkpoint.
    pub tokenizer: Option<PathBuf>,
    /// Image size in pixels that the checkpoint was trained for, if its config.json does not contain it.
    pub target_size: Option<u32>,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Allows a GPU to round f32 to TF32 in image encoding and decoding.
    pub tf32: bool,
    /// Threads for libtorch on the CPU; 0: one per core.
    pub threads: i32,
    /// Where the pocket model is unpacked; `None`: the user's cache folder.
    pub cache: Option<PathBuf>,
}

/// Parses `--device`; `auto` selects the first CUDA device if libtorch has one.
///
/// # Errors
/// When the text is not a device, or the device is absent.
pub fn device_named(text: &str) -> Result<Device, LoadError> {
    let loaded = load_cuda();
    let cuda = tch::Cuda::device_count();
    match text {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(if cuda > 0 { Device::Cuda(0) } else { Device::Cpu }),
        other => {
            let index: usize = other
                .strip_prefix("cuda:")
                .or((other == "cuda").then_some("0"))
                .and_then(|index| index.parse().ok())
                .ok_or_else(|| LoadError::Flag(format!("--device is `{other}`; expected `auto`, `cpu` or `cuda:N`")))?;
            if let Err(reason) = &loaded {
                return Err(LoadError::Flag(format!(
                    "--device is `{other}`; libtorch's CUDA part could not be opened: {reason}"
                )));
            }
            if index as i64 >= cuda {
                return Err(LoadError::Flag(format!(
                    "--device is `{other}`; this machine has {cuda} CUDA devices that libtorch can use (is the driver \
                     installed, and new enough for CUDA 13.0?)"
                )));
            }
            Ok(Device::Cuda(index))
        }
    }
}

impl ModelSource {
    /// The device of the flag; `auto` selects the first CUDA device if libtorch has one.
    ///
    /// # Errors
    /// When the flag is not a device, or the device is absent.
    pub fn device(&self) -> Result<Device, LoadError> {
        let device = device_named(&self.device)?;
        if device != Device::Cpu {
            set_tf32(self.tf32)?;
        }
        Ok(device)
    }

    /// The kind of the flag, for `device`. `auto` is bf16 on an accelerator, and on a CPU with bf16 instructions if
    /// the checkpoint's weights are bf16: it is lossless and faster there (docs/performance.md). Otherwise it is
    /// f32.
    ///
    /// # Errors
    /// When the flag is not a kind, or `auto` needs the checkpoint's configuration and cannot read it.
    pub fn kind(&self, device: Device, files: &CheckpointFiles) -> Result<Kind, LoadError> {
        Ok(match self.dtype.as_str() {
            "auto" if device != Device::Cpu => Kind::BFloat16,
            "auto" if multiplies_bf16() => match ModelConfig::read(&files.config)?.torch_dtype.as_deref() {
                Some("bfloat16") => Kind::BFloat16,
                _ => Kind::Float,
            },
            "auto" => Kind::Float,
            "bf16" => Kind::BFloat16,
            "f32" => Kind::Float,
            "f16" => Kind::Half,
            other => {
                return Err(LoadError::Flag(format!(
                    "--dtype is `{other}`; expected `auto`, `f32`, `bf16` or `f16`"
                )));
            }
        })
    }

    /// The checkpoint's files; unpacks the pocket model if no other is named.
    ///
    /// # Errors
    /// When a file is missing.
    pub fn files(&self) -> Result<CheckpointFiles, ModelError> {
        match &self.model {
            Some(dir) => CheckpointFiles::find(dir, self.tokenizer.as_deref()),
            None => CheckpointFiles::find(&unpack(self.cache.as_deref())?, None),
        }
    }

    /// The name for `/v1/models`: the folder's name.
    pub fn id(&self) -> String {
        let name = self.model.as_ref().and_then(|dir| dir.canonicalize().ok());
        let name = name
            .as_ref()
            .and_then(|dir| dir.file_name())
            .map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_else(|| "coar-pocket".to_owned())
    }

    /// The device, files and kind that the flags select.
    fn resolve(&self) -> Result<(Device, CheckpointFiles, Kind), LoadError> {
        let (device, files) = (self.device()?, self.files()?);
        let kind = self.kind(device, &files)?;
        Ok((device, files, kind))
    }

    /// Loads the model on this thread.
    ///
    /// # Errors
    /// When a file or tensor is missing or misshapen.
    pub fn load(&self) -> Result<(LuminaMgpt, ModelInfo), LoadError> {
        let (device, files, kind) = self.resolve()?;
        set_threads(self.threads);
        let model = LuminaMgpt::load(&files, device, kind, self.target_size)?;
        // CUDA graphs cannot be captured on the default stream.
        synchronize(device)?;
        use_own_stream(device)?;
        let info = describe(&model, self.id());
        Ok((model, info))
    }

    /// Loads the model on a new device thread.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn start_engine(&self, mut options: EngineOptions) -> Result<EngineHandle, LoadError> {
        let (device, files, kind) = self.resolve()?;
        let (id, target) = (self.id(), self.target_size);
        options.threads = self.threads;
        Ok(start(options, move || {
            let model = LuminaMgpt::load(&files, device, kind, target)?;
            let info = describe(&model, id);
            Ok((model, info))
        })?)
    }
}

/// The model properties that requests are validated against.
pub fn describe(model: &LuminaMgpt, id: String) -> ModelInfo {
    let config: &ModelConfig = model.transformer.config();
    let preset = match config.concept_preset.as_deref() {
        Some("pocket") => Preset::Pocket,
        Some("designers") => Preset::Designers,
        _ => Preset::Paper,
    };
    // The defaults are constants because no checkpoint contains them: the reference passes its own as arguments of its
    // inference code, and config.json of the two small models has only the preset's name. With a field for each,
    // existing checkpoints would still need these values.
    let (guidance, temperature) = match preset {
        Preset::Pocket => (2.0, 1.0),
        // Without guidance and slightly below the training temperature: the best quality in the designers' world, at
        // half the cost.
        Preset::Designers => (1.0, 0.7),
        Preset::Paper => (4.0, 1.0),
    };
    ModelInfo {
        id,
        fingerprint: model.fingerprint().to_owned(),
        layers: config.num_hidden_layers,
        hidden: config.hidden_size as usize,
        sizes: model.sizes(),
        default_guidance_scale: guidance,
        default_temperature: temperature,
        default_top_k: model.default_top_k() as u32,
        preset,
    }
}
