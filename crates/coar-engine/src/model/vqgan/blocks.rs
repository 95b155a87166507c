//! Convolution, group norm, residual and attention blocks (`model/chameleon_vae_ori/vqgan.py`).

use tch::{Kind, Tensor};

use crate::model::ModelError;
use crate::model::weights::TensorSource;

const GROUPS: i64 = 32;
const NORM_EPS: f64 = 1e-6;

/// A square convolution with bias.
#[derive(Debug)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv {
    pub(super) fn load(
        source: &dyn TensorSource,
        name: &str,
        input: i64,
        output: i64,
        size: i64,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            weight: source.tensor(&format!("{name}.weight"), &[output, input, size, size])?,
            bias: source.tensor(&format!("{name}.bias"), &[output])?,
            stride: 1,
            padding: size / 2,
        })
    }

    /// Stride 2 without padding: the caller pads right and bottom.
    fn halving(self) -> Self {
        Self {
            stride: 2,
            padding: 0,
            ..self
        }
    }

    /// `[batch, input, h, w]` to `[batch, output, h / stride, w / stride]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let x = x.f_to_kind(self.weight.kind())?;
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), [self.stride], [self.padding], [1], 1)?)
    }
}

/// Group norm followed, if enabled, by `x * sigmoid(x)`.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    pub(super) fn load(source: &dyn TensorSource, name: &str, channels: i64) -> Result<Self, ModelError> {
        Ok(Self {
            weight: source.tensor(&format!("{name}.weight"), &[channels])?,
            bias: source.tensor(&format!("{name}.bias"), &[channels])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let x = x.f_to_kind(self.weight.kind())?;
        Ok(x.f_group_norm(GROUPS, Some(&self.weight), Some(&self.bias), NORM_EPS, false)?)
    }

    pub(super) fn swish(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.forward(x)?.f_silu()?)
    }
}

/// norm, swish, 3x3, norm, swish, 3x3, beside an identity or (if the channel counts differ) a 1x1 shortcut.
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl ResnetBlock {
    pub(super) fn load(source: &dyn TensorSource, name: &str, input: i64, output: i64) -> Result<Self, ModelError> {
        let shortcut = match input == output {
            true => None,
            false => Some(Conv::load(source, &format!("{name}.nin_shortcut"), input, output, 1)?),
        };
        Ok(Self {
            norm1: Norm::load(source, &format!("{name}.norm1"), input)?,
            conv1: Conv::load(source, &format!("{name}.conv1"), input, output, 3)?,
            norm2: Norm::load(source, &format!("{name}.norm2"), output)?,
            conv2: Conv::load(source, &format!("{name}.conv2"), output, output, 3)?,
            shortcut,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let inner = self.conv1.forward(&self.norm1.swish(x)?)?;
        let inner = self.conv2.forward(&self.norm2.swish(&inner)?)?;
        match &self.shortcut {
            Some(shortcut) => Ok(shortcut.forward(x)?.f_add(&inner)?),
            None => Ok(x.f_add(&inner)?),
        }
    }
}

/// Single-head self-attention over all positions of a feature map, scaled by `channels^-0.5`.
#[derive(Debug)]
pub(super) struct AttentionBlock {
    norm: Norm,
    query: Conv,
    key: Conv,
    value: Conv,
    output: Conv,
}

impl AttentionBlock {
    pub(super) fn load(source: &dyn TensorSource, name: &str, channels: i64) -> Result<Self, ModelError> {
        let conv = |which: &str| Conv::load(source, &format!("{name}.{which}"), channels, channels, 1);
        Ok(Self {
            norm: Norm::load(source, &format!("{name}.norm"), channels)?,
            query: conv("q")?,
            key: conv("k")?,
            value: conv("v")?,
            output: conv("proj_out")?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, channels, height, width) = x.size4()?;
        let flat = |y: Tensor| y.f_reshape([batch, channels, height * width]);
        let normed = self.norm.forward(x)?;
        let query = flat(self.query.forward(&normed)?)?.f_transpose(1, 2)?;
        let key = flat(self.key.forward(&normed)?)?;
        let value = flat(self.value.forward(&normed)?)?;
        let scale = (channels as f64).powf(-0.5);
        let weights = query
            .f_matmul(&key)?
            .f_mul_scalar(scale)?
            .f_softmax(2, Kind::Float)?
            .f_to_kind(value.kind())?;
        let mixed = value
            .f_matmul(&weights.f_transpose(1, 2)?)?
            .f_view([batch, channels, height, width])?;
        Ok(x.f_add(&self.output.forward(&mixed)?)?)
    }
}

/// The blocks of one resolution: residual blocks, each followed by attention if the resolution is configured so.
#[derive(Debug)]
pub(super) struct Level {
    blocks: Vec<(ResnetBlock, Option<AttentionBlock>)>,
    resample: Option<Conv>,
}

/// How a level changes the resolution after its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resample {
    No,
    Down,
    Up,
}

/// The shape of one level.
pub(super) struct LevelShape {
    pub input: i64,
    pub output: i64,
    pub blocks: i64,
    pub attention: bool,
    pub resample: Resample,
}

impl Level {
    pub(super) fn load(source: &dyn TensorSource, name: &str, shape: &LevelShape) -> Result<Self, ModelError> {
        let blocks = (0..shape.blocks)
            .map(|index| {
                let input = if index == 0 { shape.input } else { shape.output };
                let block = ResnetBlock::load(source, &format!("{name}.block.{index}"), input, shape.output)?;
                let attention = match shape.attention {
                    true => Some(AttentionBlock::load(
                        source,
                        &format!("{name}.attn.{index}"),
                        shape.output,
                    )?),
                    false => None,
                };
                Ok((block, attention))
            })
            .collect::<Result<_, ModelError>>()?;
        let conv = |which: &str| Conv::load(source, &format!("{name}.{which}.conv"), shape.output, shape.output, 3);
        let resample = match shape.resample {
            Resample::No => None,
            Resample::Down => Some(conv("downsample")?.halving()),
            Resample::Up => Some(conv("upsample")?),
        };
        Ok(Self { blocks, resample })
    }

    pub(super) fn forward(&self, x: Tensor) -> Result<Tensor, ModelError> {
        let mut x = x;
        for (block, attention) in &self.blocks {
            x = block.forward(&x)?;
            if let Some(attention) = attention {
                x = attention.forward(&x)?;
            }
        }
        match &self.resample {
            None => Ok(x),
            Some(conv) if conv.stride == 2 => conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?),
            Some(conv) => {
                let (_, _, height, width) = x.size4()?;
                conv.forward(&x.f_upsample_nearest2d([2 * height, 2 * width], None, None)?)
            }
        }
    }
}

/// block_1, attn_1, block_2 at the lowest resolution.
#[derive(Debug)]
pub(super) struct Middle {
    block1: ResnetBlock,
    attention: AttentionBlock,
    block2: ResnetBlock,
}

impl Middle {
    pub(super) fn load(source: &dyn TensorSource, name: &str, channels: i64) -> Result<Self, ModelError> {
        Ok(Self {
            block1: ResnetBlock::load(source, &format!("{name}.block_1"), channels, channels)?,
            attention: AttentionBlock::load(source, &format!("{name}.attn_1"), channels)?,
            block2: ResnetBlock::load(source, &format!("{name}.block_2"), channels, channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.block2.forward(&self.attention.forward(&self.block1.forward(x)?)?)
    }
}
