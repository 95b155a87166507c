//! Attention with per-head norms of queries and keys, rotary embedding and grouped key/value heads.

use tch::{Device, Kind, Tensor};

use super::accelerator::{self, Ranges};
use super::kv_cache::KvCache;
use super::layers::{HeadNorm, Heads, linear};
use super::rope::rotate;
use super::weights::TensorSource;
use super::{ModelConfig, ModelError};

#[derive(Debug)]
pub(super) struct Attention {
    /// Query, key and value projections, stacked: `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    project: Tensor,
    output: Tensor,
    /// Over query and key heads.
    norm: HeadNorm,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttentionKernel {
    /// Explicit products and softmax: on the CPU faster than libtorch's fused kernel, especially in the backward
    /// pass.
    Explicit,
    /// libtorch's fused kernel; a decode step reads all rows up to the longest row's length and masks the rest.
    Fused,
    /// Like `Fused`, but a decode step reads each row up to its own length. Only without grouped heads.
    FusedByLength,
}

/// The keys that queries see.
#[derive(Debug)]
pub(super) enum Visible {
    /// Keys up to the query's own position: whole sequences with no other mask. Fused kernels only.
    Causal,
    /// Additive mask, broadcastable to `[batch, heads, seq, keys]`: in f32 for the explicit kernel, in the computing
    /// kind for a fused one.
    Masked(Tensor),
    /// Each cached row up to its own length.
    Lengths(Ranges),
}

/// What every layer's attention shares in one forward pass.
pub(super) struct Shared<'a> {
    /// Rotary tables at the tokens' positions, `[.., seq, 1, head_dim]`.
    pub cos: Tensor,
    pub sin: Tensor,
    pub kernel: AttentionKernel,
    pub visible: Visible,
    pub step: Step<'a>,
}

/// Where keys and values are stored.
pub(super) enum Step<'a> {
    /// Nowhere: training and teacher-forced scoring.
    Plain,
    /// The whole prefix is written to these rows of the cache.
    Prefill { cache: &'a mut KvCache, rows: &'a [i64] },
    /// One token or several per sequence, `[tokens, 1]`.
    Decode {
        cache: &'a mut KvCache,
        tokens: &'a StepTokens,
    },
}

/// The tokens of one decode step, flattened: at least one for every sequence. All tensors are i64 on the model's
/// device.
#[derive(Debug)]
pub(super) struct StepTokens {
    /// Number of sequences.
    pub sequences: i64,
    /// Cached tokens per row that dense attention reads.
    pub length: i64,
    /// `[tokens]`: cache row and position of each.
    pub slot: Tensor,
    pub position: Tensor,
    /// `[sequences, queries]`: position of each query. A sequence with fewer tokens than others repeats one of its
    /// positions.
    pub seen: Tensor,
    /// Present if tokens are not in the order of `seen`: the mapping to `[sequences, queries]` and back.
    pub pairs: Option<Pairs>,
    /// `i32`, for attention by row lengths: `[sequences + 1]` each, see [`Ranges`].
    pub starts: Option<Starts>,
}

/// See [`StepTokens::starts`].
#[derive(Debug)]
pub(super) struct Starts {
    pub queries: Tensor,
    pub keys: Tensor,
}

impl Starts {
    /// Shallow copies of the same tensors.
    pub(super) fn share(&self) -> Self {
        Self {
            queries: self.queries.shallow_clone(),
            keys: self.keys.shallow_clone(),
        }
    }
}

/// See [`StepTokens::pairs`].
#[derive(Debug)]
pub(super) struct Pairs {
    /// `[sequences * queries]`: index of the token of each query.
    pub query: Tensor,
    /// `[tokens]`: index of each token's output in `sequences * queries`.
    pub answer: Tensor,
}

/// The memory-efficient kernel supports head sizes that are a multiple of this in every kind: 16 bytes in the narrow
/// ones. All published models have one.
const HEAD_STEP: i64 = 8;

/// A larger relative error (to the largest value) is not a rounding error.
const LARGEST_DIFFERENCE: f64 = 0.02;

/// Selects the kernel for a model of that shape on `device`. On CUDA, attention by row lengths is first compared
/// with the dense form on random numbers, and disabled with a warning if it fails or differs.
/// `COAR_DECODE_ATTENTION=dense` disables it as well.
pub(super) fn choose_kernel(config: &ModelConfig, kind: Kind, device: Device) -> AttentionKernel {
    if !matches!(device, Device::Cuda(_)) {
        return match device {
            Device::Cpu => AttentionKernel::Explicit,
            _ => AttentionKernel::Fused,
        };
    }
    let dense_wanted = std::env::var("COAR_DECODE_ATTENTION").is_ok_and(|choice| choice == "dense");
    let grouped = config.num_attention_heads != config.num_key_value_heads;
    if dense_wanted || grouped || config.head_dim() % HEAD_STEP != 0 {
        return AttentionKernel::Fused;
    }
    match tch::no_grad(|| difference_by_length(config, kind, device)) {
        Ok(difference) if difference <= LARGEST_DIFFERENCE => {
            tracing::debug!(difference, "decode attention reads each row to its own length");
            AttentionKernel::FusedByLength
        }
        Ok(difference) => {
            tracing::warn!(
                difference,
                "attention by row lengths differs from the dense form: disabled"
            );
            AttentionKernel::Fused
        }
        Err(error) => {
            tracing::warn!(%error, "attention by row lengths is not available: using the dense form");
            AttentionKernel::Fused
        }
    }
}

