//! Describes a checkpoint without loading it.

use std::path::Path;

use tch::{Device, Kind};

use coar_core::tokenizer::{TextTokenizer, Vocabulary};

use crate::model::files::{CheckpointFiles, check_download, snapshot};
use crate::model::preprocessing::CropPlan;
use crate::model::transformer::Transformer;
use crate::model::vqgan::Vqgan;
use crate::model::weights::{Checkpoint, Target, TensorSource};
use crate::model::{ModelConfig, ModelError};

/// A checkpoint's description.
#[derive(Debug, Default)]
pub struct Inspection {
    /// One line per fact: a label of 15 characters and its value.
    pub lines: Vec<String>,
    /// Missing or misshapen tensors; empty if the checkpoint can be served.
    pub missing: Vec<String>,
}

/// Checks names and shapes of everything that a network requires, without loading it.
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

/// Describes the checkpoint in `dir`. Names and shapes of all tensors are checked, none is loaded.
///
/// # Errors
/// When config.json or the weights cannot be read at all.
pub fn inspect(dir: &Path, tokenizer: Option<&Path>, target_size: Option<u32>) -> Result<Inspection, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let mut found = Inspection::default();
    let dir = snapshot(dir)?;
    let config = dir.join("config.json");
    check_download(&config)?;
    let config = ModelConfig::read(&config)?;
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
    found.lines.push(format!("folder         {}", dir.display()));
    found.lines.push(format!(
        "transformer    {} layers, hidden {}, {} heads ({} key/value), {variant}",
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    ));
    found.lines.push(format!(
        "parameters     {} ({} on disk, {})",
        checkpoint.parameters(),
        megabytes(checkpoint.bytes()),
        dtypes.into_iter().collect::<Vec<_>>().join(", ")
    ));
    found.lines.push(format!("vocabulary     {} ids", config.vocab_size));
    found
        .lines
        .push(format!("positions      {}", config.max_position_embeddings));
    for (kind, bytes) in [("f32", 4), ("bf16/f16", 2)] {
        found.lines.push(format!(
            "memory, {kind:<8} {} for the weights",
            megabytes(checkpoint.parameters() * bytes)
        ));
    }
    if let Err(error) = Transformer::load(&config, &ShapesOnly(&checkpoint)) {
        found.missing.push(error.to_string());
    }
    match CheckpointFiles::find(&dir, tokenizer) {
        Err(error) => found.missing.push(error.to_string()),
        Ok(files) => {
            if let Err(error) = tokenizers(&files, &config, target_size, &mut found.lines) {
                found.missing.push(error.to_string());
            }
        }
    }
    found.lines.push(format!("fingerprint    {}", checkpoint.fingerprint()));

    Ok(found)
}

fn tokenizers(
    files: &CheckpointFiles,
    config: &ModelConfig,
    target_size: Option<u32>,
    lines: &mut Vec<String>,
) -> Result<(), ModelError> {
    let vqgan = files.image_tokenizer.config()?;
    let source = files.image_tokenizer.weights(Target {
        kind: Kind::Float,
        device: Device::Cpu,
    })?;
    Vqgan::load(&vqgan, &ShapesOnly(source.as_ref()))?;
    let vocabulary = Vocabulary::from_names(&TextTokenizer::read(&files.tokenizer)?.names())?;
    lines.push(format!(
        "image codes    {} ({} in the codebook), {} pixels along a side each",
        vocabulary.code_count(),
        vqgan.n_embed,
        vqgan.pixels_per_code()
    ));
    let target = target_size.or(config.target_size);
    let sizes = CropPlan::new(target.unwrap_or(512), 2 * vqgan.pixels_per_code());
    let listed: Vec<String> = sizes.sizes().iter().map(|(w, h)| format!("{w}x{h}")).collect();
    let note = if target.is_some() {
        ""
    } else {
        " (assumed: config.json does not say; --target-size does)"
    };
    lines.push(format!("target size    {}{note}", target.unwrap_or(512)));
    lines.push(format!("sizes          {}", listed.join(" ")));
    let (w, h) = (
        target.unwrap_or(512) / vqgan.pixels_per_code(),
        target.unwrap_or(512) / vqgan.pixels_per_code(),
    );
    let tokens = u64::from((w + 1) * h + 4);
    let per_token = 2 * config.num_hidden_layers as u64 * (config.num_key_value_heads * config.head_dim()) as u64;
    lines.push(format!(
        "cache          {} in f32 for one square image of {tokens} tokens and its guidance",
        megabytes(2 * tokens * per_token * 4)
    ));
    Ok(())
}
