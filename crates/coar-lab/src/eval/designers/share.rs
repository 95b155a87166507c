//! Accuracies with their intervals.

use serde::Serialize;

/// The number of successes among trials, with Wilson's 95 % interval (1927), which keeps its width near 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    pub share: f64,
    pub low: f64,
    pub high: f64,
    pub of: usize,
}

/// The normal distribution's 97.5th percentile.
const Z: f64 = 1.959_964;

impl Share {
    /// The share of `true`; 0 without trials, with the interval 0 to 1.
    pub fn of(trials: impl IntoIterator<Item = bool>) -> Self {
        let (mut right, mut of) = (0usize, 0usize);
        for trial in trials {
            right += usize::from(trial);
            of += 1;
        }
        if of == 0 {
            return Self {
                share: 0.0,
                low: 0.0,
                high: 1.0,
                of,
            };
        }
        let n = of as f64;
        let share = right as f64 / n;
        let center = (share + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        Self {
            share,
            low: (center - half).max(0.0),
            high: (center + half).min(1.0),
            of,
        }
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} [{:.2}-{:.2}]", self.share, self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons() {
        let half = Share::of((0..100).map(|i| i % 2 == 0));
        assert!(
            (half.low - 0.4038).abs() < 1e-4 && (half.high - 0.5962).abs() < 1e-4,
            "{half:?}"
        );
        // Approximately the rule of three: without a failure among 100 at least .963.
        let all = Share::of([true; 100]);
        assert!(
            all.share == 1.0 && (all.low - 0.9630).abs() < 1e-4 && all.high == 1.0,
            "{all:?}"
        );
        assert_eq!(Share::of([]).of, 0);
        assert_eq!(half.to_string(), "0.500 [0.40-0.60]");
    }
}
