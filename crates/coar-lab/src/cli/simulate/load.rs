//! What a simulated load and a simulated fleet look like.

use clap::{Args, ValueEnum};

use crate::simulator::{Arrivals, Failures, Fleet, FleetError, Policy, Times, Workload};

/// Which worker it is about.
#[derive(Debug, Args)]
pub(super) struct TimesArgs {
    /// A worker's step times: `pocket` and `30m` (measured on 2 CPU cores), `7b-h100` (an estimate), or a TOML or JSON file.
    #[arg(long, default_value = "pocket", value_name = "NAME|FILE")]
    times: String,
}

impl TimesArgs {
    pub(super) fn times(&self) -> Result<Times, FleetError> {
        Times::read(&self.times)
    }
}

/// How images come, and with which concepts.
#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// A tenth of the time the rate is so many times the mean, 1 to 10; 1: Poisson.
    #[arg(long, default_value_t = 1.0)]
    burst_factor: f64,
    /// Mean seconds of such a burst.
    #[arg(long, default_value_t = 30.0)]
    burst_seconds: f64,
    /// Different concepts.
    #[arg(long, default_value_t = 10_000)]
    concepts: usize,
    /// Exponent of the Zipf law by which they are asked for; 0: all alike.
    #[arg(long, default_value_t = 1.0)]
    zipf: f64,
    /// Part of the images that use one.
    #[arg(long, default_value_t = 1.0)]
    concept_share: f64,
}

impl LoadArgs {
    pub(super) fn workload(&self, pictures_per_second: f64, trainings_per_hour: f64) -> Workload {
        let bursty = Arrivals::Bursty {
            factor: self.burst_factor,
            seconds: self.burst_seconds,
        };
        let poisson = (self.burst_factor - 1.0).abs() < 1e-9;
        Workload {
            arrivals: if poisson { Arrivals::Poisson } else { bursty },
            pictures_per_second,
            trainings_per_hour,
            concepts: self.concepts,
            zipf: self.zipf,
            concept_share: self.concept_share,
            ..Workload::default()
        }
    }
}

/// How requests are spread.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PolicyChoice {
    /// Any worker.
    Random,
    /// The one with the fewest images; beside a training they count for more.
    LeastLoaded,
    /// As the server chooses: the one with the least to do, or one that has the concept on its device where that makes nobody wait.
    Server,
}

/// How workers are reached, and how they die.
#[derive(Debug, Args)]
pub(super) struct FleetArgs {
    #[arg(long, value_enum, default_value = "server")]
    policy: PolicyChoice,
    /// So many of the workers take trainings and no images, the others images and no trainings; 0: all take both.
    #[arg(long, default_value_t = 0, value_name = "N")]
    training_workers: usize,
    /// Milliseconds that the way from API to worker adds.
    #[arg(long, default_value_t = 20.0)]
    hop_ms: f64,
    /// Mean hours between two deaths of one worker; 0: none.
    #[arg(long, default_value_t = 0.0)]
    mtbf_hours: f64,
    /// Seconds until others take over what a dead worker had, from the one to the other.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_value = "10,45", value_name = "FROM,TO")]
    lease_seconds: Vec<f64>,
}

impl FleetArgs {
    pub(super) fn fleet(&self, workers: usize) -> Fleet {
        let first = self.lease_seconds.first().copied().unwrap_or(0.0);
        let last = self.lease_seconds.last().copied().unwrap_or(first);
        Fleet {
            workers,
            training_workers: self.training_workers,
            policy: match self.policy {
                PolicyChoice::Random => Policy::Random,
                PolicyChoice::LeastLoaded => Policy::LeastLoaded,
                PolicyChoice::Server => Policy::Server,
            },
            hop_ms: self.hop_ms,
            failures: (self.mtbf_hours > 0.0).then_some(Failures {
                mtbf_hours: self.mtbf_hours,
                lease_seconds: (first.min(last), last.max(first)),
            }),
        }
    }
}
