//! The workload and the fleet.

use serde::Serialize;

use super::FleetError;
use super::draws::{Draws, Stream};
use super::routing::Policy;

/// The arrival process of images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// Independent, at the mean rate.
    Poisson,
    /// A tenth of the time at `factor` times the mean rate, for `seconds` on average; slower in between, to keep the
    /// mean.
    Bursty { factor: f64, seconds: f64 },
    /// All at the start, and none after.
    AtOnce { pictures: u64 },
}

/// Share of the time in a burst.
pub(super) const BURSTS: f64 = 0.1;

/// The requests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Workload {
    pub arrivals: Arrivals,
    /// Images per second, one per request.
    pub pictures_per_second: f64,
    /// Trainings per hour, Poisson.
    pub trainings_per_hour: f64,
    /// Trainings that are queued at the start.
    pub trainings_at_start: u32,
    /// Number of different concepts, by Zipf.
    pub concepts: usize,
    /// Exponent of that Zipf law; 0: uniform.
    pub zipf: f64,
    /// Share of the images that use a concept, 0 to 1.
    pub concept_share: f64,
    /// Images end after a geometric number of codes with the size's mean, unlike any model here: for comparison with
    /// theory.
    pub geometric: bool,
    /// Seconds of arrivals.
    pub seconds: f64,
    /// Warm-up seconds, which are not counted.
    pub warm_up: f64,
}

/// Failures of workers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Failures {
    /// Mean hours between failures of one worker.
    pub mtbf_hours: f64,
    /// Seconds until its work is taken over, uniformly distributed between the two.
    pub lease_seconds: (f64, f64),
}

/// The workers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fleet {
    pub workers: usize,
    /// Number of workers for trainings only, the others for images only; 0: all take both.
    pub training_workers: usize,
    pub policy: Policy,
    /// Network latency from API to worker and back in milliseconds.
    pub hop_ms: f64,
    pub failures: Option<Failures>,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            arrivals: Arrivals::Poisson,
            pictures_per_second: 0.0,
            trainings_per_hour: 0.0,
            trainings_at_start: 0,
            concepts: 10_000,
            zipf: 1.0,
            concept_share: 1.0,
            geometric: false,
            seconds: 600.0,
            warm_up: 60.0,
        }
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            workers: 1,
            training_workers: 0,
            policy: Policy::LeastLoaded,
            hop_ms: 0.0,
            failures: None,
        }
    }
}

impl Workload {
    /// Validates the numbers.
    ///
    /// # Errors
    /// The first invalid one.
    pub fn check(&self) -> Result<(), FleetError> {
        let need = |good: bool, field: &str, problem: &str| match good {
            true => Ok(()),
            false => Err(FleetError::new(field, problem)),
        };
        let amounts = self.pictures_per_second >= 0.0 && self.trainings_per_hour >= 0.0;
        need(
            amounts,
            "pictures_per_second",
            "and trainings_per_hour must be 0 or more",
        )?;
        let time = self.seconds > self.warm_up && self.warm_up >= 0.0 && self.seconds.is_finite();
        need(time, "seconds", "must be more than the warm-up")?;
        need(self.zipf >= 0.0, "zipf", "must be 0 or more")?;
        let concepts = (1..=10_000_000).contains(&self.concepts);
        need(concepts, "concepts", "must be from 1 to 10000000")?;
        let share = (0.0..=1.0).contains(&self.concept_share);
        need(share, "concept_share", "must be a number from 0 to 1")?;
        if let Arrivals::Bursty { factor, seconds } = self.arrivals {
            let good = (1.0..=1.0 / BURSTS).contains(&factor) && seconds > 0.0;
            need(
                good,
                "burst_factor",
                "must be from 1 to 10, and bursts last above 0 seconds",
            )?;
        }
        Ok(())
    }
}

/// Arrival times of images.
#[derive(Debug)]
pub(super) struct Clock {
    draws: Draws,
    arrivals: Arrivals,
    rate: f64,
    in_burst: bool,
    /// When burst or pause ends.
    until: f64,
    left: u64,
}

impl Clock {
    pub fn new(workload: &Workload, seed: u64) -> Self {
        let left = match workload.arrivals {
            Arrivals::AtOnce { pictures } => pictures,
            _ => u64::MAX,
        };
        Self {
            draws: Draws::new(seed, Stream::Arrivals),
            arrivals: workload.arrivals,
            rate: workload.pictures_per_second,
            // So that the first random number is the length of the pause.
            in_burst: true,
            until: 0.0,
            left,
        }
    }

    /// The next moment after `now`, if there is one.
    pub fn next(&mut self, now: f64) -> Option<f64> {
        match self.arrivals {
            Arrivals::AtOnce { .. } => {
                self.left = self.left.checked_sub(1)?;
                Some(0.0)
            }
            Arrivals::Poisson => (self.rate > 0.0).then(|| now + self.draws.exponential(1.0 / self.rate)),
            Arrivals::Bursty { factor, seconds } => (self.rate > 0.0).then(|| self.bursty(now, factor, seconds)),
        }
    }

    fn bursty(&mut self, mut now: f64, factor: f64, seconds: f64) -> f64 {
        loop {
            if now >= self.until {
                self.in_burst = !self.in_burst;
                let mean = match self.in_burst {
                    true => seconds,
                    false => seconds * (1.0 - BURSTS) / BURSTS,
                };
                self.until = now + self.draws.exponential(mean);
            }
            let rate = match self.in_burst {
                true => factor * self.rate,
                false => self.rate * (1.0 - BURSTS * factor) / (1.0 - BURSTS),
            };
            let next = match rate > 0.0 {
                true => now + self.draws.exponential(1.0 / rate),
                false => f64::INFINITY,
            };
            // Memoryless: arrivals after the change are sampled again.
            if next <= self.until {
                return next;
            }
            now = self.until;
        }
    }
}
