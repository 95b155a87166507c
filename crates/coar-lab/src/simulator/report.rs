//! What a simulation has seen.

use serde::Serialize;

use super::simulation::Request;
use super::trainings::{Training, Trainings};
use super::worker::Meter;
use super::workload::{Fleet, Workload};

/// Quantiles of some seconds.
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
        // The nearest rank, as `coar-lab bench` takes it.
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

/// Of trainings.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TrainingReport {
    /// That were asked for after the warm-up.
    pub asked: u64,
    /// Of those, that have ended before the simulation did.
    pub done: u64,
    /// Seconds until a worker has begun it, of those that were begun.
    pub wait: Latency,
    /// Seconds from being asked for to being done.
    pub duration: Latency,
    /// That waited when the last request had come.
    pub waiting_at_end: usize,
}

/// What a simulation has seen. Seconds, and per second, unless the name says other units. Rates and shares are of the
/// time after the warm-up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub workers: usize,
    /// Asked for.
    pub pictures_per_second: f64,
    /// Delivered.
    pub done_per_second: f64,
    /// From asking to the last pixel.
    pub latency: Latency,
    pub first_code: Latency,
    /// Part of the time that devices are at work: on images and on trainings.
    pub utilisation: f64,
    pub drawing: f64,
    pub training: f64,
    /// Mean rows of the batch while images are drawn.
    pub rows: f64,
    /// Part of the images that was refused with 429.
    pub refused: f64,
    /// Part of the concepts that was on the device already.
    pub concept_hits: f64,
    /// Mean number of images in the system.
    pub in_system: f64,
    pub trainings: TrainingReport,
    /// Of the whole time, the warm-up included: asked for, delivered, refused, and in the system when the last was asked for.
    pub asked: u64,
    pub done: u64,
    pub refused_pictures: u64,
    pub in_system_at_end: u64,
    /// Delivered after that.
    pub done_later: u64,
    pub deaths: u64,
    /// Images that a death has interrupted.
    pub interrupted: u64,
    pub events: u64,
}

/// Counted on the way.
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

/// Puts it together.
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
    // All at once: the time is that until the last is there.
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
