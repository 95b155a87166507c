//! Storage formats of numbers, and operations on registers of them (AVX-512).

use std::arch::x86_64::*;

use tch::Kind;

use super::pool::Member;
use super::product::Product;
use super::step::Step;

/// f32 numbers per register.
pub(super) const WIDE: usize = 16;

/// A number format of weights, keys and values.
pub(super) trait Stored: Copy + Send + Sync + 'static {
    const KIND: Kind;
    /// Numbers per register.
    const LANES: usize;
    type Register: Copy;

    /// # Safety
    /// `at` points to a register's worth of readable numbers, and the machine satisfies [`Self::supported`].
    unsafe fn load(at: *const Self) -> Self::Register;

    /// `sum + a * b`, lane by lane; neighbouring products are summed if a lane holds two.
    ///
    /// # Safety
    /// As [`Self::load`].
    unsafe fn multiply_add(sum: __m512, a: Self::Register, b: Self::Register) -> __m512;

    /// 16 numbers as f32.
    ///
    /// # Safety
    /// `at` points to 16 readable numbers; otherwise as [`Self::load`].
    unsafe fn widen(at: *const Self) -> __m512;

    /// Rounds 16 numbers and stores them.
    ///
    /// # Safety
    /// `at` points to 16 writable numbers; otherwise as [`Self::load`].
    unsafe fn narrow(at: *mut Self, numbers: __m512);

    /// Whether this machine has the instructions.
    fn supported() -> bool;

    /// One thread's share of a product, compiled for those instructions.
    ///
    /// # Safety
    /// The machine supports them, and the product's pointers are valid.
    unsafe fn product(product: &Product<Self>, member: Member);

    /// One thread's share of a decode step, compiled for those instructions.
    ///
    /// # Safety
    /// The machine supports them, and the step's pointers are valid.
    unsafe fn step(step: &Step<Self>, member: Member);
}

fn has_wide() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
}

impl Stored for f32 {
    const KIND: Kind = Kind::Float;
    const LANES: usize = WIDE;
    type Register = __m512;

    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: the caller promises that many numbers at `at`, and the features.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller promises the features.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn widen(at: *const Self) -> __m512 {
        // SAFETY: the caller promises that many numbers at `at`, and the features.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn narrow(at: *mut Self, numbers: __m512) {
        // SAFETY: the caller promises room for that many numbers at `at`, and the features.
        unsafe { _mm512_storeu_ps(at, numbers) }
    }

