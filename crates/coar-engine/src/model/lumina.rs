//! A whole checkpoint: transformer, image tokenizer, text side and image preparation.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::decoding::{Decoding, DecodingRequest};
pub use super::files::CheckpointFiles;
use super::preprocessing::CropPlan;
use super::transformer::Transformer;
use super::vqgan::{Vqgan, VqganConfig};
use super::weights::{Checkpoint, Shared, Target, TensorSource};
use super::{ModelConfig, ModelError};
use coar_core::engine::TokenCounter;
use coar_core::image::RgbImage;
use coar_core::tokenizer::{EncodedPrompt, PromptPart, TextTokenizer, Vocabulary, encode_prompt, image_block};

/// The parts of [`LuminaMgpt::assemble`].
pub struct Parts<'a> {
    pub config: ModelConfig,
    pub tokenizer: TextTokenizer,
    pub vqgan_config: VqganConfig,
    /// The transformer's weights.
    pub weights: &'a dyn TensorSource,
    /// The image tokenizer's weights, in f32.
    pub vqgan_weights: &'a dyn TensorSource,
    /// Identifies the weights; concepts record it.
    pub fingerprint: String,
    /// Image size in pixels; 512 if absent.
    pub target_size: Option<u32>,
}

impl std::fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

/// A frozen base model with its tokenizers and its image preparation.
#[derive(Debug)]
pub struct LuminaMgpt {
    pub transformer: Transformer,
    pub vqgan: Vqgan,
    pub vocabulary: Vocabulary,
    /// Shared with token counters outside the device thread.
    pub tokenizer: Arc<TextTokenizer>,
    pub crop: CropPlan,
    /// The image tokenizer's parameters, to load it again without a copy.
    vqgan_tensors: Shared,
    fingerprint: String,
    target_size: u32,
}

/// The default image size if neither the configuration nor the caller gives one: the smallest published
/// checkpoint's.
const DEFAULT_TARGET: u32 = 512;
/// Sampling settings of class images.
const PLAIN_GUIDANCE: f64 = 3.0;

impl LuminaMgpt {
    /// Counts the tokens of requests to this model, if a row of the batch holds `longest_row` tokens.
    pub fn token_counter(&self, longest_row: i64) -> TokenCounter {
        TokenCounter {
            tokenizer: self.tokenizer.clone(),
            vocabulary: self.vocabulary.clone(),
            pixels_per_code: self.vqgan.config().pixels_per_code(),
            longest_row,
        }
    }

