//! The transformer that all three towers share: norm before attention and before the MLP, biases everywhere.

use tch::{Kind, Tensor};

use coar_engine::model::ModelError;
use coar_engine::model::weights::TensorSource;

/// Activation between the MLP's two maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * Phi(x), by the error function.
    Gelu,
    /// x * sigmoid(1.702 x), as in OpenAI's CLIP.
    QuickGelu,
}

/// Sizes of an encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderConfig {
    pub hidden: i64,
    /// Width of the MLP.
    pub inner: i64,
    pub layers: i64,
    /// Divides `hidden`.
    pub heads: i64,
    pub eps: f64,
    pub activation: Activation,
    /// Whether queries, keys and values have biases (`qkv_bias`).
    pub projection_bias: bool,
}

/// Parameter names of a layer, relative to the layer's own name.
#[derive(Debug)]
pub(super) struct Names {
    /// Queries, keys, values.
    pub projections: [&'static str; 3],
    pub output: &'static str,
    pub widen: &'static str,
    pub narrow: &'static str,
    pub before_attention: &'static str,
    pub before_mlp: &'static str,
}

/// `x @ weight^T + bias`.
#[derive(Debug)]
pub(super) struct Linear {
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Linear {
    pub fn load(source: &dyn TensorSource, name: &str, shape: [i64; 2], bias: bool) -> Result<Self, ModelError> {
        let weight = source.tensor(&format!("{name}.weight"), &shape)?;
        let bias = match bias {
            true => Some(source.tensor(&format!("{name}.bias"), &shape[..1])?),
            false => None,
        };
        Ok(Self { weight, bias })
    }

    /// Patch embedding: the weight of a convolution whose stride is its kernel, `[out, 3, patch, patch]`.
    pub fn load_patches(
        source: &dyn TensorSource,
        name: &str,
        (out, patch): (i64, i64),
        bias: bool,
    ) -> Result<Self, ModelError> {
        let weight = source.tensor(&format!("{name}.weight"), &[out, 3, patch, patch])?;
        Ok(Self {
            weight: weight.f_reshape([out, 3 * patch * patch])?,
            bias: match bias {
                true => Some(source.tensor(&format!("{name}.bias"), &[out])?),
                false => None,
            },
        })
    }

    /// `[..., in]` to `[..., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

/// Splits images `[batch, 3, side, side]` into rows `[batch, patches, 3 * patch * patch]`, for
/// [`Linear::load_patches`]. A matrix product instead of a convolution avoids cuDNN's reduced precision.
pub(super) fn patches(pixels: &Tensor, patch: i64) -> Result<Tensor, ModelError> {
    let (batch, _, height, width) = pixels.size4()?;
    let (rows, columns) = (height / patch, width / patch);
    Ok(pixels
        .f_reshape([batch, 3, rows, patch, columns, patch])?
        .f_permute([0, 2, 4, 1, 3, 5])?
        .f_reshape([batch, rows * columns, 3 * patch * patch])?)
}

/// LayerNorm over the last dimension.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    pub fn load(source: &dyn TensorSource, name: &str, config: &EncoderConfig) -> Result<Self, ModelError> {
        Ok(Self {
            weight: source.tensor(&format!("{name}.weight"), &[config.hidden])?,
            bias: source.tensor(&format!("{name}.bias"), &[config.hidden])?,
            eps: config.eps,
        })
    }

    /// `[..., hidden]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.f_layer_norm(
            self.weight.size(),
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
            false,
        )?)
    }
}

#[derive(Debug)]
struct Layer {
    before_attention: Norm,
    projections: [Linear; 3],
    output: Linear,
    before_mlp: Norm,
    widen: Linear,
    narrow: Linear,
}

/// A stack of layers.
#[derive(Debug)]
pub(super) struct Encoder {
    layers: Vec<Layer>,
    heads: i64,
    activation: Activation,
}

impl Encoder {
    /// Layers named `{name}.0`, `{name}.1`, ...
    pub fn load(
        source: &dyn TensorSource,
        name: &str,
        names: &Names,
        config: &EncoderConfig,
    ) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden, config.inner);
        let layers = (0..config.layers).map(|index| {
            let of = |own: &str| format!("{name}.{index}.{own}");
            let projection = |own: &str| Linear::load(source, &of(own), [hidden, hidden], config.projection_bias);
            let [query, key, value] = names.projections;
            Ok(Layer {
                before_attention: Norm::load(source, &of(names.before_attention), config)?,
                projections: [projection(query)?, projection(key)?, projection(value)?],
                output: Linear::load(source, &of(names.output), [hidden, hidden], true)?,
                before_mlp: Norm::load(source, &of(names.before_mlp), config)?,
                widen: Linear::load(source, &of(names.widen), [inner, hidden], true)?,
                narrow: Linear::load(source, &of(names.narrow), [hidden, inner], true)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_, ModelError>>()?,
            heads: config.heads,
            activation: config.activation,
        })
    }

    /// `[batch, tokens, hidden]` to the same shape, optionally with causal attention.
    pub fn forward(&self, x: Tensor, causal: bool) -> Result<Tensor, ModelError> {
        self.layers.iter().try_fold(x, |x, layer| {
            let x = x.f_add(&self.attend(layer, &layer.before_attention.forward(&x)?, causal)?)?;
            let wide = layer.widen.forward(&layer.before_mlp.forward(&x)?)?;
            let wide = match self.activation {
                Activation::Gelu => wide.f_gelu("none")?,
                Activation::QuickGelu => wide.f_mul(&wide.f_mul_scalar(1.702)?.f_sigmoid()?)?,
            };
            Ok(x.f_add(&layer.narrow.forward(&wide)?)?)
        })
    }

    fn attend(&self, layer: &Layer, x: &Tensor, causal: bool) -> Result<Tensor, ModelError> {
        let (batch, tokens, hidden) = x.size3()?;
        let [query, key, value] = &layer.projections;
        // `[batch, heads, tokens, head_dim]`
        let by_head = |map: &Linear| -> Result<Tensor, ModelError> {
            Ok(map
                .forward(x)?
                .f_view([batch, tokens, self.heads, hidden / self.heads])?
                .f_transpose(1, 2)?)
        };
        let mixed = Tensor::f_scaled_dot_product_attention(
            &by_head(query)?,
            &by_head(key)?,
            &by_head(value)?,
            None::<&Tensor>,
            0.0,
            causal,
            None,
            false,
        )?;
        let rows = mixed.f_transpose(1, 2)?.f_reshape([batch, tokens, hidden])?;
        layer.output.forward(&rows)
    }
}

/// Rows `[batch, numbers]` on the host.
///
/// # Errors
/// When a number is not finite, such as after an overflow.
pub(super) fn to_rows(embeddings: &Tensor) -> Result<Vec<Vec<f32>>, ModelError> {
    let (batch, numbers) = embeddings.size2()?;
    let host = embeddings
        .f_to_device(tch::Device::Cpu)?
        .f_to_kind(Kind::Float)?
        .f_contiguous()?;
    let mut flat = vec![0f32; (batch * numbers) as usize];
    host.f_copy_data(&mut flat, (batch * numbers) as usize)?;
    if flat.iter().any(|number| !number.is_finite()) {
        return Err(ModelError::invalid(
            "embedding",
            "has numbers that are not finite; the judge's weights are damaged",
        ));
    }
    Ok(flat.chunks_exact(numbers as usize).map(<[f32]>::to_vec).collect())
}
