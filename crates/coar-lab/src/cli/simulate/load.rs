//! Options of a simulated load and a simulated fleet.

use clap::{Args, ValueEnum};

use crate::simulator::{Arrivals, Failures, Fleet, FleetError, Policy, Times, Workload};

/// The worker to simulate.
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

/// Arrivals of images, and their concepts.
#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// Burst factor: a tenth of the time the rate is this many times the mean, 1 to 10; 1: Poisson.
    #[arg(long, default_value_t = 1.0)]
    burst_factor: f64,
    /// Mean duration of such a burst in seconds.
    #[arg(long, default_value_t = 30.0)]
    burst_seconds: f64,
    /// Number of different concepts.
    #[arg(long, default_value_t = 10_000)]
    concepts: usize,
    /// Exponent of the Zipf law of their popularity; 0: uniform.
    #[arg(long, default_value_t = 1.0)]
    zipf: f64,
    /// Share of the images that use one.
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

/// The routing policy.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PolicyChoice {
    /// A random worker.
    Random,
    /// The one with the fewest images; beside a training they count for more.
    LeastLoaded,
    /// The server's policy: the least pending work, or a worker with the concept resident if that adds no wait.
    Server,
}

/// The network, and failures of workers.
#[derive(Debug, Args)]
pub(super) struct FleetArgs {
    #[arg(long, value_enum, default_value = "server")]
    policy: PolicyChoice,
    /// Number of workers for trainings only, the others for images only; 0: all workers take both.
    #[arg(long, default_value_t = 0, value_name = "N")]
    training_workers: usize,
    /// Network latency between API and worker in milliseconds.
    #[arg(long, default_value_t = 20.0)]
    hop_ms: f64,
    /// Mean hours between failures of one worker; 0: none.
    #[arg(long, default_value_t = 0.0)]
    mtbf_hours: f64,
    /// Minimum and maximum seconds until a dead worker's work is taken over.
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
