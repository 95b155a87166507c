//! From logits to sampled codes: top-k with ties, temperature, and one sample of the softmax by the Gumbel-max rule,
//! the largest of `score / temperature + noise`. The noise is a function of seed, image, position and code. With given
//! scores a code is therefore a function of the seed: it does not matter when, how often, or in which batch it is
//! computed. Speculative decoding relies on this.

mod device;
mod host;
mod noise;

use tch::Tensor;

use super::ModelError;
use super::accelerator::Pack;
pub(in crate::model) use device::{DeviceSampler, PlannedSampler};
pub(in crate::model) use host::{HostDraw, draw_on_host};
pub use noise::noise_key;

/// How one code is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Scores below the k-th largest are dropped; equal ones are kept. 0 keeps all.
    pub top_k: i64,
    /// 0 is greedy.
    pub temperature: f64,
    /// Selects the noise: see [`noise_key`].
    pub key: u64,
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
    let keys = pack.ints(draws.iter().map(|draw| draw.key.cast_signed()));
    let sent = pack.send(scores.device())?;
    planned.on(&sent)?.draw(scores, &sent.get(&keys)?)
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
            key: noise_key(7, image, 5),
        };
        let mut counts = [0; 3];
        let alone: Vec<i64> = (0..3000).map(|image| codes(&scores, &[draw(image)])[0]).collect();
        alone.iter().for_each(|&code| counts[code as usize] += 1);
        assert!(
            (counts[0] - 300i32).abs() < 60 && (counts[2] - 2100i32).abs() < 120,
            "{counts:?}"
        );
        // In a batch with other settings, greedy rows and non-finite rows.
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

    /// Chi-square of 20,000 samples against the softmax of what top-k keeps: over images, over positions and over
    /// seeds, since each is a stream of its own.
    #[test]
    fn sampling_follows_the_softmax() {
        const DRAWS: u64 = 20_000;
        let logits: Vec<f32> = (0..40).map(|code| ((code * 37) % 40) as f32 * 0.12).collect();
        let (top_k, temperature) = (20, 1.3);
        let mut sorted = logits.clone();
        sorted.sort_by(f32::total_cmp);
        let threshold = sorted[sorted.len() - top_k];
        let weights: Vec<f64> = logits
            .iter()
            .map(|&score| {
                if score < threshold {
                    0.0
                } else {
                    (f64::from(score) / temperature).exp()
                }
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let keys: [fn(u64) -> u64; 3] = [
            |at| noise_key(11, at, 40),
            |at| noise_key(11, 0, at),
            |at| noise_key(at, 0, 40),
        ];
        for key in keys {
            let mut counts = vec![0u64; logits.len()];
            for first in (0..DRAWS).step_by(1000) {
                let draws: Vec<Draw> = (first..first + 1000)
                    .map(|at| Draw {
                        top_k: top_k as i64,
                        temperature,
                        key: key(at),
                    })
                    .collect();
                let rows = Tensor::from_slice(&logits).view([1, -1]).repeat([1000, 1]);
                codes(&rows, &draws).iter().for_each(|&code| counts[code as usize] += 1);
            }
            let mut distance = 0.0;
            for (&count, weight) in counts.iter().zip(&weights) {
                let expected = DRAWS as f64 * weight / total;
                match expected == 0.0 {
                    true => assert_eq!(count, 0),
                    false => distance += (count as f64 - expected).powi(2) / expected,
                }
            }
            // 19 degrees of freedom: above 43.8 with probability 0.001.
            assert!(distance < 43.8, "{distance}: {counts:?}");
        }
    }

    #[test]
    fn row_without_finite_scores_has_no_code() {
        let draw = Draw {
            top_k: 2,
            temperature: 1.0,
            key: noise_key(1, 2, 3),
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
