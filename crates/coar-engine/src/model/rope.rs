//! Rotary position embedding, rotate-half layout: the first half of a head's dimensions is paired with the second.

use tch::{Device, Kind, Tensor};

use super::ModelError;

/// Tables of `cos` and signed `sin`, each `[positions, head_dim]` in f32: the sine of the first half is negated, so
/// the rotated halves need no negation.
#[derive(Debug)]
pub(super) struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(super) fn new(head_dim: i64, theta: f64, positions: i64, device: Device) -> Result<Self, ModelError> {
        let even = Tensor::f_arange_start_step(0, head_dim, 2, (Kind::Int64, Device::Cpu))?.f_to_kind(Kind::Float)?;
        let exponent = even.f_div_scalar(head_dim as f64)?;
        let frequency = Tensor::f_pow_scalar(theta, &exponent)?.f_reciprocal()?;
        let angle = Tensor::f_arange(positions, (Kind::Float, Device::Cpu))?.f_outer(&frequency)?;
        let (cos, sin) = (angle.f_cos()?, angle.f_sin()?);
        Ok(Self {
            cos: Tensor::f_cat(&[&cos, &cos], 1)?.f_to_device(device)?,
            sin: Tensor::f_cat(&[&sin.f_neg()?, &sin], 1)?.f_to_device(device)?,
        })
    }

    /// Shallow copies of the same tables.
    pub(super) fn share(&self) -> Self {
        Self {
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
        }
    }

    /// The whole tables, `[positions, head_dim]` each.
    pub(super) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// `(cos, sin)` for `positions` `[batch, seq]` or `[seq]`, shaped `[.., seq, 1, head_dim]` to broadcast with
    /// `[batch, seq, heads, head_dim]`.
    pub(super) fn at(&self, positions: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
        let mut shape = positions.size();
        shape.extend([1, self.cos.size()[1]]);
        let flat = positions.f_reshape([-1i64])?;
        Ok((
            self.cos.f_index_select(0, &flat)?.f_view(&*shape)?,
            self.sin.f_index_select(0, &flat)?.f_view(&*shape)?,
        ))
    }
}

/// Rotates `x` `[batch, seq, heads, head_dim]`.
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, ModelError> {
    let half = x.size()[3] / 2;
    Ok(x.f_mul(cos)?.f_addcmul(&x.f_roll([half], [3])?, sin)?)
}
