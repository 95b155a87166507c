//! The pocket checkpoint: written in the layout of the real ones, and shipped inside the binary.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::parameters::{load, save};
use super::transformer_training::transformer_config;
use super::vocabulary::tokenizer_json;
use crate::model::ModelError;

/// Writes `config.json`, `model.safetensors`, `text_tokenizer.json`, `vqgan.yaml`, `vqgan.safetensors` and, beside the
/// model, `judge.safetensors` to `out` from the training results in `runs`. Weights are rounded to f16, which costs nothing measurable and halves the file.
///
/// # Errors
/// When a result is missing or a file cannot be written.
pub fn write_checkpoint(runs: &Path, out: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(out).map_err(|error| ModelError::file(out, error))?;
    let text = |name: &str, text: String| {
        let file = out.join(name);
        std::fs::write(&file, text).map_err(|error| ModelError::file(file, error))
    };
    let json = |value: &serde_json::Value| format!("{value}\n");
    let config =
        serde_json::to_value(transformer_config()).map_err(|error| ModelError::invalid("config", error.to_string()))?;
    text("config.json", json(&config))?;
    text("text_tokenizer.json", json(&tokenizer_json()))?;
    text("vqgan.yaml", super::tokenizer_training::tokenizer_config().to_yaml()?)?;
    for (from, to) in [
        ("transformer.safetensors", "model.safetensors"),
        ("vqgan.safetensors", "vqgan.safetensors"),
    ] {
        save(&out.join(to), &halved(load(&runs.join(from))?)?)?;
    }
    // The judge measures the model; it is shipped with it and is no part of it.
    let judge = load(&runs.join("judge.safetensors"))?;
    save(&out.join("judge.safetensors"), &halved(judge)?)
}

fn halved(tensors: std::collections::BTreeMap<String, Tensor>) -> Result<Vec<(String, Tensor)>, ModelError> {
    tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_to_kind(Kind::Half)?)))
        .collect()
}

macro_rules! shipped {
    ($($name:literal),+ $(,)?) => {
        /// The shipped checkpoint's files.
        const SHIPPED: &[(&str, &[u8])] = &[$(($name, include_bytes!(concat!("../../assets/pocket/", $name)))),+];
    };
}
shipped!(
    "config.json",
    "model.safetensors",
    "text_tokenizer.json",
    "vqgan.yaml",
    "vqgan.safetensors",
    "judge.safetensors",
);

/// Puts the shipped checkpoint below `cache` (once: its folder is named by its content) and returns the folder.
///
/// # Errors
/// When the files cannot be written.
pub fn unpack_shipped(cache: &Path) -> Result<PathBuf, ModelError> {
    let mut hash = Sha256::new();
    for (name, bytes) in SHIPPED {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    let dir = cache.join(format!("coar-pocket-{}", &hex::encode(hash.finalize())[..12]));
    for (name, bytes) in SHIPPED {
        let file = dir.join(name);
        let present = std::fs::metadata(&file).is_ok_and(|meta| meta.len() == bytes.len() as u64);
        if !present {
            write_whole(&dir, name, bytes).map_err(|error| ModelError::file(&file, error))?;
        }
    }
    Ok(dir)
}

/// Several processes may unpack at once: each writes a file of its own and renames it.
fn write_whole(dir: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let partial = dir.join(format!("{name}.{}.partial", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, dir.join(name))
}
