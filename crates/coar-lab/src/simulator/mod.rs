//! A fleet of workers on paper: what a discrete-event simulation and a few closed forms say of machines that are not
//! here, out of step times that were measured or estimated.
//!
//! Every result depends on its input file and its seed alone. What is simulated and what is left out stands in
//! `docs/scaling.md`.

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

/// What is wrong with an input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct FleetError {
    /// The key or flag.
    pub field: String,
    /// What was expected of it.
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