/// Largest difference between both forms of a decode step's attention, relative to the largest value: three rows of
/// different lengths, out of order in the cache, with one query and with two.
fn difference_by_length(config: &ModelConfig, kind: Kind, device: Device) -> Result<f64, ModelError> {
    let (heads, head_dim) = (config.num_attention_heads, config.head_dim());
    let (slots, lengths, max_seq) = ([2i64, 0, 3], [5i64, 40, 17], 64);
    let random = |shape: [i64; 4]| Tensor::f_randn(shape, (Kind::Float, device))?.f_to_kind(kind);
    let (keys, values) = (
        random([4, heads, max_seq, head_dim])?,
        random([4, heads, max_seq, head_dim])?,
    );
    let scale = 1.0 / (head_dim as f64).sqrt();
    let upload = |numbers: &[i64]| accelerator::upload(numbers, device);
    let rows = upload(&slots)?;
    let mut largest: f64 = 0.0;
    for queries in [1i64, 2] {
        let query = random([3, heads, queries, head_dim])?;
        let seen: Vec<i64> = lengths
            .iter()
            .flat_map(|length| (0..queries).map(move |query| length - queries + query))
            .collect();
        let mask = super::context::decode_mask(&upload(&seen)?.f_view([3, queries])?, max_seq, kind)?;
        let pick = |of: &Tensor| of.f_index_select(0, &rows);
        let dense = fused(&query, (&pick(&keys)?, &pick(&values)?), Some(&mask), false, scale)?;
        let starts = |step: &dyn Fn(usize) -> i64| -> Result<Tensor, ModelError> {
            let numbers: Vec<i64> = (0..4).map(step).collect();
            Ok(upload(&numbers)?.f_to_kind(Kind::Int)?)
        };
        let ranges = Ranges {
            query_starts: starts(&|sequence| sequence as i64 * queries)?,
            key_starts: starts(&|sequence| slots.get(sequence).map_or(0, |slot| slot * heads * max_seq))?,
            key_lengths: upload(&lengths)?.f_to_kind(Kind::Int)?,
            most_queries: queries,
            most_keys: max_seq,
        };
        let flat = query.f_transpose(1, 2)?.f_reshape([1, 3 * queries, heads, head_dim])?;
        let by_length = accelerator::attend_lengths(
            &flat,
            (&super::kv_cache::by_token(&keys)?, &super::kv_cache::by_token(&values)?),
            &ranges,
            scale,
        )?
        .f_view([3, queries, heads, head_dim])?
        .f_transpose(1, 2)?;
        let wide = dense.f_to_kind(Kind::Double)?;
        let off = by_length.f_to_kind(Kind::Double)?.f_sub(&wide)?.f_abs()?.f_max()?;
        let off = off.f_double_value(&[])? / wide.f_abs()?.f_max()?.f_double_value(&[])?;
        // f64::max would drop a NaN.
        largest = if off.is_nan() { f64::INFINITY } else { largest.max(off) };
    }
    Ok(largest)
}

