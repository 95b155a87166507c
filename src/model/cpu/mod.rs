//! Decode steps on the CPU, without libtorch: a step of few tokens is bound by reading the weights once, and libtorch's
//! small operations and its matrix product for few rows take several times as long as that.
//!
//! Every sum of a token is taken in the same order whoever else is in the batch: in the products over the whole inner
//! dimension in one fixed tree, in attention over the token's own keys. So a picture does not depend on its neighbours,
//! bit for bit.

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
pub(super) use step::{CpuDecoder, LayerTensors, StepTokens, Workspace};

/// Stand-ins for machines whose instructions nothing here is written for: libtorch does everything there.
#[cfg(not(target_arch = "x86_64"))]
mod elsewhere;
#[cfg(not(target_arch = "x86_64"))]
pub(super) use elsewhere::{CpuDecoder, LayerTensors, StepTokens, Workspace, linear};

/// Whether this CPU multiplies bf16 numbers itself. Where it does, steps on bf16 weights are faster than on f32 ones;
/// elsewhere they are slower.
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
