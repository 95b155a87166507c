//! Key/value cache of static shape: allocated once, written in place.

use tch::{Device, Kind, Tensor};

use super::{ModelConfig, ModelError};

/// Keys and values of every layer, each `[rows, kv_heads, max_seq, head_dim]`.
///
/// A row's tokens begin at index 0. Prefill writes `0..seq` of every row (rows that are shorter hold values there that
/// decoding overwrites before any query may see them); decoding writes one index per row.
#[derive(Debug)]
pub struct KvCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    max_seq: i64,
    rows: i64,
}

impl KvCache {
    /// Allocates the cache for `rows` sequences of at most `max_seq` tokens.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn new(config: &ModelConfig, rows: i64, max_seq: i64, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let shape = [rows, config.num_key_value_heads, max_seq, config.head_dim()];
        let allocate = || -> Result<Vec<Tensor>, ModelError> {
            (0..config.num_hidden_layers)
                .map(|_| Ok(Tensor::f_zeros(shape, (kind, device))?))
                .collect()
        };
        Ok(Self {
            keys: allocate()?,
            values: allocate()?,
            max_seq,
            rows,
        })
    }

    fn kind(&self) -> Kind {
        self.keys[0].kind()
    }

    /// Rows.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// The longest sequence that fits.
    pub fn max_seq(&self) -> i64 {
        self.max_seq
    }

    /// Writes the first `seq` tokens of every row; `keys`, `values` are `[rows, kv_heads, seq, head_dim]`.
    pub(super) fn write_prefix(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(), ModelError> {
        let seq = keys.size()[2];
        self.keys[layer].f_narrow(2, 0, seq)?.f_copy_(keys)?;
        self.values[layer].f_narrow(2, 0, seq)?.f_copy_(values)?;
        Ok(())
    }

    /// Writes one token per row at `positions` `[rows]`; `keys`, `values` are `[rows, kv_heads, 1, head_dim]`.
    /// Returns the first `length` tokens of every row.
    pub(super) fn append(
        &mut self,
        layer: usize,
        positions: &Tensor,
        length: i64,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor), ModelError> {
        let size = keys.size();
        let at = positions.f_view([size[0], 1, 1, 1])?.f_expand(&*size, false)?;
        let (keys, values) = (keys.f_to_kind(self.kind())?, values.f_to_kind(self.kind())?);
        let _ = self.keys[layer].f_scatter_(2, &at, &keys)?;
        let _ = self.values[layer].f_scatter_(2, &at, &values)?;
        Ok((
            self.keys[layer].f_narrow(2, 0, length)?,
            self.values[layer].f_narrow(2, 0, length)?,
        ))
    }
}
