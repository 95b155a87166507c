//! The required number of workers.

use serde::Serialize;

use super::report::Report;
use super::simulation::simulate;
use super::times::Times;
use super::workload::{Fleet, Workload};
use super::{Arrivals, FleetError};

/// The goal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Goal {
    /// The 95th percentile of the time from request to image, in seconds.
    pub p95: f64,
    /// Maximum share of rejected images.
    pub refused: f64,
    /// The 95th percentile of the seconds until a training starts.
    pub training_wait: f64,
}

/// A result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Planned {
    /// The minimum number of workers that reaches the goal; `None`: a single image takes longer than the goal.
    pub workers: Option<usize>,
    /// The lower bound by device time, with full batches and no waiting.
    pub at_least: usize,
    /// With that many workers, or with the maximum that was tried.
    pub report: Report,
}

/// Maximum number of workers tried.
const MAX: usize = 20_000;
/// Minimum number of simulated images.
const PICTURES: f64 = 20_000.0;

/// Device seconds of one image in a full batch, weighted by size.
fn picture_seconds(times: &Times) -> f64 {
    let places = times.places() as f64;
    times.mean_of(|size| {
        let context = f64::from(size.prompt_tokens) + f64::from(size.codes + size.row_ends) / 2.0;
        let rows = times.engine.rows as f64;
        let step = times.decode.step(rows, rows * context);
        (size.prefill_ms + size.pixels_device_ms) / 1e3 + f64::from(size.codes) * step / places
    })
}

/// Device seconds of one training.
fn training_seconds(times: &Times) -> f64 {
    times.training_steps() * times.training_step()
}

/// Maximum images per second of one worker: always a full batch, and no training.
pub fn most_pictures_per_second(times: &Times) -> f64 {
    1.0 / picture_seconds(times)
}

/// The duration for enough images and, if there are any, several consecutive trainings.
fn duration(times: &Times, workload: &Workload) -> f64 {
    let pictures = PICTURES / workload.pictures_per_second.max(1e-9);
    let batch = 40.0 * picture_seconds(times) * times.places() as f64;
    let trainings = match workload.trainings_per_hour > 0.0 {
        true => 10.0 * training_seconds(times),
        false => 0.0,
    };
    let bursts = match workload.arrivals {
        Arrivals::Bursty { seconds, .. } => 200.0 * seconds,
        _ => 0.0,
    };
    pictures.max(batch).max(trainings).max(bursts)
}

/// Whether the goal is reached.
fn reached(goal: &Goal, report: &Report) -> bool {
    let trainings = &report.trainings;
    let all_begun = trainings.waiting_at_end as f64 <= (0.05 * trainings.asked as f64).max(1.0);
    report.latency.p95 <= goal.p95
        && report.refused <= goal.refused
        && trainings.wait.p95 <= goal.training_wait
        && all_begun
}

/// The minimum number of workers with which `workload` meets `goal`; `fleet.workers` is ignored. The simulated time
/// is chosen here. Assumes that fewer workers are never better.
///
/// # Errors
/// The first invalid number.
pub fn plan(times: &Times, workload: &Workload, fleet: &Fleet, goal: &Goal, seed: u64) -> Result<Planned, FleetError> {
    let seconds = duration(times, workload);
    let workload = Workload {
        seconds,
        warm_up: 0.2 * seconds,
        ..workload.clone()
    };
    let with = |workers: usize| {
        let fleet = Fleet {
            workers,
            ..fleet.clone()
        };
        simulate(times, &workload, &fleet, seed)
    };
    let needed = workload.pictures_per_second * picture_seconds(times)
        + workload.trainings_per_hour / 3600.0 * training_seconds(times);
    let at_least = (needed.ceil() as usize).clamp(fleet.training_workers + 1, MAX);
    let (mut too_few, mut step, mut enough) = (at_least - 1, 1, None);
    let mut last = at_least;
    while enough.is_none() && last <= MAX && last <= 3 * at_least + 20 {
        let report = with(last)?;
        match reached(goal, &report) {
            true => enough = Some((last, report)),
            false => {
                too_few = last;
                last += step;
                step *= 2;
            }
        }
    }
    let Some((mut workers, mut report)) = enough else {
        let report = with(too_few.max(at_least))?;
        return Ok(Planned {
            workers: None,
            at_least,
            report,
        });
    };
    while workers - too_few > 1 {
        let middle = too_few + (workers - too_few) / 2;
        let tried = with(middle)?;
        match reached(goal, &tried) {
            true => (workers, report) = (middle, tried),
            false => too_few = middle,
        }
    }
    Ok(Planned {
        workers: Some(workers),
        at_least,
        report,
    })
}
