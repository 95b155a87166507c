//! Serde mirror of a checkpoint's `config.json` (class `ChameleonXLLMXForConditionalGeneration`).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ModelError;

/// The fields of `config.json` that affect the computation. Fields that only matter to training or to Python are
/// ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub model_type: String,
    #[serde(default)]
    pub architectures: Vec<String>,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub num_key_value_heads: i64,
    #[serde(default = "default_max_positions")]
    pub max_position_embeddings: i64,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Norms after attention and MLP instead of before (the 34B).
    #[serde(default)]
    pub swin_norm: bool,
    /// Whether image codes are masked out of the logits. The class default is true; Lumina's checkpoints set it to
    /// false.
    #[serde(default = "default_true")]
    pub mask_image_logits: bool,
    /// Rows of the q/k norm parameters on disk; each serves `heads / rows` consecutive heads.
    #[serde(default = "default_one")]
    pub model_parallel_size: i64,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub rope_scaling: Option<serde_json::Value>,
    #[serde(default = "default_act")]
    pub hidden_act: String,
    #[serde(default)]
    pub torch_dtype: Option<String>,
    #[serde(default)]
    pub vocabulary_map: BTreeMap<String, i64>,
    /// The image size in pixels that the checkpoint was trained for (512, 768, 1024). Not a field of the reference's
    /// file, in which only the repository's name states it; written by `coar-lab pocket train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_size: Option<u32>,
    /// The preset of concept training for the checkpoint ("pocket", "designers"); not a field of the reference's
    /// file either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concept_preset: Option<String>,
    /// The image tokenizer of a checkpoint that contains it, as transformers describes it.
    #[serde(default, skip_serializing)]
    pub vq_config: serde_json::Value,
    /// Every word of the captions that the checkpoint was trained on, if they are few; not a field of the
    /// reference's file either.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caption_words: Vec<String>,
}

fn default_max_positions() -> i64 {
    4096
}
fn default_eps() -> f64 {
    1e-5
}
fn default_theta() -> f64 {
    10_000.0
}
fn default_true() -> bool {
    true
}
fn default_one() -> i64 {
    1
}
fn default_act() -> String {
    "silu".to_owned()
}

/// Fields of transformers 5 under their older names.
fn rename_fields(fields: &mut serde_json::Map<String, serde_json::Value>, file: &Path) -> Result<(), ModelError> {
    let fault = |field: &str, problem: String| {
        Err(ModelError::Config {
            file: file.to_owned(),
            field: field.to_owned(),
            problem,
        })
    };
    if let Some(dtype) = fields.remove("dtype") {
        fields.entry("torch_dtype").or_insert(dtype);
    }
    if let Some(quantization) = fields.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantization["quant_method"].as_str().unwrap_or("unknown");
        return fault(
            "quantization_config",
            format!("is set (method {method}); quantised checkpoints cannot be run, use the original weights"),
        );
    }
    let Some(rope) = fields.remove("rope_parameters").filter(|value| !value.is_null()) else {
        return Ok(());
    };
    match rope["rope_type"].as_str().or(rope["type"].as_str()) {
        None | Some("default") => {}
        Some(other) => {
            let problem = format!("is `{other}`; only `default` is implemented");
            return fault("rope_parameters.rope_type", problem);
        }
    }
    let Some(theta) = rope.get("rope_theta").filter(|theta| !theta.is_null()) else {
        return Ok(());
    };
    match fields.get("rope_theta") {
        Some(other) if other.as_f64() != theta.as_f64() => fault(
            "rope_parameters.rope_theta",
            format!("is {theta}, and `rope_theta` is {other}; remove one of them"),
        ),
        _ => {
            fields.insert("rope_theta".to_owned(), theta.clone());
            Ok(())
        }
    }
}

impl ModelConfig {
    /// Reads and validates `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable, is not a Chameleon configuration, or requires something that is not implemented.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(file).map_err(|error| ModelError::file(file, error))?;
        let fault = |error| ModelError::file(file, format!("not a model configuration: {error}"));
        let mut fields: serde_json::Value = serde_json::from_str(&text).map_err(fault)?;
        if let Some(fields) = fields.as_object_mut() {
            rename_fields(fields, file)?;
        }
        let config: Self = serde_json::from_value(fields).map_err(fault)?;
        config.check(file)?;
        Ok(config)
    }

    /// Head dimension.
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    fn check(&self, file: &Path) -> Result<(), ModelError> {
        let fault = |field: &str, problem: String| {
            Err(ModelError::Config {
                file: file.to_owned(),
                field: field.to_owned(),
                problem,
            })
        };
        if self.model_type != "chameleon" {
            return fault(
                "model_type",
                format!("is `{}`; only `chameleon` checkpoints can be run", self.model_type),
            );
        }
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers as i64),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("model_parallel_size", self.model_parallel_size),
        ] {
            if !(1..=1 << 24).contains(&value) {
                return fault(field, format!("is {value}; expected 1 to {}", 1 << 24));
            }
        }
        if self.hidden_size % self.num_attention_heads != 0 || self.head_dim() % 2 != 0 {
            return fault(
                "hidden_size",
                format!(
                    "is {}; expected an even multiple of {} heads",
                    self.hidden_size, self.num_attention_heads
                ),
            );
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return fault(
                "num_key_value_heads",
                format!(
                    "is {}; expected a divisor of {} heads",
                    self.num_key_value_heads, self.num_attention_heads
                ),
            );
        }
        for (field, set) in [
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("tie_word_embeddings", self.tie_word_embeddings),
            ("rope_scaling", self.rope_scaling.is_some()),
        ] {
            if set {
                return fault(
                    field,
                    "is set; no Chameleon checkpoint uses it and it is not implemented".to_owned(),
                );
            }
        }
        if self.hidden_act != "silu" {
            return fault(
                "hidden_act",
                format!("is `{}`; only `silu` is implemented", self.hidden_act),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(more: Value) -> Result<ModelConfig, String> {
        let mut fields = json!({
            "model_type": "chameleon", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        });
        for (name, value) in more.as_object().unwrap() {
            fields[name] = value.clone();
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), fields.to_string()).unwrap();
        ModelConfig::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn fields_of_transformers_5_are_read() {
        let old = read(json!({"rope_theta": 500_000.0, "torch_dtype": "bfloat16"})).unwrap();
        let rope = json!({"rope_theta": 500_000.0, "rope_type": "default"});
        assert_eq!(
            read(json!({"rope_parameters": rope, "dtype": "bfloat16"})).unwrap(),
            old
        );
        assert_eq!(
            (old.rope_theta, old.torch_dtype.as_deref()),
            (500_000.0, Some("bfloat16"))
        );
        let both =
            json!({"rope_theta": 500_000, "rope_parameters": rope, "torch_dtype": "bfloat16", "dtype": "float32"});
        assert_eq!(read(both).unwrap(), old);
        let nulls = json!({"rope_parameters": null, "quantization_config": null, "rope_scaling": null});
        assert_eq!(read(nulls).unwrap().rope_theta, 10_000.0);
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (more, field) in [
            (
                json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
                "`rope_parameters.rope_type` is `yarn`",
            ),
            (
                json!({"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 500_000.0}}),
                "`rope_parameters.rope_theta`",
            ),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "`quantization_config` is set (method gptq)",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
                "`rope_scaling`",
            ),
            (json!({"model_type": "llama"}), "`model_type` is `llama`"),
        ] {
            let error = read(more).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
