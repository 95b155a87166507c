//! A small convolutional network with several heads, one per question about an image. The judges that this project
//! trains itself are such networks.

use tch::{Kind, Tensor};

use coar_engine::model::ModelError;
use coar_engine::model::weights::TensorSource;

const GROUPS: i64 = 8;
const NORM_EPS: f64 = 1e-5;

/// The architecture of a network.
#[derive(Debug, Clone, Copy)]
pub struct ClassifierShape {
    /// Squares of this many pixels per side are folded into channels.
    pub patch: i64,
    /// Channels after each block; multiples of 8.
    pub widths: &'static [i64],
    /// Stride of each block's convolution.
    pub strides: &'static [i64],
    /// Questions by name, with their number of answers.
    pub heads: &'static [(&'static str, i64)],
}

#[derive(Debug)]
struct Block {
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: i64,
}

/// The network, in the kind and on the device of its parameters.
#[derive(Debug)]
pub struct Classifier {
    patch: i64,
    blocks: Vec<Block>,
    heads: Vec<(Tensor, Tensor)>,
}

impl Classifier {
    /// Takes every parameter from `source`.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn load(shape: &ClassifierShape, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let mut width = 3 * shape.patch * shape.patch;
        let mut blocks = Vec::with_capacity(shape.widths.len());
        for (index, (&output, &stride)) in shape.widths.iter().zip(shape.strides).enumerate() {
            let part = |name: &str, shape: &[i64]| source.tensor(&format!("blocks.{index}.{name}"), shape);
            blocks.push(Block {
                weight: part("conv.weight", &[output, width, 3, 3])?,
                bias: part("conv.bias", &[output])?,
                norm_weight: part("norm.weight", &[output])?,
                norm_bias: part("norm.bias", &[output])?,
                stride,
            });
            width = output;
        }
        let heads = shape
            .heads
            .iter()
            .map(|(name, count)| {
                let weight = source.tensor(&format!("heads.{name}.weight"), &[*count, width])?;
                Ok((weight, source.tensor(&format!("heads.{name}.bias"), &[*count])?))
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            patch: shape.patch,
            blocks,
            heads,
        })
    }

    /// Pooled features `[batch, width]` of pixels `[batch, 3, h, w]` in -1..1.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor, ModelError> {
        let mut x = pixels.f_pixel_unshuffle(self.patch)?;
        for block in &self.blocks {
            let y = x.f_conv2d(&block.weight, Some(&block.bias), [block.stride], [1], [1], 1)?;
            x = y
                .f_group_norm(
                    GROUPS,
                    Some(&block.norm_weight),
                    Some(&block.norm_bias),
                    NORM_EPS,
                    false,
                )?
                .f_silu()?;
        }
        let mean = x.f_mean_dim([2i64, 3].as_slice(), false, Kind::Float)?;
        Ok(mean.f_add(&x.f_amax([2i64, 3].as_slice(), false)?)?.f_mul_scalar(0.5)?)
    }

    /// For each head, scores `[batch, answers]` of pooled features.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn logits(&self, features: &Tensor) -> Result<Vec<Tensor>, ModelError> {
        self.heads
            .iter()
            .map(|(weight, bias)| Ok(features.f_linear(weight, Some(bias))?))
            .collect()
    }

    /// For each head, each image's most likely answer.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn answers(&self, features: &Tensor) -> Result<Vec<Vec<i64>>, ModelError> {
        self.logits(features)?
            .iter()
            .map(|logits| Ok(Vec::<i64>::try_from(&logits.f_argmax(1, false)?)?))
            .collect()
    }
}