/// libtorch's fused attention: `query` `[batch, heads, seq, head_dim]`, `key` and `value` `[batch, heads, keys,
/// head_dim]`, `mask` `[batch or 1, 1, seq, keys]` in the query's kind. On CUDA this calls the memory-efficient
/// kernel directly: the generic entry prefers cuDNN's on recent cards, which builds a plan for every new shape, and
/// the number of keys changes all the time. The generic entry is used for head sizes that the memory-efficient
/// kernel does not support.
fn fused(
    query: &Tensor,
    (key, value): (&Tensor, &Tensor),
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> Result<Tensor, ModelError> {
    if !matches!(query.device(), Device::Cuda(_)) || query.size()[3] % HEAD_STEP != 0 {
        return Ok(Tensor::f_scaled_dot_product_attention(
            query, key, value, mask, 0.0, causal, scale, false,
        )?);
    }
    let (batch, heads, seq, _) = query.size4()?;
    let mask = mask
        .map(|mask| mask.f_expand([batch, heads, seq, key.size()[2]], false))
        .transpose()?;
    let backward = query.requires_grad() || key.requires_grad() || value.requires_grad();
    let (mixed, ..) = Tensor::f_internal_scaled_dot_product_efficient_attention(
        query, key, value, mask, backward, 0.0, causal, scale,
    )?;
    Ok(mixed)
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
        let rotated = rotate(&normed, &shared.cos, &shared.sin)?.f_to_kind(all.kind())?;
        let part = |of: &Tensor, from: i64, count: i64| of.f_narrow(2, from, count)?.f_transpose(1, 2);
        let query = part(&rotated, 0, heads)?;
        let key = part(&rotated, heads, kv_heads)?;
        let value = part(&all, heads + kv_heads, kv_heads)?;
        let (kernel, visible) = (shared.kernel, &shared.visible);
        let mixed = match &mut shared.step {
            Step::Plain => self
                .attend(&query, &key, &value, (kernel, visible))?
                .f_transpose(1, 2)?,
            Step::Prefill { cache, rows } => {
                cache.write_prefix(layer, rows, &key, &value)?;
                self.attend(&query, &key, &value, (kernel, visible))?
                    .f_transpose(1, 2)?
            }
            Step::Decode { cache, tokens } => {
                cache.append(layer, tokens, &key, &value)?;
                self.attend_cached(&query, layer, cache, tokens, (kernel, visible))?
            }
        };
        linear(&mixed.f_reshape([batch, seq, heads * self.head_dim])?, &self.output)
    }

    /// One decode step: `query` `[tokens, heads, 1, head_dim]`, returns `[tokens, 1, heads, head_dim]`.
    fn attend_cached(
        &self,
        query: &Tensor,
        layer: usize,
        cache: &KvCache,
        tokens: &StepTokens,
        (kernel, visible): (AttentionKernel, &Visible),
    ) -> Result<Tensor, ModelError> {
        let (heads, head_dim, sequences) = (self.heads, self.head_dim, tokens.sequences);
        // [queries, 1, heads, head_dim], the queries of a sequence adjacent.
        let flat = match &tokens.pairs {
            None => query.f_transpose(1, 2)?,
            Some(pairs) => query.f_index_select(0, &pairs.query)?.f_transpose(1, 2)?,
        };
        let mixed = match visible {
            Visible::Lengths(ranges) => {
                let scale = 1.0 / (head_dim as f64).sqrt();
                let (keys, values) = cache.by_token(layer);
                accelerator::attend_lengths(&flat.f_transpose(0, 1)?, (keys, values), ranges, scale)?
                    .f_transpose(0, 1)?
            }
            _ => {
                let queries = flat.size()[0] / sequences;
                let grouped = flat
                    .f_reshape([sequences, queries, heads, head_dim])?
                    .f_transpose(1, 2)?;
                let (keys, values) = cache.first(layer, sequences, tokens.length)?;
                self.attend(&grouped, &keys, &values, (kernel, visible))?
                    .f_transpose(1, 2)?
                    .f_reshape([sequences * queries, 1, heads, head_dim])?
            }
        };
        match &tokens.pairs {
            None => Ok(mixed),
            Some(pairs) => Ok(mixed.f_index_select(0, &pairs.answer)?),
        }
    }

    /// `query` `[batch, heads, seq, head_dim]`, `key` and `value` `[batch, kv_heads, keys, head_dim]`; returns the
    /// query's shape.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        (kernel, visible): (AttentionKernel, &Visible),
    ) -> Result<Tensor, ModelError> {
        let (batch, seq, keys) = (query.size()[0], query.size()[2], key.size()[2]);
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let group = self.heads / self.kv_heads;
        let mask = match visible {
            Visible::Masked(mask) => Some(mask),
            Visible::Causal => None,
            Visible::Lengths(_) => return Err(ModelError::invalid("attention", "has lengths but no cache")),
        };
        if kernel != AttentionKernel::Explicit {
            // The memory-efficient kernel does not support grouped heads.
            let repeat = |of: &Tensor| match group {
                1 => Ok(of.shallow_clone()),
                _ => of.f_repeat_interleave_self_int(group, 1, None),
            };
            return fused(query, (&repeat(key)?, &repeat(value)?), mask, mask.is_none(), scale);
        }
        let Some(mask) = mask else {
            return Err(ModelError::invalid("attention", "has no mask for the explicit kernel"));
        };
        // The heads of a group are adjacent, so a group is one matrix and keys are never repeated.
        let grouped = query
            .f_mul_scalar(scale)?
            .f_reshape([batch, self.kv_heads, group * seq, self.head_dim])?;
        let scores = grouped
            .f_matmul(&key.f_transpose(2, 3)?)?
            .f_view([batch, self.heads, seq, keys])?
            .f_add(mask)?;
        let weights = scores.f_softmax(-1, Kind::Float)?.f_to_kind(value.kind())?;
        let mixed = weights
            .f_view([batch, self.kv_heads, group * seq, keys])?
            .f_matmul(value)?;
        Ok(mixed.f_view([batch, self.heads, seq, self.head_dim])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_by_row_lengths_equals_the_dense_form() {
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "model_type": "chameleon", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3,
        }))
        .unwrap();
        let difference = difference_by_length(&config, Kind::Float, Device::Cpu).unwrap();
        assert!(difference < 1e-5, "{difference}");
    }
}
