//! Capacity planning: a discrete-event simulation and closed forms for a fleet of workers, from measured or
//! estimated step times.
//!
//! Every result depends only on its input file and its seed. `docs/scaling.md` describes what is simulated and what
//! is not.

mod bench;
mod cache;
mod chart;
mod draws;
mod growth;
mod line;
mod plan;
mod report;
mod roofline;
mod routing;
mod simulation;
#[cfg(test)]
mod tests;
mod times;
mod trainings;
mod worker;
mod workload;

pub use bench::from_bench;
pub use chart::chart;
pub use growth::{Growth, PerPicture, PerTraining, growth, running_writes_per_second};
pub use plan::{Goal, Planned, most_pictures_per_second, plan};
pub use report::{Latency, Report, TrainingReport};
pub use roofline::{Accelerator, Shape, estimate};
pub use routing::Policy;
pub use simulation::simulate;
pub use times::{Origin, Times};
pub use workload::{Arrivals, Failures, Fleet, Workload};

/// Why an input is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct FleetError {
    /// The key or flag.
    pub field: String,
    /// The requirement.
    pub problem: String,
}

impl FleetError {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }
}
