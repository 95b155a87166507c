//! The linear map of a decode step on the CPU. For a few tokens it is bound by reading the weights once, and libtorch's
//! matrix product reads them at a quarter of the memory's speed; this one streams them. Every token's sums are taken in
//! the same order however many tokens there are, so that a picture does not depend on who shares its batch.

use tch::{Kind, Tensor};

use super::ModelError;

/// Above this many tokens libtorch's product is used: prompts of many tokens and trainings.
const MOST_TOKENS: i64 = 160;

/// `x @ weight^T` where this machine and these tensors allow it: `x` `[.., k]`, `weight` `[n, k]` in f32 or bf16, no
/// gradient wanted. Sums are taken in f32; the answer has the weight's kind.
///
/// # Errors
/// When memory is short.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>, ModelError> {
    #[cfg(target_arch = "x86_64")]
    {
        stream::linear(x, weight)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (x, weight, MOST_TOKENS, Kind::Float);
        Ok(None)
    }
}

#[cfg(target_arch = "x86_64")]
mod stream {
    use std::arch::x86_64::*;
    use std::ffi::{c_int, c_uint, c_void};
    use std::sync::OnceLock;

    use super::{Kind, MOST_TOKENS, ModelError, Tensor};

    /// Numbers that one register holds.
    const LANES: usize = 16;
    /// Rows of the weight that one thread takes at a time.
    const BLOCK: usize = 8;

    type Region = extern "C" fn(*mut c_void);

