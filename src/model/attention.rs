//! Attention with per-head norms of queries and keys, rotary positions and grouped key/value heads.

use tch::{Device, Kind, Tensor};

use super::kv_cache::KvCache;
use super::layers::{HeadNorm, Heads, linear};
use super::rope::rotate;
use super::weights::TensorSource;
use super::{ModelConfig, ModelError};

#[derive(Debug)]
pub(super) struct Attention {
    /// Query, key and value projections, one below the other: `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    project: Tensor,
    output: Tensor,
    /// Over query and key heads.
    norm: HeadNorm,
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
    /// The whole prefix is written to the cache, to these rows.
    Prefill { cache: &'a mut KvCache, rows: &'a [i64] },
    /// One token per sequence `[tokens, 1]`, or two for rows that get a forced one as well.
    Decode {
        cache: &'a mut KvCache,
        tokens: &'a StepTokens,
    },
}

/// The tokens of one decode step, flat: one for every row of the cache in use, and further ones for some.
#[derive(Debug)]
pub(super) struct StepTokens {
    /// Rows in use, from the first.
    pub rows: i64,
    /// Cached tokens that attention reads.
    pub length: i64,
    /// `[tokens]`: cache row and position of each.
    pub row: Tensor,
    pub position: Tensor,
    /// Where some rows have two tokens: how queries are laid out as `[rows, 2]` and back.
    pub pairs: Option<Pairs>,
}

/// See [`StepTokens::pairs`].
#[derive(Debug)]
pub(super) struct Pairs {
    /// `[rows * 2]`: which token is the row's first and second query; the first again where there is no second.
    pub query: Tensor,
    /// `[tokens]`: where each token's answer stands among `rows * 2`.
    pub answer: Tensor,
}

impl Attention {
    pub(super) fn load(source: &dyn TensorSource, name: &str, config: &ModelConfig) -> Result<Self, ModelError> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let projection = |which: &str, shape: [i64; 2]| source.tensor(&format!("{name}.{which}_proj.weight"), &shape);
        let parts = [
            projection("q", [heads * head_dim, hidden])?,
            projection("k", [kv_heads * head_dim, hidden])?,
            projection("v", [kv_heads * head_dim, hidden])?,
        ];
        let normed = [
            Heads {
                name: "q_norm",
                count: heads,
            },
            Heads {
                name: "k_norm",
                count: kv_heads,
            },
        ];
        Ok(Self {
            project: Tensor::f_cat(&parts, 0)?,
            output: projection("o", [hidden, heads * head_dim])?,
            norm: HeadNorm::load(source, name, &normed, head_dim, config.model_parallel_size)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// Query, key and value projections in one, and the output projection.
    pub(super) fn matrices(&self) -> (&Tensor, &Tensor) {
        (&self.project, &self.output)
    }

    /// Weight and bias of the norms over query and key heads.
    pub(super) fn head_norm(&self) -> (&Tensor, &Tensor) {
        self.norm.parameters()
    }

    /// `[batch, seq, hidden]` to the same shape.
    pub(super) fn forward(&self, x: &Tensor, layer: usize, shared: &mut Shared) -> Result<Tensor, ModelError> {
        let (batch, seq) = (x.size()[0], x.size()[1]);
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let all = linear(x, &self.project)?.f_view([batch, seq, heads + 2 * kv_heads, self.head_dim])?;
        let normed = self.norm.forward(&all.f_narrow(2, 0, heads + kv_heads)?)?;
        let turned = rotate(&normed, &shared.cos, &shared.sin)?.f_to_kind(all.kind())?;
        let part = |of: &Tensor, from: i64, count: i64| of.f_narrow(2, from, count)?.f_transpose(1, 2);
        let query = part(&turned, 0, heads)?;
        let key = part(&turned, heads, kv_heads)?;
        let value = part(&all, heads + kv_heads, kv_heads)?;
        let mask = shared.mask.as_ref();
        let mixed = match &mut shared.step {
            Step::Plain => self.attend(&query, &key, &value, mask)?.f_transpose(1, 2)?,
            Step::Prefill { cache, rows } => {
                cache.write_prefix(layer, rows, &key, &value)?;
                self.attend(&query, &key, &value, mask)?.f_transpose(1, 2)?
            }
            Step::Decode { cache, tokens } => {
                let (keys, values) = cache.append(layer, tokens, &key, &value)?;
                match &tokens.pairs {
                    None => self.attend(&query, &keys, &values, mask)?.f_transpose(1, 2)?,
                    Some(pairs) => {
                        let paired = query
                            .f_index_select(0, &pairs.query)?
                            .f_view([tokens.rows, 2, heads, self.head_dim])?
                            .f_transpose(1, 2)?;
                        self.attend(&paired, &keys, &values, mask)?
                            .f_transpose(1, 2)?
                            .f_reshape([tokens.rows * 2, 1, heads, self.head_dim])?
                            .f_index_select(0, &pairs.answer)?
                    }
                }
            }
        };
        linear(&mixed.f_reshape([batch, seq, heads * self.head_dim])?, &self.output)
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
