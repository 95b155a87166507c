//! Random numbers: one stream per purpose, so arrivals do not depend on the number of workers.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The purpose of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stream {
    Arrivals = 1,
    Pictures,
    Routing,
    Failures,
    Trainings,
}

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub(super) struct Draws(ChaCha8Rng);

impl Draws {
    pub fn new(seed: u64, stream: Stream) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream as u64);
        Self(rng)
    }

    /// From 0 to 1, 1 excluded.
    pub fn unit(&mut self) -> f64 {
        self.0.random::<f64>()
    }

    /// Exponential with this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Below `count`.
    pub fn below(&mut self, count: usize) -> usize {
        self.0.random_range(0..count.max(1))
    }
}

/// Indices from 0 on, with a probability proportional to their weight.
#[derive(Debug, Clone)]
pub(super) struct Weighted {
    /// Running sums of the weights.
    sums: Vec<f64>,
}

impl Weighted {
    pub fn new(weights: impl Iterator<Item = f64>) -> Self {
        let mut sum = 0.0;
        let sums = weights
            .map(|weight| {
                sum += weight;
                sum
            })
            .collect();
        Self { sums }
    }

    /// Zipf: the k-th of `count` weighs k^-exponent.
    pub fn zipf(count: usize, exponent: f64) -> Self {
        Self::new((1..=count.max(1)).map(|rank| (rank as f64).powf(-exponent)))
    }

    pub fn draw(&self, draws: &mut Draws) -> usize {
        let at = draws.unit() * self.sums.last().copied().unwrap_or(0.0);
        self.sums
            .partition_point(|sum| *sum <= at)
            .min(self.sums.len().saturating_sub(1))
    }
}