    /// Loads a checkpoint onto `device` in `kind`; the image tokenizer stays in f32, as on disk.
    ///
    /// # Errors
    /// When a file or tensor is missing or misshapen, by name.
    pub fn load(
        files: &CheckpointFiles,
        device: Device,
        kind: Kind,
        target_size: Option<u32>,
    ) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let config = ModelConfig::read(&files.config)?;
        let checkpoint = Checkpoint::open_dir(&files.dir, Target { kind, device })?;
        let tokenizer = TextTokenizer::read(&files.tokenizer)?;
        let vocabulary = Vocabulary::from_names(&tokenizer.names())?;
        let vqgan_config = files.image_tokenizer.config()?;
        if vqgan_config.n_embed < vocabulary.code_count() as i64 {
            return Err(ModelError::Config {
                file: files.image_tokenizer.config_file().to_owned(),
                field: "n_embed".to_owned(),
                problem: format!(
                    "is {}; the vocabulary names {} image codes",
                    vqgan_config.n_embed,
                    vocabulary.code_count()
                ),
            });
        }
        // Every id that a prompt can contain is looked up in the embedding, and the device does not check bounds.
        let highest = tokenizer.names().values().copied().max().unwrap_or(0);
        if highest >= config.vocab_size {
            return Err(ModelError::Config {
                file: files.config.clone(),
                field: "vocab_size".to_owned(),
                problem: format!(
                    "is {}; {} names the id {highest}",
                    config.vocab_size,
                    files.tokenizer.display()
                ),
            });
        }
        let source = files.image_tokenizer.weights(Target {
            kind: Kind::Float,
            device,
        })?;
        Self::assemble(Parts {
            fingerprint: checkpoint.fingerprint(),
            target_size: target_size.or(config.target_size),
            config,
            tokenizer,
            vqgan_config,
            weights: &checkpoint,
            vqgan_weights: source.as_ref(),
        })
    }

    /// Assembles a model from parts that need not be files.
    ///
    /// # Errors
    /// When a part does not fit the others, or a tensor is missing or misshapen.
    pub fn assemble(parts: Parts) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let vocabulary = Vocabulary::from_names(&parts.tokenizer.names())?;
        let unit = 2 * parts.vqgan_config.pixels_per_code();
        let target_size = parts.target_size.unwrap_or(DEFAULT_TARGET);
        if target_size < unit || u64::from(target_size / unit) > vocabulary.most_grids() as u64 {
            return Err(ModelError::invalid(
                "target_size",
                format!(
                    "is {target_size}; expected {unit} to {}",
                    unit * vocabulary.most_grids() as u32
                ),
            ));
        }
        let transformer = Transformer::load(&parts.config, parts.weights)?;
        let vqgan_tensors = Shared::default();
        let vqgan = Vqgan::load(&parts.vqgan_config, &vqgan_tensors.remembering(parts.vqgan_weights))?;
        Ok(Self {
            fingerprint: parts.fingerprint,
            transformer,
            vqgan,
            vqgan_tensors,
            crop: CropPlan::new(target_size, unit),
            vocabulary,
            tokenizer: parts.tokenizer.into(),
            target_size,
        })
    }

    /// Another image tokenizer for another thread, with shared weights.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn share_vqgan(&self) -> Result<Vqgan, ModelError> {
        tch::no_grad(|| Vqgan::load(self.vqgan.config(), &self.vqgan_tensors))
    }

    /// The same model with another transformer. Everything else is shared, including the fingerprint: it identifies the
    /// weights from which the other ones were derived.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn with_transformer(&self, transformer: Transformer) -> Result<Self, ModelError> {
        Ok(Self {
            transformer,
            vqgan: self.share_vqgan()?,
            vocabulary: self.vocabulary.clone(),
            tokenizer: self.tokenizer.clone(),
            crop: self.crop.clone(),
            vqgan_tensors: self.vqgan_tensors.another(),
            fingerprint: self.fingerprint.clone(),
            target_size: self.target_size,
        })
    }

    /// Identifies these weights; concepts record it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// `(width, height)` of every supported image size, the square one first.
    pub fn sizes(&self) -> Vec<(u32, u32)> {
        let named = |&(w, h): &(u32, u32)| {
            let unit = 2 * self.vqgan.config().pixels_per_code();
            (w / unit).max(h / unit) as usize <= self.vocabulary.most_grids()
        };
        let mut sizes: Vec<_> = self.crop.sizes().iter().copied().filter(named).collect();
        let square = (self.target_size, self.target_size);
        sizes.sort_by_key(|&size| size != square);
        sizes
    }

    /// Memory in bytes for decoding the largest image, without the weights.
    pub fn decode_bytes(&self) -> u64 {
        let bytes = |(width, height): (u32, u32)| self.vqgan.decode_bytes(width, height);
        self.sizes().into_iter().map(bytes).max().unwrap_or(0)
    }

    /// Rows and columns of codes of an image.
    pub fn codes_of(&self, width: u32, height: u32) -> (i64, i64) {
        let unit = self.vqgan.config().pixels_per_code();
        (i64::from(height / unit), i64::from(width / unit))
    }

    /// Prompt ids with slots.
    ///
    /// # Errors
    /// When the text is not valid.
    pub fn encode_prompt(&self, width: u32, height: u32, parts: &[PromptPart]) -> Result<EncodedPrompt, ModelError> {
        Ok(encode_prompt(&self.tokenizer, &self.vocabulary, width, height, parts)?)
    }

    /// Prompt ids with at most one slot of `tokens` (0: none), and the slot's first position.
    ///
    /// # Errors
    /// When the text is not valid.
    pub fn prompt_with_slot(
        &self,
        before: &str,
        tokens: usize,
        after: &str,
        width: u32,
        height: u32,
    ) -> Result<(Vec<i64>, Vec<i64>), ModelError> {
        let parts: &[PromptPart] = match tokens {
            0 => &[PromptPart::Text(before), PromptPart::Text(after)],
            _ => &[
                PromptPart::Text(before),
                PromptPart::Slot(tokens),
                PromptPart::Text(after),
            ],
        };
        let encoded = self.encode_prompt(width, height, parts)?;
        Ok((encoded.ids, encoded.slots))
    }

    /// The first id of a word inside a sentence.
    ///
    /// # Errors
    /// When the word cannot be tokenised.
    pub fn first_token_of(&self, word: &str) -> Result<i64, ModelError> {
        let ids = self.tokenizer.encode(&format!(" {}", word.trim()))?;
        ids.first()
            .copied()
            .ok_or_else(|| ModelError::invalid("start_words", format!("`{word}` has no token")))
    }

    /// Image start, height and width ids.
    ///
    /// # Errors
    /// When the size has no name.
    pub fn image_start(&self, width: u32, height: u32) -> Result<[i64; 3], ModelError> {
        let (rows, columns) = self.codes_of(width, height);
        Ok([
            self.vocabulary.image_start(),
            self.vocabulary.grid_id(rows / 2)?,
            self.vocabulary.grid_id(columns / 2)?,
        ])
    }

    /// An image's codes as ids: `[start, height, width]`, and codes, row ends, image end.
    ///
    /// # Errors
    /// When the codes do not form the image.
    pub fn image_ids(&self, codes: &[i64], width: u32, height: u32) -> Result<([i64; 3], Vec<i64>), ModelError> {
        let (rows, columns) = self.codes_of(width, height);
        Ok(image_block(&self.vocabulary, codes, rows as usize, columns as usize)?)
    }

    /// Codes of a prepared image, in raster order.
    ///
    /// # Errors
    /// When its size is not on the grid, or the device fails.
    pub fn encode_image(&self, image: &RgbImage) -> Result<Vec<i64>, ModelError> {
        tch::no_grad(|| {
            let pixels = pixels(std::slice::from_ref(image))?.f_to_device(self.transformer.device())?;
            Ok(Vec::<i64>::try_from(&self.vqgan.encode(&pixels)?.f_view([-1i64])?)?)
        })
    }

    /// The image of codes in raster order.
    ///
    /// # Errors
    /// When a code is outside the codebook, the codes do not form the image, or the device fails.
    pub fn decode_image(&self, codes: &[i64], width: u32, height: u32) -> Result<RgbImage, ModelError> {
        let known = 0..self.vqgan.config().n_embed;
        if let Some(code) = codes.iter().find(|code| !known.contains(code)) {
            let problem = format!("hold {code}; expected 0 to {}", known.end - 1);
            return Err(ModelError::invalid("codes", problem));
        }
        tch::no_grad(|| {
            let (rows, columns) = self.codes_of(width, height);
            let codes = Tensor::f_from_slice(codes)?
                .f_view([1, -1])?
                .f_to_device(self.transformer.device())?;
            let mut all = images(&self.vqgan.decode(&codes, rows, columns)?)?;
            all.pop().ok_or_else(|| ModelError::invalid("codes", "are empty"))
        })
    }

    /// Starts decoding images of a prompt without concepts, with this model's default settings.
    ///
    /// # Errors
    /// When the prompt or size is not valid, or the device fails.
    pub fn start_plain(
        &self,
        prompt: &str,
        width: u32,
        height: u32,
        streams: Vec<(u64, u64)>,
    ) -> Result<Decoding, ModelError> {
        let (mut ids, _) = self.prompt_with_slot(prompt, 0, "", width, height)?;
        let start = self.image_start(width, height)?;
        ids.extend(start);
        let (rows, columns) = self.codes_of(width, height);
        Decoding::start(
            &self.transformer,
            &self.vocabulary,
            &[DecodingRequest {
                prompt: ids,
                unconditional: start.to_vec(),
                context: None,
                rows,
                columns,
                guidance_scale: PLAIN_GUIDANCE,
                temperature: 1.0,
                top_k: self.default_top_k(),
                streams,
            }],
        )
    }

    /// The reference's 2000 of 8192 codes, in proportion for smaller codebooks.
    pub fn default_top_k(&self) -> i64 {
        match self.vocabulary.code_count() {
            8192.. => 2000,
            _ => 20,
        }
    }
}

