//! The pocket checkpoint: written in the layout of the real ones.

use std::path::Path;

use tch::{Kind, Tensor};

use super::parameters::{load, save};
use super::transformer_training::transformer_config;
use super::vocabulary::tokenizer_json;
use coar_engine::model::ModelError;

/// Writes `config.json`, `model.safetensors`, `text_tokenizer.json`, `vqgan.yaml`, `vqgan.safetensors` and, beside
/// the model, `judge.safetensors` to `out` from the training results in `runs`. Weights are rounded to f16, which
/// has no measurable effect and halves the file.
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
    // The judge measures the model; it is shipped with it but not part of it.
    let judge = load(&runs.join("judge.safetensors"))?;
    save(&out.join("judge.safetensors"), &halved(judge)?)
}

fn halved(tensors: std::collections::BTreeMap<String, Tensor>) -> Result<Vec<(String, Tensor)>, ModelError> {
    tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_to_kind(Kind::Half)?)))
        .collect()
}
