//! CLIP (arXiv 2103.00020): an image tower and a text tower with a shared embedding space. Follows `CLIPModel` of
//! `transformers`: `get_image_features` and `get_text_features`.

use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

use super::config::ClipConfig;
use super::dino::BATCH;
use super::encoder::{Encoder, Linear, Names, Norm, patches, to_rows};
use super::preprocessor::{Family, Preprocessing, Steps};
use super::tokenizer::ClipTokenizer;
use super::weights;
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::model::weights::TensorSource;

const NAMES: Names = Names {
    projections: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    output: "self_attn.out_proj",
    widen: "mlp.fc1",
    narrow: "mlp.fc2",
    before_attention: "layer_norm1",
    before_mlp: "layer_norm2",
};

/// `vision_model`
#[derive(Debug)]
struct PictureTower {
    projection: Linear,
    /// `[hidden]`
    class_token: Tensor,
    /// `[1 + patches, hidden]`
    positions: Tensor,
    before: Norm,
    encoder: Encoder,
    after: Norm,
    /// To the shared space.
    out: Linear,
}

/// `text_model`
#[derive(Debug)]
struct TextTower {
    /// `[vocabulary, hidden]`
    words: Tensor,
    /// `[positions, hidden]`
    positions: Tensor,
    encoder: Encoder,
    norm: Norm,
    out: Linear,
}

/// CLIP of a folder such as `openai/clip-vit-base-patch32`, in f32.
#[derive(Debug)]
pub struct Clip {
    config: ClipConfig,
    steps: Steps,
    tokenizer: ClipTokenizer,
    device: Device,
    weights: PathBuf,
    pictures: PictureTower,
    texts: TextTower,
}

impl PictureTower {
    fn load(source: &dyn TensorSource, config: &ClipConfig) -> Result<Self, ModelError> {
        let (tower, hidden) = (&config.vision, config.vision.hidden);
        let name = "vision_model.embeddings";
        Ok(Self {
            projection: Linear::load_patches(
                source,
                &format!("{name}.patch_embedding"),
                (hidden, config.patches.patch),
                false,
            )?,
            class_token: source.tensor(&format!("{name}.class_embedding"), &[hidden])?,
            positions: source.tensor(
                &format!("{name}.position_embedding.weight"),
                &[1 + config.patches.patches(), hidden],
            )?,
            // This spelling is in every published file.
            before: Norm::load(source, "vision_model.pre_layrnorm", tower)?,
            encoder: Encoder::load(source, "vision_model.encoder.layers", &NAMES, tower)?,
            after: Norm::load(source, "vision_model.post_layernorm", tower)?,
            out: Linear::load(source, "visual_projection", [config.projection, hidden], false)?,
        })
    }

    /// `[batch, 3, side, side]` to `[batch, projection]`.
    fn forward(&self, pixels: &Tensor, patch: i64) -> Result<Tensor, ModelError> {
        let (batch, hidden) = (pixels.size4()?.0, self.class_token.size1()?);
        let tokens = self.projection.forward(&patches(pixels, patch)?)?;
        let class = self.class_token.f_expand([batch, 1, hidden], false)?;
        let x = Tensor::f_cat(&[class, tokens], 1)?.f_add(&self.positions)?;
        let x = self.encoder.forward(self.before.forward(&x)?, false)?;
        self.out.forward(&self.after.forward(&x.f_select(1, 0)?)?)
    }
}

impl TextTower {
    fn load(source: &dyn TensorSource, config: &ClipConfig) -> Result<Self, ModelError> {
        let (tower, hidden) = (&config.text, config.text.hidden);
        let name = "text_model.embeddings";
        Ok(Self {
            words: source.tensor(&format!("{name}.token_embedding.weight"), &[config.vocabulary, hidden])?,
            positions: source.tensor(
                &format!("{name}.position_embedding.weight"),
                &[config.positions, hidden],
            )?,
            encoder: Encoder::load(source, "text_model.encoder.layers", &NAMES, tower)?,
            norm: Norm::load(source, "text_model.final_layer_norm", tower)?,
            out: Linear::load(source, "text_projection", [config.projection, hidden], false)?,
        })
    }