    fn supported() -> bool {
        has_wide()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn product(product: &Product<Self>, member: Member) {
        // SAFETY: as this function's contract, and its target features are those of the intrinsics.
        unsafe { product.share(member) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn step(step: &Step<Self>, member: Member) {
        // SAFETY: as this function's contract, and its target features are those of the intrinsics.
        unsafe { step.share(member) }
    }
}

impl Stored for half::bf16 {
    const KIND: Kind = Kind::BFloat16;
    const LANES: usize = 2 * WIDE;
    type Register = __m512bh;

    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512bh {
        // SAFETY: both are 512 bits without an interpretation.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: the caller promises the features.
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }

    #[inline(always)]
    unsafe fn widen(at: *const Self) -> __m512 {
        // SAFETY: the caller promises that many numbers at `at`, and the features.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }

    #[inline(always)]
    unsafe fn narrow(at: *mut Self, numbers: __m512) {
        // SAFETY: the caller promises room for that many numbers at `at`, and the features.
        unsafe {
            // SAFETY: both are 256 bits without an interpretation.
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
            _mm256_storeu_si256(at.cast(), halves);
        }
    }

    fn supported() -> bool {
        has_wide() && std::is_x86_feature_detected!("avx512bf16")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn product(product: &Product<Self>, member: Member) {
        // SAFETY: as this function's contract, and its target features are those of the intrinsics.
        unsafe { product.share(member) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn step(step: &Step<Self>, member: Member) {
        // SAFETY: as this function's contract, and its target features are those of the intrinsics.
        unsafe { step.share(member) }
    }
}

/// Lane i of the result is the sum of register i's lanes, for all sixteen at once. Each register is summed in the
/// same tree, halves first, independent of its index.
///
/// # Safety
/// The machine has AVX-512F and DQ.
#[inline(always)]
pub(super) unsafe fn sums(v: &[__m512; WIDE]) -> __m512 {
    // SAFETY: register arithmetic only.
    unsafe {
        // Combines two registers into one with the folded halves of both; four rounds.
        let mut eight = [_mm512_setzero_ps(); 8];
        let mut i = 0;
        while i < 8 {
            // Halves of 256 bits: register i low, register i + 8 high.
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(v[i], v[i + 8]);
            let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(v[i], v[i + 8]);
            eight[i] = _mm512_add_ps(low, high);
            i += 1;
        }
        let mut four = [_mm512_setzero_ps(); 4];
        let mut i = 0;
        while i < 4 {
            // Quarters: a0 a1 | b0 b1 with a from register i, b from i + 4.
            let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(eight[i], eight[i + 4]);
            let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(eight[i], eight[i + 4]);
            four[i] = _mm512_add_ps(low, high);
            i += 1;
        }
        // Every 128-bit lane is now one register's four partial sums: i, i + 8, i + 4, i + 12 from the lowest lane up.
        let mut two = [_mm512_setzero_ps(); 2];
        let mut i = 0;
        while i < 2 {
            let low = _mm512_shuffle_ps::<0b01_00_01_00>(four[i], four[i + 2]);
            let high = _mm512_shuffle_ps::<0b11_10_11_10>(four[i], four[i + 2]);
            two[i] = _mm512_add_ps(low, high);
            i += 1;
        }
        let low = _mm512_shuffle_ps::<0b10_00_10_00>(two[0], two[1]);
        let high = _mm512_shuffle_ps::<0b11_01_11_01>(two[0], two[1]);
        let one = _mm512_add_ps(low, high);
        // In each 128-bit lane: registers 0, 2, 1, 3 beyond the lane's own; lanes are 0, 8, 4, 12.
        let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        _mm512_permutexvar_ps(order, one)
    }
}

/// e to the power of each lane, to about two units in the last place; below -87 it is 0 or a subnormal number.
///
/// # Safety
/// The machine has AVX-512F.
#[inline(always)]
pub(super) unsafe fn exp(x: __m512) -> __m512 {
    // SAFETY: register arithmetic only.
    unsafe {
        // If one operand is NaN the second is returned: a NaN in x is kept.
        let x = _mm512_max_ps(_mm512_set1_ps(-104.0), _mm512_min_ps(_mm512_set1_ps(88.0), x));
        let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so the product with n is exact.
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r);
        // The series of (e^r - 1 - r) / r^2, least squares over |r| <= ln 2 / 2.
        let mut p = _mm512_set1_ps(1.987_569_1e-4);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.398_2e-3));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.333_452e-3));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.166_579_5e-2));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.666_666_5e-1));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5));
        let e = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
        _mm512_scalef_ps(e, n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_exponentials_are_correct() {
        if !<f32 as Stored>::supported() {
            println!("skipped: this machine has no AVX-512");
            return;
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn run() -> ([f32; 16], Vec<(f32, f32)>) {
            let (mut out, mut powers) = ([0.0f32; 16], vec![]);
            // SAFETY: the features are enabled, and every array has sixteen numbers.
            unsafe {
                let mut v = [_mm512_setzero_ps(); 16];
                for (i, register) in v.iter_mut().enumerate() {
                    // Register i holds i * 100 + lane: its sum is 1600 i + 120.
                    let lanes: Vec<f32> = (0..16).map(|lane| (i * 100 + lane) as f32).collect();
                    *register = _mm512_loadu_ps(lanes.as_ptr());
                }
                _mm512_storeu_ps(out.as_mut_ptr(), sums(&v));
                for step in -1000..=100 {
                    let x = step as f32 * 0.087;
                    let mut lanes = [0.0f32; 16];
                    _mm512_storeu_ps(lanes.as_mut_ptr(), exp(_mm512_set1_ps(x)));
                    powers.push((x, lanes[3]));
                }
            }
            (out, powers)
        }
        // SAFETY: supported, see above.
        let (out, powers) = unsafe { run() };
        for (i, sum) in out.iter().enumerate() {
            assert_eq!(*sum, (1600 * i + 120) as f32, "{out:?}");
        }
        for (x, found) in powers {
            let exact = f64::from(x).exp();
            let error = (f64::from(found) - exact).abs() / exact;
            assert!(error < 3e-7, "e^{x}: {found}, {exact}");
        }
    }
}
