//! Means over subjects with bootstrap intervals (Efron 1979), alone and paired.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// A mean with the interval that contains 95 % of its bootstrap resamples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

const RESAMPLES: usize = 10_000;
const SEED: u64 = 95;

/// The mean of one value per subject; subjects are resampled. `None` without subjects.
pub fn interval(subjects: &[f64]) -> Option<Interval> {
    let n = subjects.len();
    if n == 0 {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..n).map(|_| subjects[rng.random_range(0..n)]).sum::<f64>() / n as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((share * RESAMPLES as f64) as usize).min(RESAMPLES - 1)];
    Some(Interval {
        mean: subjects.iter().sum::<f64>() / n as f64,
        low: at(0.025),
        high: at(0.975),
    })
}

/// Each subject's mean over its seeds, in the order of names.
pub fn by_subject<'a>(values: impl Iterator<Item = (&'a str, f64)>) -> BTreeMap<&'a str, f64> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (subject, value) in values {
        let sum = sums.entry(subject).or_default();
        *sum = (sum.0 + value, sum.1 + 1.0);
    }
    sums.into_iter().map(|(subject, (sum, n))| (subject, sum / n)).collect()
}

/// The mean difference `a - b` over the subjects that both have.
pub fn paired(a: &BTreeMap<&str, f64>, b: &BTreeMap<&str, f64>) -> Option<Interval> {
    let differences: Vec<f64> = a
        .iter()
        .filter_map(|(subject, value)| Some(value - b.get(subject)?))
        .collect();
    interval(&differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_equal_and_of_two_values() {
        assert_eq!(interval(&[]), None);
        let same = interval(&[0.5; 8]).unwrap();
        assert_eq!((same.mean, same.low, same.high), (0.5, 0.5, 0.5));
        // Means of two resampled values are 0, 0.5, 1 with shares of a quarter, a half, a quarter.
        let two = interval(&[0.0, 1.0]).unwrap();
        assert_eq!((two.mean, two.low, two.high), (0.5, 0.0, 1.0));
    }

    #[test]
    fn a_large_sample_has_the_normal_interval() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let found = interval(&values).unwrap();
        // A standard deviation of 0.5 over sqrt(400), times 1.96.
        assert!((found.high - found.mean - 0.049).abs() < 0.004, "{found:?}");
        assert!((found.mean - found.low - 0.049).abs() < 0.004, "{found:?}");
    }

    #[test]
    fn seeds_are_averaged_first_and_pairs_need_both() {
        let a = by_subject([("x", 1.0), ("x", 3.0), ("y", 5.0), ("z", 9.0)].into_iter());
        assert_eq!(a["x"], 2.0);
        let b = by_subject([("x", 1.0), ("y", 4.0)].into_iter());
        let difference = paired(&a, &b).unwrap();
        assert_eq!((difference.mean, difference.low, difference.high), (1.0, 1.0, 1.0));
    }
}