    /// Ids `[batch, tokens]` and the position of each text's end `[batch]` to `[batch, projection]`.
    fn forward(&self, ids: &Tensor, ends: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, tokens) = ids.size2()?;
        let words = Tensor::f_embedding(&self.words, ids, -1, false, false)?;
        let x = words.f_add(&self.positions.f_narrow(0, 0, tokens)?)?;
        let x = self.encoder.forward(x, true)?;
        let hidden = x.size()[2];
        let place = ends.f_view([batch, 1, 1])?.f_expand([batch, 1, hidden], false)?;
        let x = x.f_gather(1, &place, false)?.f_squeeze_dim(1)?;
        self.out.forward(&self.norm.forward(&x)?)
    }
}

impl Clip {
    /// Reads `config.json`, `preprocessor_config.json`, `tokenizer.json` or `vocab.json` with `merges.txt`, and
    /// `model.safetensors` or `pytorch_model.bin`.
    ///
    /// # Errors
    /// When a file is missing, unreadable or truncated, a field is outside its limits, the tokenizer does not fit
    /// the network, or a tensor is missing or misshapen.
    pub fn open(dir: &Path, device: Device) -> Result<Self, ModelError> {
        let config = ClipConfig::read(&dir.join("config.json"))?;
        let steps = Steps::of(dir, Preprocessing::Folder, Family::Clip, config.patches.side)?;
        let tokenizer = ClipTokenizer::read(dir, config.vocabulary, config.positions, config.end)?;
        let (weights, source) = weights::open(dir, device)?;
        Ok(Self {
            pictures: PictureTower::load(&*source, &config)?,
            texts: TextTower::load(&*source, &config)?,
            config,
            steps,
            tokenizer,
            device,
            weights,
        })
    }

    /// The image tower's input, `[batch, 3, side, side]` in f32 on the CPU.
    ///
    /// # Errors
    /// When an image has no pixels.
    pub fn pixels(&self, pictures: &[RgbImage]) -> Result<Tensor, ModelError> {
        self.steps.pixels(pictures)
    }

    /// The ids of each text, from begin token to end token, at most `max_position_embeddings` (77): longer texts are
    /// truncated before the end token.
    ///
    /// # Errors
    /// When the tokenizer's own patterns fail on a text.
    pub fn ids(&self, texts: &[&str]) -> Result<Vec<Vec<i64>>, ModelError> {
        texts.iter().map(|text| self.tokenizer.ids(text)).collect()
    }

    /// For each image its projected embedding, `projection_dim` numbers, not normalised.
    ///
    /// # Errors
    /// When an image has no pixels, the device fails, or a number is not finite.
    pub fn embed_pictures(&self, pictures: &[RgbImage]) -> Result<Vec<Vec<f32>>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut rows = Vec::with_capacity(pictures.len());
        for some in pictures.chunks(BATCH) {
            let pixels = self.pixels(some)?.f_to_device(self.device)?;
            rows.extend(to_rows(&self.pictures.forward(&pixels, self.config.patches.patch)?)?);
        }
        Ok(rows)
    }

    /// For each text its projected embedding, `projection_dim` numbers, not normalised.
    ///
    /// # Errors
    /// When a text cannot be tokenised, the device fails, or a number is not finite.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut rows = Vec::with_capacity(texts.len());
        for some in texts.chunks(BATCH) {
            let ids = self.ids(some)?;
            let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
            let ends: Vec<i64> = ids.iter().map(|ids| self.place_of_end(ids) as i64).collect();
            // Attention is causal, so tokens after the end have no effect.
            let padded: Vec<i64> = ids
                .iter()
                .flat_map(|ids| (0..longest).map(|at| ids.get(at).copied().unwrap_or(self.tokenizer.end)))
                .collect();
            let padded = Tensor::f_from_slice(&padded)?
                .f_view([ids.len() as i64, longest as i64])?
                .f_to_device(self.device)?;
            let ends = Tensor::f_from_slice(&ends)?.f_to_device(self.device)?;
            rows.extend(to_rows(&self.texts.forward(&padded, &ends)?)?);
        }
        Ok(rows)
    }

    /// The position of a text's embedding: its first end token, or in the legacy form the first of its largest ids.
    fn place_of_end(&self, ids: &[i64]) -> usize {
        let wanted = self.config.end.or_else(|| ids.iter().copied().max());
        let place = ids.iter().position(|id| Some(*id) == wanted);
        place.unwrap_or(ids.len().saturating_sub(1))
    }

    /// SHA-256 of the weights' file, in hex.
    ///
    /// # Errors
    /// When it can no longer be read.
    pub fn digest(&self) -> Result<String, ModelError> {
        weights::digest(&self.weights)
    }
}
