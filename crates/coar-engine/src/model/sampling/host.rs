//! Guidance and sampling on the host, one image per thread: the same order of operations as on tensors.

use super::noise::Noise;
use super::{Draw, NO_CODE};
use crate::model::cpu;

/// How one image is sampled from rows of logits.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct HostDraw {
    /// Row of the conditional branch, and of the unconditional one with guidance.
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub guidance_scale: f32,
    pub draw: Draw,
}

struct Rows {
    logits: *mut f32,
    scratch: *mut f32,
    drawn: *mut i64,
}

// SAFETY: a row that is written belongs to one draw.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// No other thread writes to the rows of this draw.
    unsafe fn draw(&self, index: usize, n: usize, one: &HostDraw) {
        // SAFETY: as documented; rows and the image's own scratch are in bounds.
        unsafe {
            let row = |row: usize| self.logits.add(row * n);
            if let Some(other) = one.unconditional {
                let scores = std::slice::from_raw_parts_mut(row(one.conditional), n);
                for (c, u) in scores.iter_mut().zip(std::slice::from_raw_parts(row(other), n)) {
                    *c = *u + (*c - *u) * one.guidance_scale;
                }
            }
            let scores = std::slice::from_raw_parts(row(one.conditional).cast_const(), n);
            let scratch = std::slice::from_raw_parts_mut(self.scratch.add(index * n), n);
            *self.drawn.add(index) = draw(scores, scratch, &one.draw);
        }
    }
}

/// Samples one code for each of `draws` from `logits` `[rows, n]`. Guidance overwrites the conditional row, which must
/// belong to one draw only. `scratch` grows as needed and is reused.
pub(in crate::model) fn draw_on_host(
    logits: &mut [f32],
    n: usize,
    draws: &[HostDraw],
    scratch: &mut Vec<f32>,
) -> Vec<i64> {
    let rows = logits.len() / n.max(1);
    let inside = |one: &HostDraw| one.conditional < rows && one.unconditional.is_none_or(|row| row < rows);
    assert!(draws.iter().all(inside), "an image's rows are rows of the logits");
    let mut drawn = vec![NO_CODE; draws.len()];
    if scratch.len() < draws.len() * n {
        scratch.resize(draws.len() * n, 0.0);
    }
    let pointers = Rows {
        logits: logits.as_mut_ptr(),
        scratch: scratch.as_mut_ptr(),
        drawn: drawn.as_mut_ptr(),
    };
    // SAFETY: rows are in bounds, and one that is written belongs to one draw.
    cpu::for_each(draws.len(), |index| unsafe { pointers.draw(index, n, &draws[index]) });
    drawn
}

/// The largest score; NaN if one is NaN.
fn largest(scores: &[f32]) -> f32 {
    // Computed in lanes so that it is vectorised; a NaN makes its lane's sum NaN.
    const LANES: usize = 16;
    let (mut most, mut nan_sums) = ([f32::NEG_INFINITY; LANES], [0.0f32; LANES]);
    let chunks = scores.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            most[lane] = if chunk[lane] > most[lane] {
                chunk[lane]
            } else {
                most[lane]
            };
            nan_sums[lane] += chunk[lane] * 0.0;
        }
    }
    let mut all = rest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    all = most.iter().copied().fold(all, f32::max);
    let nan = rest.iter().any(|score| score.is_nan()) || scores_have_nan(scores, &nan_sums);
    if nan { f32::NAN } else { all }
}

/// Infinite scores make a lane's sum NaN too; this distinguishes the two cases.
fn scores_have_nan(scores: &[f32], nan_sums: &[f32]) -> bool {
    nan_sums.iter().any(|sum| sum.is_nan()) && scores.iter().any(|score| score.is_nan())
}

/// Samples one code from `scores`; see [`super::draw_codes`].
fn draw(scores: &[f32], scratch: &mut [f32], draw: &Draw) -> i64 {
    let most = largest(scores);
    if !most.is_finite() {
        return NO_CODE;
    }
    if draw.temperature == 0.0 {
        return scores
            .iter()
            .position(|&score| score == most)
            .map_or(NO_CODE, |at| at as i64);
    }
    let k = usize::try_from(draw.top_k).unwrap_or(0);
    let threshold = if k == 0 || k >= scores.len() {
        f32::NEG_INFINITY
    } else {
        scratch.copy_from_slice(scores);
        *scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    };
    let (mut best, mut code) = (f64::NEG_INFINITY, NO_CODE);
    for (index, &score) in scores.iter().enumerate() {
        if score < threshold || score == f32::NEG_INFINITY {
            continue;
        }
        let scaled = f64::from(score) / draw.temperature;
        let noise = Noise::of(draw.key, index as u64);
        // Few candidates exceed the best one so far, so few logarithms are computed.
        if scaled + noise.bound() > best {
            let value = scaled + noise.gumbel();
            if value > best {
                (best, code) = (value, index as i64);
            }
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::super::{draw_codes, noise_key};
    use super::*;

    #[test]
    fn host_sampler_agrees_with_tensors() {
        let (rows, n) = (40, 300);
        // Quarters, to produce ties; some rows are not finite.
        let logits = (Tensor::randn([rows, n], (Kind::Float, Device::Cpu)) * 8.0).round() / 4.0;
        let _ = logits.get(6).fill_(f64::NAN);
        let _ = logits.get(10).fill_(f64::NEG_INFINITY);
        let _ = logits.get(12).get(17).fill_(f64::INFINITY);
        let _ = logits.get(15).get(17).fill_(f64::NEG_INFINITY);
        let mut draws = Vec::new();
        for image in 0..20usize {
            draws.push(HostDraw {
                conditional: 2 * image,
                unconditional: (image % 3 == 0).then_some(2 * image + 1),
                guidance_scale: 2.5,
                draw: Draw {
                    top_k: [0, 7, 300, 1][image % 4],
                    temperature: [1.0, 0.0, 0.4][image % 3],
                    key: noise_key(3, image as u64, 0),
                },
            });
        }
        let conditional = Tensor::from_slice(&(0..20).map(|p| 2 * p).collect::<Vec<i64>>());
        let other: Vec<i64> = draws
            .iter()
            .map(|d| d.unconditional.unwrap_or(d.conditional) as i64)
            .collect();
        let (c, u) = (
            logits.index_select(0, &conditional),
            logits.index_select(0, &Tensor::from_slice(&other)),
        );
        let guided: Vec<bool> = draws.iter().map(|d| d.unconditional.is_some()).collect();
        let scores = (&u + (&c - &u) * 2.5).where_self(&Tensor::from_slice(&guided).view([-1, 1]), &c);
        let only: Vec<Draw> = draws.iter().map(|d| d.draw).collect();
        let expected: Vec<i64> = Vec::try_from(draw_codes(&scores, &only).unwrap()).unwrap();
        let mut numbers: Vec<f32> = Vec::try_from(&logits.view(-1)).unwrap();
        let mut scratch = vec![];
        let found = draw_on_host(&mut numbers, n as usize, &draws, &mut scratch);
        // If several scores are the largest, the tensor version may select another one of them.
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let row = scores.get(index as i64);
            let same = found == expected
                || (draws[index].draw.temperature == 0.0
                    && row.get(*found).double_value(&[]) == row.get(*expected).double_value(&[]));
            assert!(same, "image {index}: {found}, {expected}");
        }
        assert_eq!(found.iter().filter(|&&code| code == NO_CODE).count(), 3, "{found:?}");
    }
}
