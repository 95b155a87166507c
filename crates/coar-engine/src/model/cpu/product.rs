//! The linear map of few tokens. It is bound by reading the weights once; libtorch's matrix product reads them at a
//! quarter of the memory bandwidth, this one streams them.

use std::arch::x86_64::*;

use tch::{Kind, Tensor};

use super::numbers::{Stored, WIDE, sums};
use super::pool::{Member, team, threads};
use crate::model::ModelError;

/// Above this number of tokens libtorch's product is used, as in trainings.
const MAX_TOKENS: i64 = 160;
/// Rows of the weight that one thread takes at a time.
pub(super) const BLOCK: usize = 8;

/// A weight and the tokens that it is applied to.
#[derive(Clone, Copy)]
pub(super) struct Operands<W> {
    /// `[tokens, k]`
    pub x: *const W,
    /// `[.., k]`
    pub weight: *const W,
    pub tokens: usize,
    pub k: usize,
}

/// Receives the results of a product: `N` adjacent rows' sums of one token.
pub(super) trait Sink {
    /// # Safety
    /// The sink has capacity for that token and these rows.
    unsafe fn put<const N: usize>(&self, token: usize, row: usize, sums: &[f32; N]);
}

impl<W: Stored> Operands<W> {
    /// Multiplies `N` rows of the weight from `row` with `M` tokens from `token`; at most sixteen sums.
    #[inline(always)]
    unsafe fn tile<const N: usize, const M: usize, S: Sink>(&self, row: usize, token: usize, sink: &S) {
        // SAFETY: the caller has AVX-512F; `row + N` and `token + M` are in bounds, and k is a multiple of the
        // lanes.
        unsafe {
            let mut partial = [_mm512_setzero_ps(); WIDE];
            let (weight, x) = (self.weight.add(row * self.k), self.x.add(token * self.k));
            // Plain loops with constant bounds: iterators are not always inlined into functions for another target.
            let mut at = 0;
            while at < self.k {
                let mut own = [W::load(x.add(at)); M];
                let mut j = 1;
                while j < M {
                    own[j] = W::load(x.add(j * self.k + at));
                    j += 1;
                }
                let mut i = 0;
                while i < N {
                    let numbers = W::load(weight.add(i * self.k + at));
                    let mut j = 0;
                    while j < M {
                        partial[j * N + i] = W::multiply_add(partial[j * N + i], numbers, own[j]);
                        j += 1;
                    }
                    i += 1;
                }
                at += W::LANES;
            }
            let mut all = [0.0f32; WIDE];
            _mm512_storeu_ps(all.as_mut_ptr(), sums(&partial));
            let mut j = 0;
            while j < M {
                sink.put::<N>(token + j, row, &*all.as_ptr().add(j * N).cast::<[f32; N]>());
                j += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<const N: usize, S: Sink>(&self, row: usize, sink: &S) {
        let mut token = 0;
        while token < self.tokens {
            // SAFETY: as in `tile`.
            unsafe {
                match self.tokens - token {
                    1 => self.tile::<N, 1, S>(row, token, sink),
                    2 => self.tile::<N, 2, S>(row, token, sink),
                    3 => self.tile::<N, 3, S>(row, token, sink),
                    _ => self.tile::<N, 4, S>(row, token, sink),
                }
            }
            token += 4;
        }
    }

    /// Multiplies rows `from..to` of the weight with every token.
    ///
    /// # Safety
    /// The machine supports `W`, the pointers are valid, and `sink` has capacity.
    #[inline(always)]
    pub unsafe fn run<S: Sink>(&self, from: usize, to: usize, sink: &S) {
        let mut row = from;
        // SAFETY: `row` and what is added to it stay below `to`.
        unsafe {
            if self.tokens <= 2 {
                // With few tokens there are registers for more rows of the weight at once.
                while to - row >= 8 {
                    match self.tokens {
                        1 => self.tile::<8, 1, S>(row, 0, sink),
                        _ => self.tile::<8, 2, S>(row, 0, sink),
                    }
                    row += 8;
                }
            }
            while to - row >= 4 {
                self.rows::<4, S>(row, sink);
                row += 4;
            }
            while row < to {
                self.rows::<1, S>(row, sink);
                row += 1;
            }
        }
    }
}

/// A whole product, `[tokens, n]` in f32.
pub(super) struct Product<W> {
    pub operands: Operands<W>,
    pub n: usize,
    pub out: *mut f32,
}

// SAFETY: threads read the same operands and write disjoint columns of `out`.
unsafe impl<W> Sync for Product<W> {}

/// Stores sums as they are.
pub(super) struct Store {
    /// `[.., n]`
    pub out: *mut f32,
    pub n: usize,
}

impl Sink for Store {
    #[inline(always)]
    unsafe fn put<const N: usize>(&self, token: usize, row: usize, sums: &[f32; N]) {
        // SAFETY: the caller promises that token and row, and N numbers from there on, are inside of `out`.
        unsafe { *self.out.add(token * self.n + row).cast::<[f32; N]>() = *sums }
    }
}

impl<W: Stored> Product<W> {
    /// # Safety
    /// As [`Operands::run`].
    #[inline(always)]
    pub unsafe fn share(&self, member: Member) {
        let (from, to) = member.part(self.n, BLOCK);
        let sink = Store {
            out: self.out,
            n: self.n,
        };
        // SAFETY: as documented.
        unsafe { self.operands.run(from, to, &sink) }
    }
}

/// `x @ weight^T` if this machine and these tensors support it: `x` `[.., k]`, `weight` `[n, k]` in f32 or bf16,
/// without gradients. Sums are taken in f32; the result has the weight's kind.
///
/// # Errors
/// When memory is short.
pub(in crate::model) fn linear(x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>, ModelError> {
    match weight.kind() {
        Kind::Float => product::<f32>(x, weight),
        Kind::BFloat16 => product::<half::bf16>(x, weight),
        _ => Ok(None),
    }
}

fn product<W: Stored>(x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>, ModelError> {
    let (n, k) = weight.size2()?;
    let tokens = x.numel() as i64 / k.max(1);
    let on_cpu = x.device() == tch::Device::Cpu && weight.device() == tch::Device::Cpu;
    let fits = (1..=MAX_TOKENS).contains(&tokens) && k % W::LANES as i64 == 0 && weight.is_contiguous();
    if !on_cpu || !fits || x.requires_grad() || weight.requires_grad() || !W::supported() {
        return Ok(None);
    }
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let x = x.f_to_kind(W::KIND)?.f_contiguous()?;
    let out = Tensor::f_empty(&*shape, (Kind::Float, tch::Device::Cpu))?;
    let product = Product {
        operands: Operands {
            x: x.data_ptr() as *const W,
            weight: weight.data_ptr() as *const W,
            tokens: tokens as usize,
            k: k as usize,
        },
        n: n as usize,
        out: out.data_ptr() as *mut f32,
    };
    // SAFETY: supported; the tensors live to the end of the call and have the sizes given.
    team(threads(), |member| unsafe { W::product(&product, member) });
    Ok(Some(out.f_to_kind(W::KIND)?))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
            .abs()
            .max()
            .double_value(&[])
    }

    #[test]
    fn product_is_correct_and_independent_of_the_batch() {
        for (kind, supported) in [
            (Kind::Float, f32::supported()),
            (Kind::BFloat16, half::bf16::supported()),
        ] {
            if !supported {
                println!("skipped in {kind:?}: this machine has no such instructions, libtorch does the products");
                continue;
            }
            for (n, k) in [(1, 32), (37, 96), (64, 384), (129, 1024)] {
                let weight = Tensor::randn([n, k], (Kind::Float, Device::Cpu)).to_kind(kind);
                let x = Tensor::randn([70, k], (Kind::Float, Device::Cpu)).to_kind(kind);
                let all = linear(&x, &weight).unwrap().expect("it is supported");
                let exact = x.to_kind(Kind::Double).matmul(&weight.to_kind(Kind::Double).tr());
                let tolerance = if kind == Kind::Float { 2e-4 } else { 0.6 };
                assert!(
                    difference(&all, &exact) < tolerance,
                    "{n} {k} {}",
                    difference(&all, &exact)
                );
                for (first, count) in [(0, 1), (3, 2), (5, 3), (0, 17)] {
                    let few = linear(&x.narrow(0, first, count).unsqueeze(1), &weight)
                        .unwrap()
                        .expect("it is supported");
                    assert_eq!(few.size(), [count, 1, n]);
                    assert!(few.squeeze_dim(1).equal(&all.narrow(0, first, count)));
                }
            }
        }
    }

    #[test]
    fn unsupported_products_are_left_to_libtorch() {
        let weight = Tensor::randn([8, 32], (Kind::Float, Device::Cpu));
        let many = Tensor::randn([MAX_TOKENS + 1, 32], (Kind::Float, Device::Cpu));
        assert!(linear(&many, &weight).unwrap().is_none());
        let learnt = Tensor::randn([1, 32], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!(linear(&learnt, &weight).unwrap().is_none());
        let odd = Tensor::randn([1, 30], (Kind::Float, Device::Cpu));
        assert!(linear(&odd, &weight.narrow(1, 0, 30)).unwrap().is_none());
    }
}
