//! Attention of one token over its own cached keys, for the query heads that share a key head.

use std::arch::x86_64::*;

use super::numbers::{Stored, WIDE, exp, sums};

/// The cached keys and values of one key head in one layer.
#[derive(Clone, Copy)]
pub(super) struct Keys<W> {
    /// `[keys, head_dim]` each, with capacity for a multiple of sixteen keys.
    pub keys: *const W,
    pub values: *const W,
    /// Keys that the token sees.
    pub count: usize,
    pub head_dim: usize,
}

/// The maximum number of registers per head: head_dim up to 256.
const MAX: usize = 16;

impl<W: Stored> Keys<W> {
    /// Computes the scores of all keys with `query` `[head_dim]`, already scaled; returns the largest.
    ///
    /// # Safety
    /// `scores` has capacity for a multiple of sixteen numbers that covers all keys; the machine supports `W`.
    #[inline(always)]
    unsafe fn scores(&self, query: *const f32, scores: *mut f32) -> f32 {
        // SAFETY: as documented.
        unsafe {
            let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let mut key = 0;
            while key < self.count {
                let mut partial = [_mm512_setzero_ps(); WIDE];
                let mut at = 0;
                while at < self.head_dim {
                    let own = _mm512_loadu_ps(query.add(at));
                    let mut i = 0;
                    while i < WIDE {
                        let numbers = W::widen(self.keys.add((key + i) * self.head_dim + at));
                        partial[i] = _mm512_fmadd_ps(numbers, own, partial[i]);
                        i += 1;
                    }
                    at += WIDE;
                }
                let limit = _mm512_set1_epi32((self.count - key).min(WIDE) as i32);
                let seen = _mm512_cmplt_epi32_mask(lanes, limit);
                // Scores beyond the token's own keys are undefined; they are set to minus infinity and get no
                // weight.
                let block = _mm512_mask_blend_ps(seen, _mm512_set1_ps(f32::NEG_INFINITY), sums(&partial));
                _mm512_storeu_ps(scores.add(key), block);
                largest = _mm512_max_ps(largest, block);
                key += WIDE;
            }
            _mm512_reduce_max_ps(largest)
        }
    }

    /// Computes the output `[head_dim]` in f32 for `query` `[head_dim]`, already scaled.
    ///
    /// # Safety
    /// As [`Self::scores`]; `head_dim` is a multiple of sixteen up to 256, `out` has capacity for it.
    #[inline(always)]
    pub unsafe fn attend(&self, query: *const f32, scores: *mut f32, out: *mut f32) {
        // SAFETY: as documented.
        unsafe {
            let largest = _mm512_set1_ps(self.scores(query, scores));
            let mut total = _mm512_setzero_ps();
            let mut key = 0;
            while key < self.count {
                let weight = exp(_mm512_sub_ps(_mm512_loadu_ps(scores.add(key)), largest));
                // e to the power of minus infinity is a tiny number here, not zero, so lanes beyond the keys are
                // cleared.
                let left = self.count - key;
                let weight = if left >= WIDE {
                    weight
                } else {
                    _mm512_maskz_mov_ps((1u16 << left) - 1, weight)
                };
                _mm512_storeu_ps(scores.add(key), weight);
                total = _mm512_add_ps(total, weight);
                key += WIDE;
            }
            let share = _mm512_set1_ps(1.0 / _mm512_reduce_add_ps(total));
            let registers = self.head_dim / WIDE;
            let mut first = 0;
            // Four registers at a time, in two chains each: the sums are bound by the latency of an addition.
            while first < registers {
                let here = (registers - first).min(4);
                match here {
                    4 => self.mix::<4>(scores, first, share, out),
                    3 => self.mix::<3>(scores, first, share, out),
                    2 => self.mix::<2>(scores, first, share, out),
                    _ => self.mix::<1>(scores, first, share, out),
                }
                first += here;
            }
            debug_assert!(registers <= MAX);
        }
    }

    /// The weighted sum of values, registers `first..first + R` of the head.
    #[inline(always)]
    unsafe fn mix<const R: usize>(&self, weights: *const f32, first: usize, share: __m512, out: *mut f32) {
        // SAFETY: as documented.
        unsafe {
            let mut even = [_mm512_setzero_ps(); R];
            let mut odd = [_mm512_setzero_ps(); R];
            let values = self.values.add(first * WIDE);
            let mut key = 0;
            while key + 1 < self.count {
                let (a, b) = (_mm512_set1_ps(*weights.add(key)), _mm512_set1_ps(*weights.add(key + 1)));
                let mut r = 0;
                while r < R {
                    let at = values.add(key * self.head_dim + r * WIDE);
                    even[r] = _mm512_fmadd_ps(W::widen(at), a, even[r]);
                    odd[r] = _mm512_fmadd_ps(W::widen(at.add(self.head_dim)), b, odd[r]);
                    r += 1;
                }
                key += 2;
            }
            let mut r = 0;
            while r < R {
                if key < self.count {
                    let at = values.add(key * self.head_dim + r * WIDE);
                    even[r] = _mm512_fmadd_ps(W::widen(at), _mm512_set1_ps(*weights.add(key)), even[r]);
                }
                let sum = _mm512_mul_ps(_mm512_add_ps(even[r], odd[r]), share);
                _mm512_storeu_ps(out.add((first + r) * WIDE), sum);
                r += 1;
            }
        }
    }
}
