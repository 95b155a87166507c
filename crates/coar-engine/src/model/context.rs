//! Rows to inject at given positions of a sequence, layer by layer, and the identity mask.
//!
//! This is the only place where the transformer deals with concepts.

use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::accelerator::upload;

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

/// All changes that concepts make to one forward pass.
#[derive(Debug, Default)]
pub struct ContextBatch {
    /// Entry i holds the replacements at the input of decoder layer i; later layers are unchanged.
    pub layers: Vec<LayerContext>,
    /// Identity mask: `(row, one, other)`; queries at position `one` do not see keys at `other`, nor vice versa.
    pub blocked: Vec<(i64, i64, i64)>,
}

impl ContextBatch {
    /// Returns the hidden states `[batch, seq, hidden]` for layer `layer`, with replacements applied.
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

/// Rows of a mask are aligned to multiples of this many numbers, as the memory-efficient kernel requires.
const MASK_STRIDE: i64 = 16;

/// Additive mask of a whole sequence in `kind`: `[1, 1, seq, seq]` causal, or `[batch, 1, seq, seq]` if pairs are
/// blocked.
pub(super) fn causal_mask(
    batch: i64,
    seq: i64,
    blocked: &[(i64, i64, i64)],
    (kind, device): (Kind, Device),
) -> Result<Tensor, ModelError> {
    let stride = (seq + MASK_STRIDE - 1) / MASK_STRIDE * MASK_STRIDE;
    let mask = Tensor::f_full([seq, stride], f64::NEG_INFINITY, (kind, device))?
        .f_triu(1)?
        .f_view([1, 1, seq, stride])?;
    if blocked.is_empty() {
        return Ok(mask.f_narrow(3, 0, seq)?);
    }
    let mask = mask.f_repeat([batch, 1, 1, 1])?;
    // Both directions of every pair, as indices into the flat mask: one upload for all.
    let at = |row: i64, query: i64, key: i64| (row * seq + query) * stride + key;
    let cells: Vec<i64> = blocked
        .iter()
        .flat_map(|&(row, one, other)| [at(row, one, other), at(row, other, one)])
        .collect();
    let _ = mask
        .f_view([-1])?
        .f_index_fill_(0, &upload(&cells, device)?, f64::NEG_INFINITY)?;
    Ok(mask.f_narrow(3, 0, seq)?)
}

/// Additive mask in `kind` for queries that see keys `0..=position`: `positions` `[rows, queries]` gives
/// `[rows, 1, queries, length]`.
pub(super) fn decode_mask(positions: &Tensor, length: i64, kind: Kind) -> Result<Tensor, ModelError> {
    let (rows, queries) = positions.size2()?;
    let device = positions.device();
    let keys = Tensor::f_arange(length, (Kind::Int64, device))?.f_view([1, 1, 1, length])?;
    let hidden = keys.f_gt_tensor(&positions.f_view([rows, 1, queries, 1])?)?;
    Ok(Tensor::f_zeros([rows, 1, queries, length], (kind, device))?.f_masked_fill(&hidden, f64::NEG_INFINITY)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_pairs_are_hidden_both_ways_in_their_row_only() {
        let mask = causal_mask(2, 5, &[(1, 3, 1)], (Kind::Float, Device::Cpu)).unwrap();
        assert_eq!((mask.size(), mask.stride()[2]), (vec![2, 1, 5, 5], 16));
        for row in 0..2 {
            for query in 0..5 {
                for key in 0..5 {
                    let blocked = row == 1 && (query, key) == (3, 1);
                    let value = mask.double_value(&[row, 0, query, key]);
                    let expected = if key > query || blocked { f64::NEG_INFINITY } else { 0.0 };
                    assert_eq!(value, expected, "{row} {query} {key}");
                }
            }
        }
    }

    #[test]
    fn a_decode_mask_ends_at_each_querys_position() {
        let positions = Tensor::from_slice(&[0i64, 1, 3, 3]).view([2, 2]);
        let mask = decode_mask(&positions, 4, Kind::Float).unwrap();
        let seen: Vec<i64> = Vec::try_from(
            mask.eq(0.0)
                .sum_dim_intlist([3i64].as_slice(), false, Kind::Int64)
                .view(-1),
        )
        .unwrap();
        assert_eq!(seen, [1, 2, 4, 4]);
    }
}
