//! Attention with per-head norms of queries and keys, rotary positions and grouped key/value heads.

use tch::{Device, Kind, Tensor};

use super::kv_cache::KvCache;
use super::layers::{HeadNorm, linear};
use super::rope::rotate;
use super::weights::TensorSource;
use super::{ModelConfig, ModelError};

#[derive(Debug)]
pub(super) struct Attention {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_norm: HeadNorm,
    key_norm: HeadNorm,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

/// What every layer's attention shares in one forward pass.
pub(super) struct Shared<'a> {
    /// Rotary tables at the tokens' positions, `[.., seq, 1, head_dim]`.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Additive mask in f32, broadcastable to `[batch, heads, seq, keys]`.
    pub mask: Option<Tensor>,
    pub step: Step<'a>,
}

/// Where keys and values go.
pub(super) enum Step<'a> {
    /// Nothing is kept: training and teacher-forced scoring.
    Plain,
    /// The whole prefix is written to the cache.
    Prefill(&'a mut KvCache),
    /// One token per row, at `positions` `[rows]`; attention reads the first `length` cached tokens.
    Decode {
        cache: &'a mut KvCache,
        positions: &'a Tensor,
        length: i64,
    },
}

impl Attention {
    pub(super) fn load(source: &dyn TensorSource, name: &str, config: &ModelConfig) -> Result<Self, ModelError> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let projection = |which: &str, shape: [i64; 2]| source.tensor(&format!("{name}.{which}_proj.weight"), &shape);
        let rows = config.model_parallel_size;
        Ok(Self {
            query: projection("q", [heads * head_dim, hidden])?,
            key: projection("k", [kv_heads * head_dim, hidden])?,
            value: projection("v", [kv_heads * head_dim, hidden])?,
            output: projection("o", [hidden, heads * head_dim])?,
            query_norm: HeadNorm::load(source, &format!("{name}.q_norm"), heads, head_dim, rows)?,
            key_norm: HeadNorm::load(source, &format!("{name}.k_norm"), kv_heads, head_dim, rows)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// `[batch, seq, hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor, layer: usize, shared: &mut Shared) -> Result<Tensor, ModelError> {
        let (batch, seq) = (x.size()[0], x.size()[1]);
        let split = |y: Tensor, heads: i64| y.f_view([batch, seq, heads, self.head_dim]);
        let query = self.query_norm.forward(&split(linear(x, &self.query)?, self.heads)?)?;
        let key = self.key_norm.forward(&split(linear(x, &self.key)?, self.kv_heads)?)?;
        let value = split(linear(x, &self.value)?, self.kv_heads)?.f_transpose(1, 2)?;
        let kind = value.kind();
        let query = rotate(&query, &shared.cos, &shared.sin)?
            .f_to_kind(kind)?
            .f_transpose(1, 2)?;
        let key = rotate(&key, &shared.cos, &shared.sin)?
            .f_to_kind(kind)?
            .f_transpose(1, 2)?;
        let (key, value) = match &mut shared.step {
            Step::Plain => (key, value),
            Step::Prefill(cache) => {
                cache.write_prefix(layer, &key, &value)?;
                (key, value)
            }
            Step::Decode {
                cache,
                positions,
                length,
            } => cache.append(layer, positions, *length, &key, &value)?,
        };
        let mixed = self.attend(&query, &key, &value, shared.mask.as_ref())?;
        linear(
            &mixed
                .f_transpose(1, 2)?
                .f_reshape([batch, seq, self.heads * self.head_dim])?,
            &self.output,
        )
    }

    /// `query` `[batch, heads, seq, head_dim]`, `key` and `value` `[batch, kv_heads, keys, head_dim]`; returns the
    /// query's shape. The heads of a group stand side by side, so a group is one matrix and keys are never repeated.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        let (batch, seq, keys) = (query.size()[0], query.size()[2], key.size()[2]);
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        if query.device() != Device::Cpu {
            let mask = mask.map(|mask| mask.f_to_kind(query.kind())).transpose()?;
            let grouped = self.heads != self.kv_heads;
            return Ok(Tensor::f_scaled_dot_product_attention(
                query, key, value, mask, 0.0, false, scale, grouped,
            )?);
        }
        // On the CPU the explicit form is faster than the fused one, in its backward pass most of all.
        let group = self.heads / self.kv_heads;
        let grouped = query
            .f_mul_scalar(scale)?
            .f_reshape([batch, self.kv_heads, group * seq, self.head_dim])?;
        let scores = grouped
            .f_matmul(&key.f_transpose(2, 3)?)?
            .f_view([batch, self.heads, seq, keys])?;
        let scores = match mask {
            Some(mask) => scores.f_add(mask)?,
            None => scores,
        };
        let weights = scores.f_softmax(-1, Kind::Float)?.f_to_kind(value.kind())?;
        let mixed = weights
            .f_view([batch, self.kv_heads, group * seq, keys])?
            .f_matmul(value)?;
        Ok(mixed.f_view([batch, self.heads, seq, self.head_dim])?)
    }
}
