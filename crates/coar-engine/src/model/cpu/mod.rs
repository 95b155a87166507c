//! Decode steps on the CPU, without libtorch: a step of few tokens is bound by reading the weights once, and
//! libtorch's small operations and its matrix product for few rows take several times as long.
//!
//! All sums of a token are taken in a fixed order, independent of the rest of the batch: products over the whole inner
//! dimension in one fixed tree, attention over the token's own keys. An image's codes therefore do not depend on other
//! images in the batch, bit for bit.

#[cfg(target_arch = "x86_64")]
mod attention;
#[cfg(target_arch = "x86_64")]
mod numbers;
mod pool;
#[cfg(target_arch = "x86_64")]
mod product;
#[cfg(target_arch = "x86_64")]
mod step;

pub use pool::without_pool;

pub(super) use pool::for_each;
#[cfg(target_arch = "x86_64")]
pub(super) use product::linear;
#[cfg(target_arch = "x86_64")]
pub(super) use step::{CpuDecoder, Workspace};

/// Stubs for machines without a native implementation: libtorch computes everything.
#[cfg(not(target_arch = "x86_64"))]
mod fallback;
#[cfg(not(target_arch = "x86_64"))]
pub(super) use fallback::{CpuDecoder, Workspace, linear};

use tch::Tensor;

/// The parameters of one decoder layer.
pub(super) struct LayerTensors<'a> {
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: query, key and value projections.
    pub project: &'a Tensor,
    /// `[hidden, heads * head_dim]`
    pub output: &'a Tensor,
    /// `[2 * inner, hidden]`: gate, then up.
    pub gate_up: &'a Tensor,
    /// `[hidden, inner]`
    pub down: &'a Tensor,
    /// `[hidden]`
    pub input_norm: &'a Tensor,
    pub post_attention_norm: &'a Tensor,
    /// Weight and bias of the norms of query and key heads, `(heads + kv_heads) * head_dim` numbers each.
    pub head_norm: (&'a Tensor, &'a Tensor),
}

/// The tokens of one step.
#[derive(Debug)]
pub(super) struct StepTokens<'a> {
    pub ids: &'a [i64],
    /// Row of the cache and position of each.
    pub rows: &'a [i64],
    pub positions: &'a [i64],
    /// Tokens whose final hidden states are needed.
    pub wanted: &'a [i64],
}

/// Whether this CPU has bf16 instructions. If so, steps on bf16 weights are faster than on f32 ones; otherwise they
/// are slower.
pub fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        <half::bf16 as numbers::Stored>::supported()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
