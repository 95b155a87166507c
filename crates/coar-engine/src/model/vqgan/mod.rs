//! The image tokenizer: VQGAN encoder, codebook and decoder (`model/chameleon_vae_ori/{vqgan,image_tokenizer}.py`).

mod blocks;
mod config;

use tch::{Kind, Tensor};

use blocks::{Conv, Level, LevelShape, Middle, Norm, Resample};
pub use config::{EncoderDecoderConfig, VqganConfig};

use super::ModelError;
use super::weights::TensorSource;

#[derive(Debug)]
struct Encoder {
    conv_in: Conv,
    levels: Vec<Level>,
    middle: Middle,
    norm_out: Norm,
    conv_out: Conv,
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv,
    middle: Middle,
    /// From the lowest resolution to the highest; `decoder.up.0` comes last.
    levels: Vec<Level>,
    norm_out: Norm,
    conv_out: Conv,
}

/// Images to codes and back.
#[derive(Debug)]
pub struct Vqgan {
    config: VqganConfig,
    encoder: Encoder,
    decoder: Decoder,
    /// `[n_embed, embed_dim]`
    codebook: Tensor,
    quant_conv: Conv,
    post_quant_conv: Conv,
}

impl Vqgan {
    /// The device of the parameters.
    pub fn device(&self) -> tch::Device {
        self.codebook.device()
    }
}

fn has_attention(config: &EncoderDecoderConfig, level: usize) -> bool {
    config.attn_resolutions.contains(&(config.resolution >> level))
}

impl Encoder {
    fn load(source: &dyn TensorSource, config: &EncoderDecoderConfig) -> Result<Self, ModelError> {
        let last = config.ch_mult.len() - 1;
        let width = |level: usize| config.ch * config.ch_mult[level];
        let levels = (0..=last)
            .map(|level| {
                let shape = LevelShape {
                    input: if level == 0 { config.ch } else { width(level - 1) },
                    output: width(level),
                    blocks: config.num_res_blocks,
                    attention: has_attention(config, level),
                    resample: if level == last { Resample::No } else { Resample::Down },
                };
                Level::load(source, &format!("encoder.down.{level}"), &shape)
            })
            .collect::<Result<_, _>>()?;
        let z = if config.double_z {
            2 * config.z_channels
        } else {
            config.z_channels
        };
        Ok(Self {
            conv_in: Conv::load(source, "encoder.conv_in", config.in_channels, config.ch, 3)?,
            levels,
            middle: Middle::load(source, "encoder.mid", width(last))?,
            norm_out: Norm::load(source, "encoder.norm_out", width(last))?,
            conv_out: Conv::load(source, "encoder.conv_out", width(last), z, 3)?,
        })
    }

    fn forward(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let mut x = self.conv_in.forward(pixels)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        self.conv_out.forward(&self.norm_out.swish(&self.middle.forward(&x)?)?)
    }
}

impl Decoder {
    fn load(source: &dyn TensorSource, config: &EncoderDecoderConfig) -> Result<Self, ModelError> {
        let last = config.ch_mult.len() - 1;
        let width = |level: usize| config.ch * config.ch_mult[level];
        let levels = (0..=last)
            .rev()
            .map(|level| {
                let shape = LevelShape {
                    input: width(if level == last { last } else { level + 1 }),
                    output: width(level),
                    blocks: config.num_res_blocks + 1,
                    attention: has_attention(config, level),
                    resample: if level == 0 { Resample::No } else { Resample::Up },
                };
                Level::load(source, &format!("decoder.up.{level}"), &shape)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            conv_in: Conv::load(source, "decoder.conv_in", config.z_channels, width(last), 3)?,
            middle: Middle::load(source, "decoder.mid", width(last))?,
            levels,
            norm_out: Norm::load(source, "decoder.norm_out", width(0))?,
            conv_out: Conv::load(source, "decoder.conv_out", width(0), config.out_ch, 3)?,
        })
    }

    fn forward(&self, latent: &Tensor) -> Result<Tensor, ModelError> {
        let mut x = self.middle.forward(&self.conv_in.forward(latent)?)?;
        for level in &self.levels {
            x = level.forward(x)?;
        }
        self.conv_out.forward(&self.norm_out.swish(&x)?)
    }
}

