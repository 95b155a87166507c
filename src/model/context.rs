//! Rows to inject at given positions of a sequence, layer by layer, and the identity mask.
//!
//! This is the transformer's only hook for concepts; it does not know what a concept is.

use tch::{Device, Kind, Tensor};

use super::ModelError;

/// Replacements of hidden states at the input of one layer.
#[derive(Debug)]
pub struct LayerContext {
    /// `[m]` i64: batch row of each replacement.
    pub rows: Tensor,
    /// `[m]` i64: position in that row.
    pub positions: Tensor,
    /// `[m, hidden]`; gradients flow into it.
    pub values: Tensor,
}

/// Everything that concepts change in one forward pass.
#[derive(Debug, Default)]
pub struct ContextBatch {
    /// Entry i holds the replacements at the input of decoder layer i; layers past its end are left alone.
    pub layers: Vec<LayerContext>,
    /// Identity mask: `(row, one, other)`; queries at position `one` do not see keys at `other`, nor the reverse.
    pub blocked: Vec<(i64, i64, i64)>,
}

impl ContextBatch {
    /// The hidden states `[batch, seq, hidden]` as layer `layer` shall see them.
    pub(super) fn inject(&self, layer: usize, hidden: Tensor) -> Result<Tensor, ModelError> {
        match self.layers.get(layer) {
            Some(context) if context.values.size()[0] > 0 => {
                let at = [Some(&context.rows), Some(&context.positions)];
                Ok(hidden.f_index_put(&at, &context.values.f_to_kind(hidden.kind())?, false)?)
            }
            _ => Ok(hidden),
        }
    }
}

/// Additive mask of a whole sequence, in f32: `[1, 1, seq, seq]` causal, or `[batch, 1, seq, seq]` where pairs are blocked.
pub(super) fn causal_mask(
    batch: i64,
    seq: i64,
    blocked: &[(i64, i64, i64)],
    device: Device,
) -> Result<Tensor, ModelError> {
    let mask = Tensor::f_full([seq, seq], f64::NEG_INFINITY, (Kind::Float, Device::Cpu))?.f_triu(1)?;
    let mask = mask.f_view([1, 1, seq, seq])?;
    if blocked.is_empty() {
        return Ok(mask.f_to_device(device)?);
    }
    let mut mask = mask.f_repeat([batch, 1, 1, 1])?;
    let column = |pick: fn(&(i64, i64, i64)) -> i64| {
        // Both directions of every pair.
        let forth = blocked.iter().map(pick);
        forth.collect::<Vec<_>>()
    };
    let (rows, ones, others) = (column(|b| b.0), column(|b| b.1), column(|b| b.2));
    for (queries, keys) in [(&ones, &others), (&others, &ones)] {
        let zero = Tensor::f_zeros([rows.len() as i64], (Kind::Int64, Device::Cpu))?;
        let at = [
            Some(Tensor::f_from_slice(&rows)?),
            Some(zero),
            Some(Tensor::f_from_slice(queries)?),
            Some(Tensor::f_from_slice(keys)?),
        ];
        let _ = mask.f_index_put_(&at, &Tensor::f_from_slice(&[f32::NEG_INFINITY])?, false)?;
    }
    Ok(mask.f_to_device(device)?)
}

/// Additive mask for queries that see keys `0..=position`: `positions` `[rows, queries]` gives `[rows, 1, queries, length]`.
pub(super) fn decode_mask(positions: &Tensor, length: i64) -> Result<Tensor, ModelError> {
    let (rows, queries) = positions.size2()?;
    let keys = Tensor::f_arange(length, (Kind::Int64, positions.device()))?.f_view([1, 1, 1, length])?;
    let hidden = keys.f_gt_tensor(&positions.f_view([rows, 1, queries, 1])?)?;
    Ok(
        Tensor::f_zeros([rows, 1, queries, length], (Kind::Float, positions.device()))?
            .f_masked_fill(&hidden, f64::NEG_INFINITY)?,
    )
}
