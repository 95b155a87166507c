//! From logits to drawn codes: top-k with ties, temperature, softmax, and one draw from a stream of the picture's own.

use tch::{Kind, Tensor};

use super::ModelError;

/// How codes are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Scores below the k-th largest are dropped; equal ones stay. 0 keeps all.
    pub top_k: i64,
    /// 0 takes the largest score.
    pub temperature: f64,
}

/// Drops (sets to -inf) the scores `[rows, n]` below each row's k-th largest; ties with it survive, and where fewer than
/// k scores are finite nothing is dropped.
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

/// A uniform number in [0, 1) that depends on nothing but its three indices: the picture's stream does not know who else
/// is being drawn (SplitMix64 over the seed, the picture's index and the position).
pub fn uniform(seed: u64, picture: u64, position: u64) -> f64 {
    let mix = |mut x: u64| {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let bits = mix(mix(mix(seed) ^ picture.wrapping_mul(0xd1b5_4a32_d192_ed03)) ^ position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws one index per row of `scores` `[rows, n]`; row r uses stream `streams[r]` at `position`.
///
/// # Errors
/// When a row has no finite score, or the device fails.
pub fn draw_codes(
    scores: &Tensor,
    sampling: &Sampling,
    streams: &[(u64, u64)],
    position: u64,
) -> Result<Vec<i64>, ModelError> {
    // Without this a row of -inf or NaN would draw its first index, silently.
    if !bool::try_from(&scores.f_amax([1i64].as_slice(), false)?.f_isfinite()?.f_all()?)? {
        return Err(ModelError::invalid("scores", "have a row without a finite largest one"));
    }
    if sampling.temperature == 0.0 {
        return Ok(Vec::<i64>::try_from(&scores.f_argmax(1, false)?)?);
    }
    let kept = keep_top_k(scores, sampling.top_k)?.f_div_scalar(sampling.temperature)?;
    let total = kept.f_softmax(1, Kind::Double)?.f_cumsum(1, Kind::Double)?;
    let n = total.size()[1];
    let sums = total.f_narrow(1, n - 1, 1)?;
    let draws: Vec<f64> = streams
        .iter()
        .map(|&(seed, picture)| uniform(seed, picture, position))
        .collect();
    let draws = Tensor::f_from_slice(&draws)?
        .f_to_device(scores.device())?
        .f_unsqueeze(1)?
        .f_mul(&sums)?;
    // The number of cumulative sums at or below the draw is the drawn index.
    let drawn = total
        .f_le_tensor(&draws)?
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Int64)?;
    Ok(Vec::<i64>::try_from(&drawn.f_clamp_max(n - 1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_with_the_kth_score_survive() {
        let scores = Tensor::from_slice(&[1.0f32, 3.0, 2.0, 2.0, 0.0]).view([1, 5]);
        let kept = keep_top_k(&scores, 2).unwrap();
        let finite: Vec<bool> = Vec::try_from(kept.isfinite().view(-1)).unwrap();
        assert_eq!(finite, [false, true, true, true, false]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_only_the_streams_indices() {
        let scores = Tensor::from_slice(&[0.1f32, 0.2, 0.7]).log().view([1, 3]);
        let sampling = Sampling {
            top_k: 0,
            temperature: 1.0,
        };
        let mut counts = [0; 3];
        for picture in 0..3000 {
            counts[draw_codes(&scores, &sampling, &[(7, picture)], 5).unwrap()[0] as usize] += 1;
        }
        assert!(
            (counts[0] - 300i32).abs() < 60 && (counts[2] - 2100i32).abs() < 120,
            "{counts:?}"
        );
        let rows = scores.repeat([8, 1]);
        let streams: Vec<(u64, u64)> = (0..8).map(|i| (7, i)).collect();
        let together = draw_codes(&rows, &sampling, &streams, 5).unwrap();
        for (index, stream) in streams.iter().enumerate() {
            assert_eq!(
                draw_codes(&scores, &sampling, &[*stream], 5).unwrap()[0],
                together[index]
            );
        }
    }

    #[test]
    fn a_row_without_finite_scores_is_an_error() {
        let sampling = Sampling {
            top_k: 2,
            temperature: 1.0,
        };
        for bad in [f32::NEG_INFINITY, f32::NAN] {
            let scores = Tensor::from_slice(&[0.0f32, 1.0, bad, bad]).view([2, 2]);
            assert!(draw_codes(&scores, &sampling, &[(0, 0), (0, 1)], 0).is_err());
        }
    }
}
