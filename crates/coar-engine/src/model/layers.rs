//! RMSNorm, per-head LayerNorm, SwiGLU and the linear map, as in the reference.

use tch::{Kind, Tensor};

use super::weights::TensorSource;
use super::{ModelError, cpu};

/// `x @ weight^T` in the weight's kind; `weight` is `[out, in]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor, ModelError> {
    match cpu::linear(x, weight)? {
        Some(y) => Ok(y),
        None => Ok(x.f_to_kind(weight.kind())?.f_linear(weight, None::<&Tensor>)?),
    }
}

/// Root-mean-square norm: statistics in f32, cast back to the input's kind, *then* times the weight.
#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub(super) fn load(source: &dyn TensorSource, name: &str, hidden: i64, eps: f64) -> Result<Self, ModelError> {
        Ok(Self {
            weight: source.tensor(&format!("{name}.weight"), &[hidden])?,
            eps,
        })
    }

    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[..., hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let wide = x.f_to_kind(Kind::Float)?;
        let scale = (wide.f_square()?.f_mean_dim([-1i64].as_slice(), true, Kind::Float)? + self.eps).f_rsqrt()?;
        Ok(wide.f_mul(&scale)?.f_to_kind(x.kind())?.f_mul(&self.weight)?)
    }
}

/// LayerNorm over the head dimension with its own weight and bias per head; eps is 1e-5 regardless of
/// `rms_norm_eps`.
#[derive(Debug)]
pub(super) struct HeadNorm {
    /// `[1, 1, heads, head_dim]`: query heads, then key heads.
    weight: Tensor,
    bias: Tensor,
}

/// The heads of a norm.
pub(super) struct Heads {
    /// "q_norm" or "k_norm"
    pub name: &'static str,
    pub count: i64,
}

const HEAD_NORM_EPS: f64 = 1e-5;

impl HeadNorm {
    /// Concatenates several head norms. The parameters on disk have r rows, each for `heads / r` consecutive heads.
    pub(super) fn load(
        source: &dyn TensorSource,
        name: &str,
        groups: &[Heads],
        head_dim: i64,
        default_rows: i64,
    ) -> Result<Self, ModelError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for Heads { name: own, count } in groups {
            let weight_name = format!("{name}.{own}.weight");
            let rows = match source.shape_of(&weight_name).as_deref() {
                Some(&[rows, _]) if rows > 0 && count % rows == 0 => rows,
                _ => default_rows,
            };
            let spread = |tensor: Tensor| tensor.f_repeat_interleave_self_int(count / rows, 0, None);
            weights.push(spread(source.tensor(&weight_name, &[rows, head_dim])?)?);
            biases.push(spread(
                source.tensor(&format!("{name}.{own}.bias"), &[rows, head_dim])?,
            )?);
        }
        Ok(Self {
            weight: Tensor::f_cat(&weights, 0)?.f_view([1, 1, -1, head_dim])?,
            bias: Tensor::f_cat(&biases, 0)?.f_view([1, 1, -1, head_dim])?,
        })
    }

    /// Weight and bias, `[1, 1, heads, head_dim]`.
    pub(super) fn parameters(&self) -> (&Tensor, &Tensor) {
        (&self.weight, &self.bias)
    }

    /// `[batch, seq, heads, head_dim]`, computed and returned in f32 if the input is narrower (as under autocast).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let head_dim = x.size()[3];
        let normed = x.f_to_kind(Kind::Float)?.f_layer_norm(
            [head_dim],
            None::<&Tensor>,
            None::<&Tensor>,
            HEAD_NORM_EPS,
            false,
        )?;
        Ok(normed.f_mul(&self.weight)?.f_add(&self.bias)?)
    }
}

/// `down(silu(gate(x)) * up(x))`; gate and up are one matrix, so a decode step reads them in one call.
#[derive(Debug)]
pub(super) struct Mlp {
    /// `[2 * inner, hidden]`
    gate_up: Tensor,
    down: Tensor,
}

impl Mlp {
    pub(super) fn load(source: &dyn TensorSource, name: &str, hidden: i64, inner: i64) -> Result<Self, ModelError> {
        let gate = source.tensor(&format!("{name}.gate_proj.weight"), &[inner, hidden])?;
        let up = source.tensor(&format!("{name}.up_proj.weight"), &[inner, hidden])?;
        Ok(Self {
            gate_up: Tensor::f_cat(&[gate, up], 0)?,
            down: source.tensor(&format!("{name}.down_proj.weight"), &[hidden, inner])?,
        })
    }

    /// Gate and up `[2 * inner, hidden]`, and down `[hidden, inner]`.
    pub(super) fn matrices(&self) -> (&Tensor, &Tensor) {
        (&self.gate_up, &self.down)
    }

    /// `[..., hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let both = linear(x, &self.gate_up)?;
        let inner = both.size()[both.dim() - 1] / 2;
        let gated = both
            .f_narrow(-1, 0, inner)?
            .f_silu()?
            .f_mul(&both.f_narrow(-1, inner, inner)?)?;
        linear(&gated, &self.down)
    }
}
