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

    /// How numbers are stored, and how one register of them is used.
    trait Stored: Copy {
        const KIND: Kind;
        /// Numbers that one register holds.
        const LANES: usize;
        type Register: Copy;

        /// # Safety
        /// `at` points to a register's worth of readable numbers, and the machine has what [`supported`] asks for.
        unsafe fn load(at: *const Self) -> Self::Register;

        /// `sum + a * b`, lane by lane; neighbouring products are summed where a lane holds two.
        ///
        /// # Safety
        /// As [`Self::load`].
        unsafe fn multiply_add(sum: __m512, a: Self::Register, b: Self::Register) -> __m512;

        /// Whether this machine has the instructions.
        fn supported() -> bool;

        /// One thread's share, compiled for those instructions.
        ///
        /// # Safety
        /// As [`Self::load`].
        unsafe fn share(product: &Product<Self>, thread: usize, threads: usize);
    }

    impl Stored for f32 {
        const KIND: Kind = Kind::Float;
        const LANES: usize = 16;
        type Register = __m512;

        #[inline(always)]
        unsafe fn load(at: *const Self) -> __m512 {
            unsafe { _mm512_loadu_ps(at) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sum: __m512, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, sum) }
        }

        fn supported() -> bool {
            std::is_x86_feature_detected!("avx512f")
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn share(product: &Product<Self>, thread: usize, threads: usize) {
            unsafe { product.share(thread, threads) }
        }
    }

    impl Stored for half::bf16 {
        const KIND: Kind = Kind::BFloat16;
        const LANES: usize = 32;
        type Register = __m512bh;

        #[inline(always)]
        unsafe fn load(at: *const Self) -> __m512bh {
            // SAFETY: both are 512 bits without a meaning of their own.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sum: __m512, a: __m512bh, b: __m512bh) -> __m512 {
            unsafe { _mm512_dpbf16_ps(sum, a, b) }
        }

        fn supported() -> bool {
            std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bf16")
        }

        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn share(product: &Product<Self>, thread: usize, threads: usize) {
            unsafe { product.share(thread, threads) }
        }
    }

    struct Product<W> {
        /// `[m, k]`
        x: *const W,
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
        #[inline(always)]
        unsafe fn tile<const N: usize, const M: usize>(&self, row: usize, token: usize) {
            // SAFETY: the caller has AVX-512F.
            let mut sums = [[unsafe { _mm512_setzero_ps() }; M]; N];
            // SAFETY: `row + N <= n`, `token + M <= m`, and k is a multiple of the lanes.
            unsafe {
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
                            sums[i][j] = W::multiply_add(sums[i][j], numbers, own[j]);
                            j += 1;
                        }
                        i += 1;
                    }
                    at += W::LANES;
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

        #[inline(always)]
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
        #[inline(always)]
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
            // columns of `out`. A product is made only where it is supported.
            unsafe {
                let own = &*own.cast::<Self>();
                W::share(own, (pool.thread)() as usize, (pool.threads)().max(1) as usize);
            }
        }

        fn run(mut self, pool: &Pool, threads: c_uint) {
            // SAFETY: the region ends before `parallel` returns.
            unsafe { (pool.parallel)(Self::region, (&raw mut self).cast(), threads, 0) };
        }
    }

    pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>, ModelError> {
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
        let fits = (1..=MOST_TOKENS).contains(&tokens) && k % W::LANES as i64 == 0 && weight.is_contiguous();
        if !on_cpu || !fits || x.requires_grad() || weight.requires_grad() || !W::supported() {
            return Ok(None);
        }
        let Some(pool) = pool() else { return Ok(None) };
        let mut shape = x.size();
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        let x = x.f_to_kind(W::KIND)?.f_contiguous()?;
        let out = Tensor::f_empty(&*shape, (Kind::Float, tch::Device::Cpu))?;
        let product = Product {
            x: x.data_ptr() as *const W,
            weight: weight.data_ptr() as *const W,
            out: out.data_ptr() as *mut f32,
            m: tokens as usize,
            n: n as usize,
            k: k as usize,
        };
        product.run(pool, tch::get_num_threads().max(1) as c_uint);
        Ok(Some(out.f_to_kind(W::KIND)?))
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
