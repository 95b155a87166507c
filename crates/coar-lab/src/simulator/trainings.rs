//! Trainings: one queue for all workers, which take from it when they have a free slot.

use std::collections::VecDeque;

use super::worker::Worker;

/// One training.
#[derive(Debug, Clone, Copy)]
pub(super) struct Training {
    pub asked: f64,
    pub begun: Option<f64>,
    pub done: Option<f64>,
    /// Remaining steps, according to the last checkpoint.
    pub left: f64,
}

/// All trainings.
#[derive(Debug, Default)]
pub(super) struct Trainings {
    pub all: Vec<Training>,
    waiting: VecDeque<usize>,
}

impl Trainings {
    /// A training is requested.
    pub fn add(&mut self, now: f64, steps: f64) {
        self.waiting.push_back(self.all.len());
        self.all.push(Training {
            asked: now,
            begun: None,
            done: None,
            left: steps,
        });
    }

    /// Interrupted trainings go first.
    pub fn again(&mut self, training: usize) {
        self.waiting.push_front(training);
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Assigns the next one to the worker with a free slot and the least work; returns that worker.
    pub fn hand_out(&mut self, now: f64, workers: &mut [Worker], slots: usize) -> Option<usize> {
        if self.waiting.is_empty() {
            return None;
        }
        let (index, worker) = workers
            .iter_mut()
            .enumerate()
            .filter(|(_, worker)| worker.up && worker.trains && worker.trainings() < slots)
            .min_by_key(|(_, worker)| (worker.trainings(), worker.load()))?;
        let training = self.waiting.pop_front()?;
        let known = &mut self.all[training];
        known.begun.get_or_insert(now);
        worker.train(training, known.left);
        Some(index)
    }
}