impl Vqgan {
    /// Takes every parameter from `source`.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn load(config: &VqganConfig, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let d = &config.ddconfig;
        let z = if d.double_z { 2 * d.z_channels } else { d.z_channels };
        Ok(Self {
            encoder: Encoder::load(source, d)?,
            decoder: Decoder::load(source, d)?,
            codebook: source.tensor("quantize.embedding.weight", &[config.n_embed, config.embed_dim])?,
            quant_conv: Conv::load(source, "quant_conv", z, config.embed_dim, 1)?,
            post_quant_conv: Conv::load(source, "post_quant_conv", config.embed_dim, d.z_channels, 1)?,
            config: config.clone(),
        })
    }

    /// The configuration that the parameters were read with.
    pub fn config(&self) -> &VqganConfig {
        &self.config
    }

    /// The codebook, `[n_embed, embed_dim]`.
    pub fn codebook(&self) -> &Tensor {
        &self.codebook
    }

    /// Continuous latents `[batch, embed_dim, h, w]` in f32 of pixels `[batch, 3, H, W]` in -1..1, before quantisation.
    ///
    /// # Errors
    /// When a side is not a multiple of the pixels per code, or the device fails.
    pub fn latents(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let (_, _, height, width) = pixels.size4()?;
        let unit = i64::from(self.config.pixels_per_code());
        if height % unit != 0 || width % unit != 0 {
            return Err(ModelError::invalid(
                "size",
                format!("is {width}x{height}; both sides must be multiples of {unit}"),
            ));
        }
        let pixels = match self.config.ddconfig.patch_size {
            1 => pixels.shallow_clone(),
            patch => pixels.f_pixel_unshuffle(patch)?,
        };
        let latent = self.encoder.forward(&pixels)?;
        Ok(self.quant_conv.forward(&latent)?.f_to_kind(Kind::Float)?)
    }

    /// Nearest codebook rows by squared distance: latents `[batch, embed_dim, h, w]` to codes `[batch, h * w]` i64,
    /// in raster order.
    ///
    /// # Errors
    /// When the device fails.
    pub fn quantize(&self, latents: &Tensor) -> Result<Tensor, ModelError> {
        let batch = latents.size()[0];
        let rows = latents
            .f_permute([0, 2, 3, 1])?
            .f_reshape([-1, self.config.embed_dim])?;
        Ok(nearest(&rows, &self.codebook.f_to_kind(Kind::Float)?)?.f_view([batch, -1])?)
    }

    /// Codes `[batch, h * w]` i64 in raster order of pixels `[batch, 3, H, W]` in -1..1.
    ///
    /// # Errors
    /// As [`Self::latents`].
    pub fn encode(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        self.quantize(&self.latents(pixels)?)
    }

    /// Pixels `[batch, 3, H, W]` in f32 (about -1..1, not clamped) of quantised latents `[batch, embed_dim, h, w]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn decode_latents(&self, latents: &Tensor) -> Result<Tensor, ModelError> {
        let latents = self.post_quant_conv.forward(&latents.f_contiguous()?)?;
        let pixels = self.decoder.forward(&latents)?.f_to_kind(Kind::Float)?;
        match self.config.ddconfig.patch_size {
            1 => Ok(pixels.f_contiguous()?),
            patch => Ok(pixels.f_pixel_shuffle(patch)?),
        }
    }

    /// Memory in bytes of [`Self::decode`] for an image of that size, without the weights: the last level's widest
    /// layer in f32, eight times: a block's input and output, its norms and convolutions, and the libraries'
    /// workspaces.
    pub fn decode_bytes(&self, width: u32, height: u32) -> u64 {
        let d = &self.config.ddconfig;
        let patch = d.patch_size.max(1) as u64;
        let positions = (u64::from(width) / patch) * (u64::from(height) / patch);
        // The upsampling block before the last level still has the width of the lower one.
        let widest = d.ch_mult.iter().take(2).max().copied().unwrap_or(1);
        8 * 4 * positions * (d.ch * widest).max(0) as u64
    }

    /// Pixels `[batch, 3, H, W]` in f32, not clamped, of codes `[batch, h * w]` i64 that form `h` rows of `w`.
    ///
    /// # Errors
    /// When the codes do not form the rows, lie outside the codebook, or the device fails.
    pub fn decode(&self, codes: &Tensor, h: i64, w: i64) -> Result<Tensor, ModelError> {
        let batch = codes.size()[0];
        if codes.size() != [batch, h * w] {
            return Err(ModelError::invalid(
                "codes",
                format!("have shape {:?}; expected [batch, {}]", codes.size(), h * w),
            ));
        }
        let rows = self.codebook.f_index_select(0, &codes.f_reshape([-1i64])?)?;
        self.decode_latents(
            &rows
                .f_view([batch, h, w, self.config.embed_dim])?
                .f_permute([0, 3, 1, 2])?,
        )
    }
}

/// Index of the nearest row of `codebook` `[n, d]` for every row of `rows` `[m, d]`: `[m]` i64.
pub fn nearest(rows: &Tensor, codebook: &Tensor) -> Result<Tensor, ModelError> {
    let own = rows
        .f_square()?
        .f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?;
    let codes = codebook
        .f_square()?
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
    let distance = own
        .f_add(&codes)?
        .f_sub(&rows.f_matmul(&codebook.f_transpose(0, 1)?)?.f_mul_scalar(2.0)?)?;
    Ok(distance.f_argmin(1, false)?)
}
