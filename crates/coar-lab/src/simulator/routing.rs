//! Which worker a request goes to.

use serde::Serialize;

use super::draws::Draws;
use super::worker::Worker;

/// How requests are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Any worker that lives.
    Random,
    /// The one with the fewest pictures at work and waiting; beside a training they count for more.
    LeastLoaded,
    /// One that has the concept on its device, if it would begin at once and beside no training; else the least loaded.
    ConceptHot,
}

impl Policy {
    /// The worker for a picture with `concept`; `None` where every worker is dead or full.
    pub(super) fn choose(self, workers: &[Worker], concept: Option<u32>, draws: &mut Draws) -> Option<usize> {
        if self == Self::Random {
            return random(workers, draws);
        }
        if let (Self::ConceptHot, Some(concept)) = (self, concept) {
            // Free rows and an empty queue: it takes nobody's turn.
            let hot = least(workers, |worker| {
                worker.begins_at_once() && worker.cache.is_hot(concept)
            });
            if hot.is_some() {
                return hot;
            }
        }
        least(workers, Worker::has_room)
    }
}

/// One of those that live, each as likely; full ones refuse.
fn random(workers: &[Worker], draws: &mut Draws) -> Option<usize> {
    let alive = workers.iter().filter(|worker| worker.up && worker.draws).count();
    if alive == 0 {
        return None;
    }
    let nth = draws.below(alive);
    let (index, worker) = workers
        .iter()
        .enumerate()
        .filter(|(_, worker)| worker.up && worker.draws)
        .nth(nth)?;
    worker.has_room().then_some(index)
}

fn least(workers: &[Worker], admitted: impl Fn(&Worker) -> bool) -> Option<usize> {
    workers
        .iter()
        .enumerate()
        .filter(|(_, worker)| admitted(worker))
        .min_by(|(_, a), (_, b)| a.slowness().total_cmp(&b.slowness()))
        .map(|(index, _)| index)
}