/// Pixels `[batch, 3, H, W]` in -1..1 of images of one size: u8 / 255 * 2 - 1, computed in f64.
///
/// # Errors
/// When the images are of several sizes.
pub fn pixels(images: &[RgbImage]) -> Result<Tensor, ModelError> {
    let levels = levels();
    let stack = images
        .iter()
        .map(|p| {
            let values: Vec<f32> = p.rgb.iter().map(|&level| levels[usize::from(level)]).collect();
            Ok(Tensor::f_from_slice(&values)?.f_view([i64::from(p.height), i64::from(p.width), 3])?)
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    Ok(Tensor::f_stack(&stack, 0)?.f_permute([0, 3, 1, 2])?.f_contiguous()?)
}

/// The value of each 8-bit level in -1..1.
fn levels() -> Vec<f32> {
    (0..=255)
        .map(|level| (f64::from(level) / 255.0 * 2.0 - 1.0) as f32)
        .collect()
}

/// The bytes of images of one size, concatenated, as pixels `[batch, 3, height, width]` in -1..1 on `device`: the
/// same numbers as [`pixels`], computed there.
///
/// # Errors
/// When libtorch fails.
pub fn pixels_on(rgb: &[u8], (height, width): (usize, usize), device: Device) -> Result<Tensor, ModelError> {
    let at = Tensor::f_from_slice(rgb)?.f_to_device(device)?.f_to_kind(Kind::Int64)?;
    let levels = Tensor::f_from_slice(&levels())?.f_to_device(device)?;
    Ok(levels
        .f_index_select(0, &at)?
        .f_view([-1, height as i64, width as i64, 3])?
        .f_permute([0, 3, 1, 2])?
        .f_contiguous()?)
}

/// Pixels `[batch, 3, H, W]` as 8-bit images, as the reference writes them: clamped, scaled, truncated.
///
/// # Errors
/// When libtorch fails.
pub fn images(pixels: &Tensor) -> Result<Vec<RgbImage>, ModelError> {
    let (batch, _, height, width) = pixels.size4()?;
    let levels = pixels
        .f_clamp(-1.0, 1.0)?
        .f_add_scalar(1.0)?
        .f_div_scalar(2.0)?
        .f_mul_scalar(255.0)?;
    let bytes = levels
        .f_to_kind(Kind::Uint8)?
        .f_permute([0, 2, 3, 1])?
        .f_contiguous()?
        .f_to_device(Device::Cpu)?;
    (0..batch)
        .map(|index| {
            let rgb = Vec::<u8>::try_from(&bytes.f_get(index)?.f_reshape([-1i64])?)?;
            Ok(RgbImage {
                width: width as u32,
                height: height as u32,
                rgb,
            })
        })
        .collect()
}
