//! `coar inspect`

use std::path::PathBuf;

use clap::Args;
use tch::{Device, Kind};

use super::model::ModelArgs;
use crate::model::lumina::CheckpointFiles;
use crate::model::preprocessing::CropPlan;
use crate::model::tokenizer::{TextTokenizer, Vocabulary};
use crate::model::transformer::Transformer;
use crate::model::vqgan::{Vqgan, VqganConfig};
use crate::model::weights::{Checkpoint, Target, TensorSource, vqgan_source};
use crate::model::{ModelConfig, ModelError};

/// Tell what a checkpoint is, without loading it: parameters, dtype, layers, sizes, memory, what is missing.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Checkpoint folder. Default: the pocket model inside this binary.
    dir: Option<PathBuf>,
    /// Folder of the tokenizer files where they lie apart from the checkpoint.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Picture size that the checkpoint was trained for, where config.json does not say it.
    #[arg(long, value_name = "PIXELS")]
    target_size: Option<u32>,
    /// Where the pocket model's files are unpacked.
    #[arg(long, env = "COAR_CACHE", value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// Checks names and shapes of everything that a network asks for, and loads none of it.
struct ShapesOnly<'a>(&'a dyn TensorSource);

impl TensorSource for ShapesOnly<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<tch::Tensor, ModelError> {
        match self.0.shape_of(name) {
            Some(found) if found == shape => {
                Ok(tch::Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_expand(shape, false)?)
            }
            Some(found) => Err(ModelError::invalid(
                "checkpoint",
                format!("tensor `{name}` has shape {found:?}; expected {shape:?}"),
            )),
            None => Err(ModelError::invalid(
                "checkpoint",
                format!("tensor `{name}` is missing; expected shape {shape:?}"),
            )),
        }
    }
    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.0.shape_of(name)
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl InspectArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let _no_grad = tch::no_grad_guard();
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => {
                let args = ModelArgs {
                    tf32: crate::config::Switch::Off,
                    model: None,
                    tokenizer: None,
                    target_size: None,
                    device: "cpu".to_owned(),
                    dtype: "auto".to_owned(),
                    threads: 0,
                    cache: self.cache.clone(),
                };
                args.files()?.dir
            }
        };
        let mut missing = Vec::new();
        let config = ModelConfig::read(&dir.join("config.json"))?;
        let target = Target {
            kind: Kind::Float,
            device: Device::Cpu,
        };
        let checkpoint = Checkpoint::open_dir(&dir, target)?;
        let dtypes: std::collections::BTreeSet<String> = checkpoint
            .names()
            .filter_map(|name| checkpoint.dtype_of(name))
            .map(|dtype| format!("{dtype:?}"))
            .collect();
        let variant = if config.swin_norm { "swin norm" } else { "pre-norm" };
        println!("folder         {}", dir.display());
        println!(
            "transformer    {} layers, hidden {}, {} heads ({} key/value), {variant}",
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        );
        println!(
            "parameters     {} ({} on disk, {})",
            checkpoint.parameters(),
            megabytes(checkpoint.bytes()),
            dtypes.into_iter().collect::<Vec<_>>().join(", ")
        );
        println!("vocabulary     {} ids", config.vocab_size);
        println!("positions      {}", config.max_position_embeddings);
        for (kind, bytes) in [("f32", 4), ("bf16/f16", 2)] {
            println!(
                "memory, {kind:<8} {} for the weights",
                megabytes(checkpoint.parameters() * bytes)
            );
        }
        if let Err(error) = Transformer::load(&config, &ShapesOnly(&checkpoint)) {
            missing.push(error.to_string());
        }
        match CheckpointFiles::find(&dir, self.tokenizer.as_deref()) {
            Err(error) => missing.push(error.to_string()),
            Ok(files) => {
                if let Err(error) = self.tokenizers(&files, &config) {
                    missing.push(error.to_string());
                }
            }
        }
        println!("fingerprint    {}", checkpoint.fingerprint());
        if missing.is_empty() {
            println!("complete       yes");
            return Ok(());
        }
        for problem in &missing {
            println!("missing        {problem}");
        }
        anyhow::bail!("the checkpoint cannot be served: {} problems", missing.len())
    }

    fn tokenizers(&self, files: &CheckpointFiles, config: &ModelConfig) -> anyhow::Result<()> {
        let vqgan = VqganConfig::read(&files.vqgan_config)?;
        let source = vqgan_source(
            &files.vqgan_weights,
            Target {
                kind: Kind::Float,
                device: Device::Cpu,
            },
        )?;
        Vqgan::load(&vqgan, &ShapesOnly(source.as_ref()))?;
        let vocabulary = Vocabulary::from_names(&TextTokenizer::read(&files.tokenizer)?.names())?;
        println!(
            "image codes    {} ({} in the codebook), {} pixels along a side each",
            vocabulary.code_count(),
            vqgan.n_embed,
            vqgan.pixels_per_code()
        );
        let target = self.target_size.or(config.target_size);
        let sizes = CropPlan::new(target.unwrap_or(512), 2 * vqgan.pixels_per_code());
        let listed: Vec<String> = sizes.sizes().iter().map(|(w, h)| format!("{w}x{h}")).collect();
        let said = if target.is_some() {
            ""
        } else {
            " (assumed: config.json does not say; --target-size does)"
        };
        println!("target size    {}{said}", target.unwrap_or(512));
        println!("sizes          {}", listed.join(" "));
        let (w, h) = (
            target.unwrap_or(512) / vqgan.pixels_per_code(),
            target.unwrap_or(512) / vqgan.pixels_per_code(),
        );
        let tokens = u64::from((w + 1) * h + 4);
        let per_token = 2 * config.num_hidden_layers as u64 * (config.num_key_value_heads * config.head_dim()) as u64;
        println!(
            "cache          {} in f32 for one square picture of {tokens} tokens and its guidance",
            megabytes(2 * tokens * per_token * 4)
        );
        Ok(())
    }
}
