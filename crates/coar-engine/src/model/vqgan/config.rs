//! Serde mirror of `vqgan.yaml`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::ModelError;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct VqganFile {
    model: VqganModel,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct VqganModel {
    params: VqganConfig,
}

/// `model.params` of the file; the training-only keys (`lossconfig`, `ckpt_path`) are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VqganConfig {
    pub embed_dim: i64,
    pub n_embed: i64,
    pub ddconfig: EncoderDecoderConfig,
}

/// `ddconfig`: the shape shared by encoder and decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncoderDecoderConfig {
    pub z_channels: i64,
    /// The base size of `attn_resolutions`, independent of the actual image's size.
    pub resolution: i64,
    pub in_channels: i64,
    pub out_ch: i64,
    pub ch: i64,
    pub ch_mult: Vec<i64>,
    pub num_res_blocks: i64,
    #[serde(default)]
    pub attn_resolutions: Vec<i64>,
    #[serde(default)]
    pub double_z: bool,
    /// Space-to-depth before the encoder and depth-to-space after the decoder; 1 in every published checkpoint.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub patch_size: i64,
}

fn one() -> i64 {
    1
}

fn is_one(value: &i64) -> bool {
    *value == 1
}

/// `vq_config` of a checkpoint in transformers' form, with the defaults of its class (`ChameleonVQVAEConfig`).
#[derive(Debug, Deserialize)]
#[serde(default)]
struct TransformersConfig {
    embed_dim: i64,
    num_embeddings: i64,
    double_latent: bool,
    latent_channels: i64,
    resolution: i64,
    in_channels: i64,
    base_channels: i64,
    channel_multiplier: Vec<i64>,
    num_res_blocks: i64,
    attn_resolutions: Option<Vec<i64>>,
}

impl Default for TransformersConfig {
    fn default() -> Self {
        Self {
            embed_dim: 256,
            num_embeddings: 8192,
            double_latent: false,
            latent_channels: 256,
            resolution: 512,
            in_channels: 3,
            base_channels: 128,
            channel_multiplier: vec![1, 1, 2, 2, 4],
            num_res_blocks: 2,
            attn_resolutions: None,
        }
    }
}

impl VqganConfig {
    /// From `vq_config` in the checkpoint's `config.json`, which is `file`.
    ///
    /// # Errors
    /// When it has another form or describes a network that cannot be built.
    pub fn of_transformers(file: &Path, vq_config: serde_json::Value) -> Result<Self, ModelError> {
        let given: TransformersConfig = match vq_config {
            serde_json::Value::Null => TransformersConfig::default(),
            fields => serde_json::from_value(fields).map_err(|error| {
                ModelError::file(file, format!("`vq_config` is not a VQGAN configuration: {error}"))
            })?,
        };
        let config = Self {
            embed_dim: given.embed_dim,
            n_embed: given.num_embeddings,
            ddconfig: EncoderDecoderConfig {
                z_channels: given.latent_channels,
                resolution: given.resolution,
                in_channels: given.in_channels,
                out_ch: given.in_channels,
                ch: given.base_channels,
                ch_mult: given.channel_multiplier,
                num_res_blocks: given.num_res_blocks,
                attn_resolutions: given.attn_resolutions.unwrap_or_default(),
                double_z: given.double_latent,
                patch_size: 1,
            },
        };
        config.check(file)?;
        Ok(config)
    }

    /// Reads and validates `vqgan.yaml`.
    ///
    /// # Errors
    /// When the file is unreadable or describes a network that cannot be built.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(file).map_err(|error| ModelError::file(file, error))?;
        let parsed: VqganFile = serde_norway::from_str(&text)
            .map_err(|error| ModelError::file(file, format!("not a VQGAN configuration: {error}")))?;
        let config = parsed.model.params;
        config.check(file)?;
        Ok(config)
    }

    /// Serialises this configuration.
    ///
    /// # Errors
    /// When it cannot be written as YAML.
    pub fn to_yaml(&self) -> Result<String, ModelError> {
        serde_norway::to_string(&VqganFile {
            model: VqganModel { params: self.clone() },
        })
        .map_err(|error| ModelError::invalid("vqgan.yaml", error.to_string()))
    }

    /// Pixels per code and side.
    pub fn pixels_per_code(&self) -> u32 {
        (self.ddconfig.patch_size << (self.ddconfig.ch_mult.len() - 1)) as u32
    }

    fn check(&self, file: &Path) -> Result<(), ModelError> {
        let d = &self.ddconfig;
        let fault = |field: &str, problem: String| {
            Err(ModelError::Config {
                file: file.to_owned(),
                field: field.to_owned(),
                problem,
            })
        };
        for (field, value) in [
            ("embed_dim", self.embed_dim),
            ("n_embed", self.n_embed),
            ("ddconfig.z_channels", d.z_channels),
            ("ddconfig.resolution", d.resolution),
            ("ddconfig.in_channels", d.in_channels),
            ("ddconfig.out_ch", d.out_ch),
            ("ddconfig.ch", d.ch),
            ("ddconfig.num_res_blocks", d.num_res_blocks),
            ("ddconfig.patch_size", d.patch_size),
        ] {
            if !(1..=1 << 20).contains(&value) {
                return fault(field, format!("is {value}; expected 1 to {}", 1 << 20));
            }
        }
        if d.ch_mult.is_empty() || d.ch_mult.len() > 8 || d.ch_mult.iter().any(|&m| !(1..=64).contains(&m)) {
            return fault(
                "ddconfig.ch_mult",
                format!("is {:?}; expected 1 to 8 multiples of 1 to 64", d.ch_mult),
            );
        }
        if d.ch % 32 != 0 {
            return fault("ddconfig.ch", format!("is {}; group norm needs a multiple of 32", d.ch));
        }
        let colours = 3 * d.patch_size * d.patch_size;
        if d.in_channels != colours || d.out_ch != colours {
            return fault(
                "ddconfig.in_channels",
                format!("is {} (out_ch {}); RGB images need {colours}", d.in_channels, d.out_ch),
            );
        }
        Ok(())
    }
}
