//! Choosing and loading the base model: shared by every command that draws or trains.

use std::path::{Path, PathBuf};

use clap::Args;
use tch::{Device, Kind};

use crate::engine::{EngineHandle, EngineOptions, ModelInfo};
use crate::model::lumina::CheckpointFiles;
use crate::model::{LuminaMgpt, ModelConfig, ModelError};
use crate::pocket::checkpoint::unpack_shipped;
use crate::training::Preset;

/// Which base model, and where it runs.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Checkpoint folder (config.json, safetensors, tokenizer files). Default: the pocket model inside this binary.
    #[arg(long, env = "COAR_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Folder of text_tokenizer.json, vqgan.yaml and vqgan.ckpt where they lie apart from the checkpoint.
    #[arg(long, env = "COAR_TOKENIZER", value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Picture size in pixels that the checkpoint was trained for (512, 768, 1024). Default: what config.json says, or 512.
    #[arg(long, env = "COAR_TARGET_SIZE", value_name = "PIXELS")]
    pub target_size: Option<u32>,
    /// `auto`, `cpu` or `cuda:N`.
    #[arg(long, env = "COAR_DEVICE", default_value = "auto")]
    pub device: String,
    /// `auto` (f32 on the CPU, bf16 elsewhere), `f32`, `bf16` or `f16`.
    #[arg(long, env = "COAR_DTYPE", default_value = "auto")]
    pub dtype: String,
    /// Threads for libtorch on the CPU; 0: as many as cores.
    #[arg(long, env = "COAR_THREADS", default_value_t = 0)]
    pub threads: i32,
    /// Where the pocket model's files are unpacked. Default: the user's cache folder.
    #[arg(long, env = "COAR_CACHE", value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// How the device is shared among requests and trainings.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Share of the device's time for trainings while pictures wait, 0 to 1. Without pictures they have all of it.
    #[arg(long, env = "COAR_TRAINING_SHARE", default_value_t = 0.5, value_parser = share)]
    pub training_share: f64,
    /// Memory in MiB for the graph of one training step, or `auto`: half of what is free when a training begins. A
    /// training that needs more recomputes layers in its backward pass, which takes about a third longer and gives the
    /// same concept.
    #[arg(long, env = "COAR_TRAINING_MEMORY", default_value = "auto", value_name = "MIB", value_parser = mebibytes)]
    pub training_memory: Memory,
    /// Memory for keys and values in MiB, taken once at the start: it bounds how many pictures are drawn at once.
    #[arg(long, env = "COAR_KV_MEMORY", default_value_t = 2048, value_name = "MIB")]
    pub kv_memory: u64,
    /// The most rows of the batch, whatever the memory admits; a picture with guidance takes two.
    #[arg(long, env = "COAR_ROWS", default_value_t = 64)]
    pub rows: usize,
    /// Requests that may wait for rows; more are refused with 429.
    #[arg(long, env = "COAR_QUEUE", default_value_t = 64)]
    pub queue: usize,
    /// Memory in MiB for concepts that stay on the device while nobody uses them.
    #[arg(long, env = "COAR_CONCEPT_MEMORY", default_value_t = 256, value_name = "MIB")]
    pub concept_memory: usize,
    /// Pictures do not depend on who shares their batch even where libtorch's kernels would (a GPU, or a CPU without
    /// AVX-512): every step has the shapes of the full batch, so choose --rows no larger than needed.
    #[arg(long, env = "COAR_DETERMINISTIC")]
    pub deterministic: bool,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

/// A number of bytes, or what the program finds best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    Auto,
    Bytes(u64),
}

fn mebibytes(text: &str) -> Result<Memory, String> {
    match text.parse::<u64>() {
        _ if text == "auto" => Ok(Memory::Auto),
        Ok(mebibytes) if mebibytes < 1 << 32 => Ok(Memory::Bytes(mebibytes << 20)),
        _ => Err("expected `auto` or a number of MiB".to_owned()),
    }
}

impl EngineArgs {
    /// What the flags say, the rest as always.
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            queue: self.queue,
            kv_bytes: self.kv_memory << 20,
            rows: self.rows,
            concept_bytes: self.concept_memory << 20,
            training_share: self.training_share,
            training_bytes: match self.training_memory {
                Memory::Auto => None,
                Memory::Bytes(bytes) => Some(bytes),
            },
            deterministic: self.deterministic,
            ..EngineOptions::default()
        }
    }
}

