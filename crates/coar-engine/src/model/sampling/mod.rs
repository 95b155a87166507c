//! From logits to sampled codes: top-k with ties, temperature, softmax, and one sample from the image's own random
//! stream.

mod device;
mod host;

use tch::Tensor;

use super::ModelError;
use super::accelerator::Pack;
pub(in crate::model) use device::{DeviceSampler, PlannedSampler};
pub(in crate::model) use host::{HostDraw, draw_on_host};

/// How one code is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Scores below the k-th largest are dropped; equal ones are kept. 0 keeps all.
    pub top_k: i64,
    /// 0 is greedy.
    pub temperature: f64,
    /// The random number, in [0, 1): see [`uniform`].
    pub uniform: f64,
}

/// Sets the scores `[rows, n]` below each row's k-th largest to -inf; ties with it are kept, and if fewer than k
/// scores are finite nothing is dropped.
///
/// # Errors
/// When the device fails.
pub fn keep_top_k(scores: &Tensor, k: i64) -> Result<Tensor, ModelError> {
    let n = scores.size()[1];
    if k <= 0 || k >= n {
        return Ok(scores.shallow_clone());
    }
    let (top, _) = scores.f_topk(k, 1, true, true)?;
    let threshold = top.f_narrow(1, k - 1, 1)?;
    Ok(scores.f_masked_fill(&scores.f_lt_tensor(&threshold)?, f64::NEG_INFINITY)?)
}

/// A uniform number in [0, 1) that depends only on its three indices, so an image's stream is independent of the
/// batch (SplitMix64 over the seed, the image's index and the position).
pub fn uniform(seed: u64, image: u64, position: u64) -> f64 {
    let mix = |mut x: u64| {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let bits = mix(mix(mix(seed) ^ image.wrapping_mul(0xd1b5_4a32_d192_ed03)) ^ position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The result for a row without a finite largest score.
pub const NO_CODE: i64 = -1;

/// Samples one index per row of `scores` `[rows, n]`, each with its own settings: `[rows]` i64. A row whose largest
/// score is not finite returns [`NO_CODE`] and does not affect the others.
///
/// # Errors
/// When the device fails.
pub fn draw_codes(scores: &Tensor, draws: &[Draw]) -> Result<Tensor, ModelError> {
    let mut pack = Pack::default();
    let planned = DeviceSampler::plan(draws, scores.size2()?.1, &mut pack);
    let uniforms = pack.floats(draws.iter().map(|draw| draw.uniform));
    let sent = pack.send(scores.device())?;
    planned.on(&sent)?.draw(scores, &sent.get(&uniforms)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(scores: &Tensor, draws: &[Draw]) -> Vec<i64> {
        Vec::try_from(draw_codes(scores, draws).unwrap()).unwrap()
    }

    #[test]
    fn ties_with_the_kth_score_survive() {
        let scores = Tensor::from_slice(&[1.0f32, 3.0, 2.0, 2.0, 0.0]).view([1, 5]);
        let kept = keep_top_k(&scores, 2).unwrap();
        let finite: Vec<bool> = Vec::try_from(kept.isfinite().view(-1)).unwrap();
        assert_eq!(finite, [false, true, true, true, false]);
    }

    #[test]
    fn sampling_follows_the_probabilities_independent_of_the_batch() {
        let scores = Tensor::from_slice(&[0.1f32, 0.2, 0.7]).log().view([1, 3]);
        let draw = |image| Draw {
            top_k: 0,
            temperature: 1.0,
            uniform: uniform(7, image, 5),
        };
        let mut counts = [0; 3];
        let alone: Vec<i64> = (0..3000).map(|image| codes(&scores, &[draw(image)])[0]).collect();
        alone.iter().for_each(|&code| counts[code as usize] += 1);
        assert!(
            (counts[0] - 300i32).abs() < 60 && (counts[2] - 2100i32).abs() < 120,
            "{counts:?}"
        );
        // Among rows with other settings, greedy ones and non-finite ones.
        let rows = Tensor::cat(&[&scores.repeat([8, 1]), &scores.full_like(f64::NAN)], 0);
        let mut draws: Vec<Draw> = (0..9).map(draw).collect();
        draws[1].temperature = 0.0;
        (draws[2].temperature, draws[3].top_k) = (0.1, 1);
        let together = codes(&rows, &draws);
        assert_eq!((together[1], together[3], together[8]), (2, 2, NO_CODE));
        for index in [0, 4, 5, 6, 7] {
            assert_eq!(together[index], alone[index]);
        }
    }

    #[test]
    fn row_without_finite_scores_has_no_code() {
        let draw = Draw {
            top_k: 2,
            temperature: 1.0,
            uniform: 0.5,
        };
        for bad in [f32::NEG_INFINITY, f32::NAN] {
            let scores = Tensor::from_slice(&[0.0f32, 9.0, bad, bad]).view([2, 2]);
            assert_eq!(codes(&scores, &[draw, draw]), [1, NO_CODE]);
            let greedy = Draw {
                temperature: 0.0,
                ..draw
            };
            assert_eq!(codes(&scores, &[greedy, greedy]), [1, NO_CODE]);
        }
    }
}
