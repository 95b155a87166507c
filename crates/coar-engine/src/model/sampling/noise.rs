//! The noise of sampling, a counter-based function: SplitMix64 started at a key, at the code's index.
//!
//! Integer operations that wrap, two logarithms: the same on the host and by tensor operations on any device.

use tch::{Kind, Tensor};

use crate::model::ModelError;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;
/// Bits of a uniform number. With one more, the largest number would be rounded to 1.
const BITS: u32 = 52;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(FIRST);
    x = (x ^ (x >> 27)).wrapping_mul(SECOND);
    x ^ (x >> 31)
}

/// The key of the noise at one position of an image's sequence of codes and row ends.
pub fn noise_key(seed: u64, image: u64, position: u64) -> u64 {
    let step = |x: u64| mix(x.wrapping_add(GAMMA));
    step(step(step(seed) ^ image.wrapping_mul(0xd1b5_4a32_d192_ed03)) ^ position)
}

/// The noise of one code, not yet in its final form: a uniform number `(steps + 1/2) / 2^52`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noise {
    steps: u64,
}

impl Noise {
    #[inline(always)]
    pub fn of(key: u64, code: u64) -> Self {
        let at = key.wrapping_add(code.wrapping_add(1).wrapping_mul(GAMMA));
        Self {
            steps: mix(at) >> (64 - BITS),
        }
    }

    /// Gumbel noise: `-ln(-ln(u))`.
    pub fn gumbel(self) -> f64 {
        let uniform = (self.steps as f64 + 0.5) / (1u64 << BITS) as f64;
        -(-uniform.ln()).ln()
    }

    /// An upper bound of [`Self::gumbel`] without a logarithm: -ln(u) is more than 1 - u, which is more than a power of
    /// two.
    #[inline(always)]
    pub fn bound(self) -> f64 {
        // (1 - u) * 2^52 is `rest` plus 1/2.
        let rest = (1u64 << BITS) - 1 - self.steps;
        let zeros = rest.leading_zeros() - (64 - BITS);
        // Slightly larger, so that the bound holds despite rounded logarithms.
        const LN_2: f64 = std::f64::consts::LN_2 * (1.0 + 1e-9);
        f64::from(zeros + 1) * LN_2
    }
}

/// The part of the noise that depends on the code only, `[codes]` i64.
///
/// # Errors
/// When the device fails.
pub(super) fn offsets(codes: i64, device: tch::Device) -> Result<Tensor, ModelError> {
    Ok(Tensor::f_arange_start(1, codes + 1, (Kind::Int64, device))?.f_mul_scalar(GAMMA.cast_signed())?)
}

/// Gumbel noise `[rows, codes]` f64 of `keys` `[rows]` i64, with [`offsets`].
///
/// # Errors
/// When the device fails.
pub(super) fn gumbel(keys: &Tensor, offsets: &Tensor) -> Result<Tensor, ModelError> {
    // An arithmetic shift copies the sign bit: it is masked out.
    let shifted = |x: &Tensor, by: i64| -> Result<Tensor, ModelError> {
        Ok(x.f_bitwise_right_shift_tensor_scalar(by)?
            .f_bitwise_and_(i64::MAX >> (by - 1))?)
    };
    let folded = |x: &Tensor, by: i64| shifted(x, by)?.f_bitwise_xor_tensor_(x).map_err(ModelError::from);
    let x = keys.f_view([-1, 1])?.f_add(offsets)?;
    let x = folded(&x, 30)?.f_mul_scalar_(FIRST.cast_signed())?;
    let x = folded(&x, 27)?.f_mul_scalar_(SECOND.cast_signed())?;
    let steps = shifted(&folded(&x, 31)?, 64 - i64::from(BITS))?;
    let uniform = steps
        .f_to_kind(Kind::Double)?
        .f_add_scalar_(0.5)?
        .f_div_scalar_((1u64 << BITS) as f64)?;
    Ok(uniform.f_log()?.f_neg_()?.f_log_()?.f_neg_()?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn tensors_and_the_host_compute_the_same_noise() {
        let keys: Vec<u64> = (0..50).map(|at| noise_key(u64::MAX - at, at, 7 * at)).collect();
        let signed: Vec<i64> = keys.iter().map(|key| key.cast_signed()).collect();
        let offsets = offsets(300, Device::Cpu).unwrap();
        let tensors = gumbel(&Tensor::from_slice(&signed), &offsets).unwrap();
        let found: Vec<f64> = Vec::try_from(&tensors.view(-1)).unwrap();
        let mut sum = 0.0;
        for (row, &key) in keys.iter().enumerate() {
            for code in 0..300 {
                let noise = Noise::of(key, code as u64);
                let exact = noise.gumbel();
                let off = (found[row * 300 + code] - exact).abs();
                assert!(off <= 1e-14 * exact.abs().max(1.0), "{off} at {row}, {code}");
                assert!(noise.bound() >= exact, "{} < {exact}", noise.bound());
                sum += exact;
            }
        }
        // The mean of the Gumbel distribution, to five standard errors.
        let mean = sum / 15_000.0;
        assert!((mean - 0.5772).abs() < 5.0 * 1.2825 / 15_000f64.sqrt(), "{mean}");
    }

    #[test]
    fn extreme_numbers_are_finite() {
        let last = (1u64 << BITS) - 1;
        for steps in [0, 1, last - 1, last] {
            let noise = Noise { steps };
            assert!(noise.gumbel().is_finite() && noise.bound() >= noise.gumbel(), "{steps}");
        }
    }
}
