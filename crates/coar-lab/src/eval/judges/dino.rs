//! DINO (arXiv 2104.14294): a vision transformer whose class token is the image's embedding. Follows `ViTModel` of
//! `transformers` without its pooler.

use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

use super::config::DinoConfig;
use super::encoder::{Encoder, Linear, Names, Norm, patches, to_rows};
use super::preprocessor::{Family, Preprocessing, Steps};
use super::weights;
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;

const NAMES: Names = Names {
    projections: [
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ],
    output: "attention.output.dense",
    widen: "intermediate.dense",
    narrow: "output.dense",
    before_attention: "layernorm_before",
    before_mlp: "layernorm_after",
};

/// Number of images per batch of a tower.
pub(super) const BATCH: usize = 16;

/// DINO of a folder such as `facebook/dino-vits16`, in f32.
#[derive(Debug)]
pub struct Dino {
    config: DinoConfig,
    steps: Steps,
    device: Device,
    weights: PathBuf,
    projection: Linear,
    /// `[1, 1, hidden]`
    class_token: Tensor,
    /// `[1, 1 + patches, hidden]`
    positions: Tensor,
    encoder: Encoder,
    norm: Norm,
}

impl Dino {
    /// As [`Self::open_with`], with the folder's own preprocessing.
    ///
    /// # Errors
    /// As [`Self::open_with`].
    pub fn open(dir: &Path, device: Device) -> Result<Self, ModelError> {
        Self::open_with(dir, device, Preprocessing::Folder)
    }

    /// Reads `config.json`, `preprocessor_config.json` (for [`Preprocessing::Folder`]) and `model.safetensors` or
    /// `pytorch_model.bin`.
    ///
    /// # Errors
    /// When a file is missing, unreadable or truncated, a field is outside its limits, or a tensor is missing or
    /// misshapen.
    pub fn open_with(dir: &Path, device: Device, preprocessing: Preprocessing) -> Result<Self, ModelError> {
        let config = DinoConfig::read(&dir.join("config.json"))?;
        let steps = Steps::of(dir, preprocessing, Family::Vit, config.patches.side)?;
        let (weights, source) = weights::open(dir, device)?;
        let source = &*source;
        // Under a head the network has a prefix.
        let prefix = match source.shape_of("vit.embeddings.cls_token") {
            Some(_) => "vit.",
            None => "",
        };
        let name = |own: &str| format!("{prefix}{own}");
        let hidden = config.encoder.hidden;
        Ok(Self {
            projection: Linear::load_patches(
                source,
                &name("embeddings.patch_embeddings.projection"),
                (hidden, config.patches.patch),
                true,
            )?,
            class_token: source.tensor(&name("embeddings.cls_token"), &[1, 1, hidden])?,
            positions: source.tensor(
                &name("embeddings.position_embeddings"),
                &[1, 1 + config.patches.patches(), hidden],
            )?,
            encoder: Encoder::load(source, &name("encoder.layer"), &NAMES, &config.encoder)?,
            norm: Norm::load(source, &name("layernorm"), &config.encoder)?,
            config,
            steps,
            device,
            weights,
        })
    }

    /// The network's input for images, `[batch, 3, side, side]` in f32 on the CPU.
    ///
    /// # Errors
    /// When an image has no pixels.
    pub fn pixels(&self, pictures: &[RgbImage]) -> Result<Tensor, ModelError> {
        self.steps.pixels(pictures)
    }

    /// For each image the class token after the last norm, `hidden_size` numbers.
    ///
    /// # Errors
    /// When an image has no pixels, the device fails, or a number is not finite.
    pub fn embed(&self, pictures: &[RgbImage]) -> Result<Vec<Vec<f32>>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut rows = Vec::with_capacity(pictures.len());
        for some in pictures.chunks(BATCH) {
            rows.extend(to_rows(&self.forward(&self.pixels(some)?.f_to_device(self.device)?)?)?);
        }
        Ok(rows)
    }

    /// `[batch, 3, side, side]` to `[batch, hidden]`.
    fn forward(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, hidden) = (pixels.size4()?.0, self.config.encoder.hidden);
        let tokens = self.projection.forward(&patches(pixels, self.config.patches.patch)?)?;
        let class = self.class_token.f_expand([batch, 1, hidden], false)?;
        let x = Tensor::f_cat(&[class, tokens], 1)?.f_add(&self.positions)?;
        self.norm.forward(&self.encoder.forward(x, false)?.f_select(1, 0)?)
    }

    /// SHA-256 of the weights' file, in hex.
    ///
    /// # Errors
    /// When it can no longer be read.
    pub fn digest(&self) -> Result<String, ModelError> {
        weights::digest(&self.weights)
    }
}
