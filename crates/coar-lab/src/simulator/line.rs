//! The event queue.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A simulated event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Event {
    /// An image is requested.
    Picture,
    /// A training is requested.
    Training,
    /// A request has reached its worker, with its concept.
    Enters {
        request: usize,
        attempt: u32,
    },
    /// A worker's slice ends. If the slice was cut short or the worker has died, the number no longer matches.
    TurnEnds {
        worker: usize,
        turn: u64,
    },
    /// An image's pixels are done.
    Drawn {
        request: usize,
        attempt: u32,
    },
    Dies {
        worker: usize,
    },
    Lives {
        worker: usize,
    },
    /// The lease on a dead worker's request has expired.
    Returns {
        request: usize,
    },
    /// The same for a training.
    TrainingReturns {
        training: usize,
    },
}

#[derive(Debug)]
struct Entry {
    at: f64,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.number.cmp(&other.number))
    }
}

/// Events in the order of their time; simultaneous ones in the order in which they were scheduled.
#[derive(Debug, Default)]
pub(super) struct TimeLine {
    heap: BinaryHeap<Reverse<Entry>>,
    planned: u64,
}

impl TimeLine {
    pub fn plan(&mut self, at: f64, event: Event) {
        self.planned += 1;
        let number = self.planned;
        self.heap.push(Reverse(Entry { at, number, event }));
    }

    pub fn next(&mut self) -> Option<(f64, Event)> {
        self.heap.pop().map(|Reverse(entry)| (entry.at, entry.event))
    }

    /// Number of events scheduled so far.
    pub fn planned(&self) -> u64 {
        self.planned
    }
}