    /// The thread pool that libtorch itself uses (OpenMP), so that two pools do not fight for the same cores.
    struct Pool {
        parallel: unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint),
        thread: unsafe extern "C" fn() -> c_int,
        threads: unsafe extern "C" fn() -> c_int,
    }

    fn pool() -> Option<&'static Pool> {
        static POOL: OnceLock<Option<Pool>> = OnceLock::new();
        POOL.get_or_init(|| {
            if !std::is_x86_feature_detected!("avx512f") {
                return None;
            }
            let process = libloading::os::unix::Library::this();
            // SAFETY: the three functions have had these signatures since OpenMP 4 and are there where libtorch's own
            // parallel loops are.
            let pool = unsafe {
                Pool {
                    parallel: *process.get(b"GOMP_parallel\0").ok()?,
                    thread: *process.get(b"omp_get_thread_num\0").ok()?,
                    threads: *process.get(b"omp_get_num_threads\0").ok()?,
                }
            };
            // It is part of the process for good.
            std::mem::forget(process);
            Some(pool)
        })
        .as_ref()
    }

    /// A number as it is stored.
    trait Stored: Copy {
        /// Sixteen of them in f32.
        ///
        /// # Safety
        /// `at` points to sixteen readable numbers, and the machine has AVX-512F.
        unsafe fn load(at: *const Self) -> __m512;
    }

    impl Stored for f32 {
        #[inline(always)]
        unsafe fn load(at: *const Self) -> __m512 {
            unsafe { _mm512_loadu_ps(at) }
        }
    }

    impl Stored for half::bf16 {
        #[inline(always)]
        unsafe fn load(at: *const Self) -> __m512 {
            unsafe {
                let narrow = _mm256_loadu_si256(at.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
            }
        }
    }

    struct Product<W> {
        /// `[m, k]`
        x: *const f32,
        /// `[n, k]`
        weight: *const W,
        /// `[m, n]`
        out: *mut f32,
        m: usize,
        n: usize,
        k: usize,
    }

    impl<W: Stored> Product<W> {
        /// `N` rows of the weight from `row` with `M` tokens from `token`.
        #[target_feature(enable = "avx512f")]
        unsafe fn tile<const N: usize, const M: usize>(&self, row: usize, token: usize) {
            let mut sums = [[_mm512_setzero_ps(); M]; N];
            // SAFETY: `row + N <= n`, `token + M <= m`, and k is a multiple of the lanes.
            unsafe {
                let (weight, x) = (self.weight.add(row * self.k), self.x.add(token * self.k));
                // Plain loops with constant bounds: iterators are not always inlined into functions for another target.
                let mut at = 0;
                while at < self.k {
                    let mut own = [_mm512_setzero_ps(); M];
                    let mut j = 0;
                    while j < M {
                        own[j] = _mm512_loadu_ps(x.add(j * self.k + at));
                        j += 1;
                    }
                    let mut i = 0;
                    while i < N {
                        let numbers = W::load(weight.add(i * self.k + at));
                        let mut j = 0;
                        while j < M {
                            sums[i][j] = _mm512_fmadd_ps(numbers, own[j], sums[i][j]);
                            j += 1;
                        }
                        i += 1;
                    }
                    at += LANES;
                }
                let mut i = 0;
                while i < N {
                    let mut j = 0;
                    while j < M {
                        *self.out.add((token + j) * self.n + row + i) = _mm512_reduce_add_ps(sums[i][j]);
                        j += 1;
                    }
                    i += 1;
                }
            }
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn rows<const N: usize>(&self, row: usize) {
            let mut token = 0;
            while token < self.m {
                // SAFETY: as in `tile`.
                unsafe {
                    match self.m - token {
                        1 => self.tile::<N, 1>(row, token),
                        2 => self.tile::<N, 2>(row, token),
                        3 => self.tile::<N, 3>(row, token),
                        _ => self.tile::<N, 4>(row, token),
                    }
                }
                token += 4;
            }
        }

        /// The share of one thread.
        #[target_feature(enable = "avx512f")]
        unsafe fn share(&self, thread: usize, threads: usize) {
            let each = self.n.div_ceil(BLOCK).div_ceil(threads) * BLOCK;
            let (mut row, end) = ((each * thread).min(self.n), (each * (thread + 1)).min(self.n));
            // Few tokens leave registers for more rows of the weight at once.
            let wide = self.m <= 2;
            while row < end {
                // SAFETY: `row` and what is added to it stay below `end`.
                unsafe {
                    match end - row {
                        8.. if wide => {
                            self.rows::<8>(row);
                            row += 8;
                        }
                        4.. => {
                            self.rows::<4>(row);
                            row += 4;
                        }
                        _ => {
                            self.rows::<1>(row);
                            row += 1;
                        }
                    }
                }
            }
        }

        extern "C" fn region(own: *mut c_void) {
            let Some(pool) = pool() else { return };
            // SAFETY: `own` is the product that `run` holds until the region has ended; every thread writes other
            // columns of `out`. The pool is there only where AVX-512F is.
            unsafe {
                let own = &*own.cast::<Self>();
                own.share((pool.thread)() as usize, (pool.threads)().max(1) as usize);
            }
        }

        fn run(mut self, pool: &Pool, threads: c_uint) {
            // SAFETY: the region ends before `parallel` returns.
            unsafe { (pool.parallel)(Self::region, (&raw mut self).cast(), threads, 0) };
        }
    }

    pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>, ModelError> {
        let (n, k) = weight.size2()?;
        let (mut shape, kind) = (x.size(), weight.kind());
        let tokens = x.numel() as i64 / k.max(1);
        let on_cpu = x.device() == tch::Device::Cpu && weight.device() == tch::Device::Cpu;
        let fits = tokens <= MOST_TOKENS && k > 0 && k % LANES as i64 == 0 && weight.is_contiguous();
        let stored = matches!(kind, Kind::Float | Kind::BFloat16);
        if !on_cpu || !fits || !stored || tokens == 0 || x.requires_grad() || weight.requires_grad() {
            return Ok(None);
        }
        let Some(pool) = pool() else { return Ok(None) };
        let x = x.f_to_kind(Kind::Float)?.f_contiguous()?;
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        let out = Tensor::f_empty(&*shape, (Kind::Float, tch::Device::Cpu))?;
        let threads = tch::get_num_threads().max(1) as c_uint;
        let (m, n, k) = (tokens as usize, n as usize, k as usize);
        let (x_at, out_at) = (x.data_ptr() as *const f32, out.data_ptr() as *mut f32);
        match kind {
            Kind::Float => Product::<f32> {
                x: x_at,
                weight: weight.data_ptr() as *const f32,
                out: out_at,
                m,
                n,
                k,
            }
            .run(pool, threads),
            _ => Product::<half::bf16> {
                x: x_at,
                weight: weight.data_ptr() as *const half::bf16,
                out: out_at,
                m,
                n,
                k,
            }
            .run(pool, threads),
        }
        Ok(Some(out.f_to_kind(kind)?))
    }
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
    fn it_is_the_product_and_a_token_does_not_know_its_neighbours() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (n, k) in [(1, 16), (37, 48), (64, 384), (129, 1024)] {
                let weight = Tensor::randn([n, k], (Kind::Float, Device::Cpu)).to_kind(kind);
                let x = Tensor::randn([70, k], (Kind::Float, Device::Cpu)).to_kind(kind);
                let Some(all) = linear(&x, &weight).unwrap() else {
                    // No AVX-512 here: libtorch does it.
                    return;
                };
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
                        .unwrap();
                    assert_eq!(few.size(), [count, 1, n]);
                    assert!(few.squeeze_dim(1).equal(&all.narrow(0, first, count)));
                }
            }
        }
    }

    #[test]
    fn what_it_cannot_do_is_left_to_libtorch() {
        let weight = Tensor::randn([8, 32], (Kind::Float, Device::Cpu));
        let many = Tensor::randn([MOST_TOKENS + 1, 32], (Kind::Float, Device::Cpu));
        assert!(linear(&many, &weight).unwrap().is_none());
        let learnt = Tensor::randn([1, 32], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!(linear(&learnt, &weight).unwrap().is_none());
        let odd = Tensor::randn([1, 30], (Kind::Float, Device::Cpu));
        assert!(linear(&odd, &weight.narrow(1, 0, 30)).unwrap().is_none());
    }
}
