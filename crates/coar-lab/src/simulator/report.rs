//! Results of a simulation.

use serde::Serialize;

use super::simulation::Request;
use super::trainings::{Training, Trainings};
use super::worker::Meter;
use super::workload::{Fleet, Workload};

/// Quantiles of durations in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub p999: f64,
    pub largest: f64,
}

impl Latency {
    fn of(mut seconds: Vec<f64>) -> Self {
        if seconds.is_empty() {
            return Self::default();
        }
        seconds.sort_by(f64::total_cmp);
        // The nearest rank, as in `coar-lab bench`.
        let at = |part: f64| seconds[(part * (seconds.len() - 1) as f64).round() as usize];
        Self {
            mean: seconds.iter().sum::<f64>() / seconds.len() as f64,
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            largest: at(1.0),
        }
    }
}

/// Results for trainings.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TrainingReport {
    /// Requested after the warm-up.
    pub asked: u64,
    /// Of those, completed before the end of the simulation.
    pub done: u64,
    /// Seconds until the training starts, of those that started.
    pub wait: Latency,
    /// Seconds from request to completion.
    pub duration: Latency,
    /// Queued when the last request arrived.
    pub waiting_at_end: usize,
}

/// Results of a simulation. Seconds, and per second, unless the name says otherwise. Rates and shares are of the
/// time after the warm-up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub workers: usize,
    /// Requested.
    pub pictures_per_second: f64,
    /// Delivered.
    pub done_per_second: f64,
    /// From request to the last pixel.
    pub latency: Latency,
    pub first_code: Latency,
    /// Share of the time that devices are busy: with images and with trainings.
    pub utilisation: f64,
    pub drawing: f64,
    pub training: f64,
    /// Mean rows of the batch while it is not empty.
    pub rows: f64,
    /// Share of images rejected with 429.
    pub refused: f64,
    /// Share of concepts that were resident.
    pub concept_hits: f64,
    /// Mean number of images in the system.
    pub in_system: f64,
    pub trainings: TrainingReport,
    /// Over the whole time, including the warm-up: requested, delivered, rejected, and in the system at the last
    /// request.
    pub asked: u64,
    pub done: u64,
    pub refused_pictures: u64,
    pub in_system_at_end: u64,
    /// Delivered after that.
    pub done_later: u64,
    pub deaths: u64,
    /// Images interrupted by the death of a worker.
    pub interrupted: u64,
    pub events: u64,
}

/// Counters during the simulation.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub asked: u64,
    pub done: u64,
    pub refused: u64,
    refused_counted: u64,
    pub in_system_at_end: u64,
    pub trainings_waiting_at_end: usize,
    /// Images in the system times seconds, after the warm-up.
    pub integral: f64,
    pub deaths: u64,
    pub interrupted: u64,
    pub events: u64,
    hits: u64,
    misses: u64,
}

impl Seen {
    pub fn in_system(&self) -> u64 {
        self.asked - self.refused - self.done
    }

    pub fn refuse(&mut self, counted: bool) {
        self.refused += 1;
        self.refused_counted += u64::from(counted);
    }

    pub fn concept(&mut self, cold: bool) {
        match cold {
            true => self.misses += 1,
            false => self.hits += 1,
        }
    }
}

fn part(of: f64, whole: f64) -> f64 {
    if whole > 0.0 { of / whole } else { 0.0 }
}

/// Computes the report.
pub(super) fn report(
    (workload, fleet): (&Workload, &Fleet),
    requests: &[Request],
    trainings: &Trainings,
    meters: &[Meter],
    seen: &Seen,
) -> Report {
    let counted: Vec<&Request> = requests.iter().filter(|one| one.asked >= workload.warm_up).collect();
    let since = |to: fn(&Request) -> Option<f64>| -> Latency {
        Latency::of(counted.iter().filter_map(|one| Some(to(one)? - one.asked)).collect())
    };
    // If all arrive at once, the duration ends when the last is done.
    let last = requests.iter().filter_map(|one| one.done).fold(0.0, f64::max);
    let (from, to) = match workload.is_steady() {
        true => (workload.warm_up, workload.seconds),
        false => (0.0, last),
    };
    let span = to - from;
    let within = |at: f64| at > from && at <= to;
    let done = requests.iter().filter(|one| one.done.is_some_and(within)).count();
    let sum = |of: fn(&Meter) -> f64| meters.iter().map(of).sum::<f64>();
    let device = span * fleet.workers as f64;
    let (drawing, training) = (sum(|meter| meter.drawing), sum(|meter| meter.training));
    Report {
        workers: fleet.workers,
        pictures_per_second: part(counted.len() as f64 + seen.refused_counted as f64, span),
        done_per_second: part(done as f64, span),
        latency: since(|one| one.done),
        first_code: since(|one| one.first_code),
        utilisation: part(drawing + training, device),
        drawing: part(drawing, device),
        training: part(training, device),
        rows: part(sum(|meter| meter.row_seconds), drawing),
        refused: part(
            seen.refused_counted as f64,
            counted.len() as f64 + seen.refused_counted as f64,
        ),
        concept_hits: part(seen.hits as f64, (seen.hits + seen.misses) as f64),
        in_system: part(seen.integral, workload.seconds - workload.warm_up),
        trainings: of_trainings(workload, trainings, seen),
        asked: seen.asked,
        done: seen.done,
        refused_pictures: seen.refused,
        in_system_at_end: seen.in_system_at_end,
        done_later: seen.in_system_at_end - seen.in_system().min(seen.in_system_at_end),
        deaths: seen.deaths,
        interrupted: seen.interrupted,
        events: seen.events,
    }
}

fn of_trainings(workload: &Workload, trainings: &Trainings, seen: &Seen) -> TrainingReport {
    let counted: Vec<&Training> = trainings
        .all
        .iter()
        .filter(|one| one.asked >= workload.warm_up)
        .collect();
    let since = |to: fn(&Training) -> Option<f64>| -> Latency {
        Latency::of(counted.iter().filter_map(|one| Some(to(one)? - one.asked)).collect())
    };
    TrainingReport {
        asked: counted.len() as u64,
        done: counted.iter().filter(|one| one.done.is_some()).count() as u64,
        wait: since(|one| one.begun),
        duration: since(|one| one.done),
        waiting_at_end: seen.trainings_waiting_at_end,
    }
}