/// The user's cache folder for coar.
fn default_cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("coar")
}

/// The device that a `--device` names; `auto` takes the first CUDA device where libtorch has one.
///
/// # Errors
/// When the text is not a device, or the device is absent.
pub(in crate::cli) fn device(text: &str) -> anyhow::Result<Device> {
    crate::engine::load_cuda();
    let cuda = tch::Cuda::device_count();
    match text {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(if cuda > 0 { Device::Cuda(0) } else { Device::Cpu }),
        other => {
            let index: usize = other
                .strip_prefix("cuda:")
                .or((other == "cuda").then_some("0"))
                .and_then(|index| index.parse().ok())
                .ok_or_else(|| anyhow::anyhow!("--device is `{other}`; expected `auto`, `cpu` or `cuda:N`"))?;
            anyhow::ensure!(
                (index as i64) < cuda,
                "--device is `{other}`; this machine has {cuda} CUDA devices that libtorch can use"
            );
            Ok(Device::Cuda(index))
        }
    }
}

impl ModelArgs {
    /// The device that the flag names; `auto` takes the first CUDA device where libtorch has one.
    ///
    /// # Errors
    /// When the flag is not a device, or the device is absent.
    pub fn device(&self) -> anyhow::Result<Device> {
        device(&self.device)
    }

    /// The kind that the flag names, for `device`.
    ///
    /// # Errors
    /// When the flag is not a kind.
    pub fn kind(&self, device: Device) -> anyhow::Result<Kind> {
        Ok(match self.dtype.as_str() {
            "auto" if device == Device::Cpu => Kind::Float,
            "auto" | "bf16" => Kind::BFloat16,
            "f32" => Kind::Float,
            "f16" => Kind::Half,
            other => anyhow::bail!("--dtype is `{other}`; expected `auto`, `f32`, `bf16` or `f16`"),
        })
    }

    /// The checkpoint's files; unpacks the pocket model where no other is named.
    ///
    /// # Errors
    /// When a file is missing.
    pub fn files(&self) -> Result<CheckpointFiles, ModelError> {
        match &self.model {
            Some(dir) => CheckpointFiles::find(dir, self.tokenizer.as_deref()),
            None => CheckpointFiles::find(
                &unpack_shipped(&self.cache.clone().unwrap_or_else(default_cache))?,
                None,
            ),
        }
    }

    /// A name for `/v1/models`: the folder's.
    fn id(&self) -> String {
        let name = self.model.as_ref().and_then(|dir| dir.canonicalize().ok());
        let name = name
            .as_ref()
            .and_then(|dir| dir.file_name())
            .map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_else(|| "coar-pocket".to_owned())
    }

    /// Loads the model on this thread.
    ///
    /// # Errors
    /// When a file or tensor is missing or misshapen.
    pub fn load(&self) -> anyhow::Result<(LuminaMgpt, ModelInfo)> {
        let device = self.device()?;
        if self.threads > 0 {
            tch::set_num_threads(self.threads);
        }
        let files = self.files()?;
        let model = LuminaMgpt::load(&files, device, self.kind(device)?, self.target_size)?;
        let info = describe(&model, self.id());
        Ok((model, info))
    }

    /// Loads the model on a device thread of its own.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn start_engine(&self, mut options: EngineOptions) -> anyhow::Result<EngineHandle> {
        let (device, files, id) = (self.device()?, self.files()?, self.id());
        let (kind, target) = (self.kind(device)?, self.target_size);
        options.threads = self.threads;
        Ok(crate::engine::start(options, move || {
            let model = LuminaMgpt::load(&files, device, kind, target)?;
            let info = describe(&model, id);
            Ok((model, info))
        })?)
    }
}

/// What requests are checked against.
fn describe(model: &LuminaMgpt, id: String) -> ModelInfo {
    let config: &ModelConfig = model.transformer.config();
    let pocket = config.concept_preset.as_deref() == Some("pocket");
    ModelInfo {
        id,
        fingerprint: model.fingerprint().to_owned(),
        layers: config.num_hidden_layers,
        hidden: config.hidden_size as usize,
        sizes: model.sizes(),
        default_guidance_scale: if pocket { 2.0 } else { 4.0 },
        default_temperature: 1.0,
        default_top_k: model.default_top_k() as u32,
        preset: if pocket { Preset::Pocket } else { Preset::Paper },
    }
}
