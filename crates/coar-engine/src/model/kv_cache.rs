//! KV cache of static shape: allocated once, written in place.

use tch::{Device, Kind, Tensor};

use super::attention::StepTokens;
use super::{ModelConfig, ModelError};

/// Keys and values of every layer, each `[rows, kv_heads, max_seq, head_dim]`.
///
/// A row's tokens start at index 0. Prefill writes `0..seq` of every row (shorter rows contain values there that
/// decoding overwrites before any query can see them); decoding writes one index per row.
#[derive(Debug)]
pub struct KvCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    /// The same memory, see [`by_token`].
    flat: Vec<(Tensor, Tensor)>,
    max_seq: i64,
    rows: i64,
}

/// Attention reads whole blocks of the cache, so the order of the sums over keys does not depend on the longest row in
/// the batch.
const KEY_BLOCK: i64 = 16;

/// Rounds up to a multiple of a block.
pub(super) fn whole_blocks(length: i64) -> i64 {
    (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK
}

impl KvCache {
    /// Allocates the cache for `rows` sequences of at most `max_seq` tokens, rounded up to whole blocks.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn new(config: &ModelConfig, rows: i64, max_seq: i64, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let max_seq = whole_blocks(max_seq);
        let shape = [rows, config.num_key_value_heads, max_seq, config.head_dim()];
        let allocate = || -> Result<Vec<Tensor>, ModelError> {
            (0..config.num_hidden_layers)
                .map(|_| Ok(Tensor::f_zeros(shape, (kind, device))?))
                .collect()
        };
        let (keys, values) = (allocate()?, allocate()?);
        let flat = keys.iter().zip(&values);
        Ok(Self {
            flat: flat
                .map(|(keys, values)| Ok((by_token(keys)?, by_token(values)?)))
                .collect::<Result<_, ModelError>>()?,
            keys,
            values,
            max_seq,
            rows,
        })
    }

    /// Number of rows.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// The longest sequence that fits.
    pub fn max_seq(&self) -> i64 {
        self.max_seq
    }

    /// Bytes of one row of `max_seq` tokens.
    pub fn row_bytes(config: &ModelConfig, max_seq: i64, kind: Kind) -> u64 {
        let max_seq = whole_blocks(max_seq);
        let numbers = 2 * config.num_hidden_layers as i64 * config.num_key_value_heads * max_seq * config.head_dim();
        numbers as u64 * kind.elt_size_in_bytes() as u64
    }

    /// Writes the first `seq` tokens of the given rows; `keys`, `values` are `[rows, kv_heads, seq, head_dim]`.
    pub(super) fn write_prefix(
        &mut self,
        layer: usize,
        rows: &[i64],
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(), ModelError> {
        let seq = keys.size()[2];
        for (block, new) in [(&self.keys[layer], keys), (&self.values[layer], values)] {
            for (from, &row) in (0..).zip(rows) {
                block.f_get(row)?.f_narrow(1, 0, seq)?.f_copy_(&new.f_get(from)?)?;
            }
        }
        Ok(())
    }

    /// Address of each layer's keys and values, each `[rows, kv_heads, max_seq, head_dim]` contiguous.
    pub(super) fn pointers(&mut self) -> Vec<(*mut u8, *mut u8)> {
        let at = |block: &Tensor| block.data_ptr().cast::<u8>();
        self.keys
            .iter()
            .zip(&self.values)
            .map(|(k, v)| (at(k), at(v)))
            .collect()
    }

    /// Zeroes the first `tokens` of a row. Masked positions still take part in the sums, with weight 0, so they must
    /// be finite.
    ///
    /// # Errors
    /// When the device fails.
    pub fn wipe(&mut self, row: i64, tokens: i64) -> Result<(), ModelError> {
        for block in self.keys.iter().chain(&self.values) {
            let _ = block.f_get(row)?.f_narrow(1, 0, tokens.min(self.max_seq))?.f_zero_()?;
        }
        Ok(())
    }

    /// Zeroes everything.
    ///
    /// # Errors
    /// When the device fails.
    pub fn wipe_all(&mut self) -> Result<(), ModelError> {
        for block in self.keys.iter_mut().chain(&mut self.values) {
            let _ = block.f_zero_()?;
        }
        Ok(())
    }

    /// Copies the first `length` tokens of row `from` to row `to`.
    pub(super) fn copy_row(&mut self, from: i64, to: i64, length: i64) -> Result<(), ModelError> {
        for block in self.keys.iter().chain(&self.values) {
            let row = |index: i64| block.f_get(index)?.f_narrow(1, 0, length);
            row(to)?.f_copy_(&row(from)?)?;
        }
        Ok(())
    }

    /// Writes the tokens of one step; `keys`, `values` are `[tokens, kv_heads, 1, head_dim]`.
    pub(super) fn append(
        &mut self,
        layer: usize,
        tokens: &StepTokens,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(), ModelError> {
        let at = [Some(&tokens.slot), None, Some(&tokens.position)];
        for (block, new) in [(&mut self.keys[layer], keys), (&mut self.values[layer], values)] {
            let _ = block.f_index_put_(&at, &new.f_squeeze_dim(2)?.f_to_kind(block.kind())?, false)?;
        }
        Ok(())
    }

    /// Keys and values of the first `rows` rows and `length` tokens, `[rows, kv_heads, length, head_dim]` each.
    pub(super) fn first(&self, layer: usize, rows: i64, length: i64) -> Result<(Tensor, Tensor), ModelError> {
        let part = |block: &Tensor| block.f_narrow(0, 0, rows)?.f_narrow(2, 0, length);
        Ok((part(&self.keys[layer])?, part(&self.values[layer])?))
    }

    /// Keys and values as sequences of tokens, see [`by_token`].
    pub(super) fn by_token(&self, layer: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.flat[layer];
        (keys, values)
    }

    /// The index in [`Self::by_token`] at which row `slot` starts.
    pub(super) fn start_of(&self, slot: i64) -> i64 {
        slot * self.keys.first().map_or(0, |block| block.stride()[0] / block.size()[3])
    }
}

/// A block `[rows, kv_heads, max_seq, head_dim]` viewed as `[1, tokens, kv_heads, head_dim]`: token t of row r is at
/// `r * kv_heads * max_seq + t`, for all heads. The view overlaps itself and is read-only.
pub(super) fn by_token(block: &Tensor) -> Result<Tensor, ModelError> {
    let (rows, heads, max_seq, head_dim) = block.size4()?;
    let tokens = if rows == 0 {
        0
    } else {
        (rows - 1) * heads * max_seq + max_seq
    };
    Ok(block.f_as_strided(
        [1, tokens, heads, head_dim],
        [tokens * head_dim, head_dim, max_seq * head_dim, 1],
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_token_views_the_same_memory() {
        let block = Tensor::arange(2 * 3 * 4 * 5, (Kind::Float, Device::Cpu)).view([2, 3, 4, 5]);
        let flat = by_token(&block).unwrap();
        assert_eq!(flat.size(), [1, 3 * 4 + 4, 3, 5]);
        for (row, head, token) in [(0, 0, 0), (0, 2, 3), (1, 0, 0), (1, 1, 2), (1, 2, 3)] {
            let seen = flat.get(0).get(row * 12 + token).get(head);
            assert_eq!(seen, block.get(row).get(head).get(token), "{row} {head} {token}");
        }
        assert_eq!(flat.data_ptr(), block.data_ptr());
    }
}
