//! Routing policies.

use coar_core::routing::{Candidate, choose_worker};
use serde::Serialize;

use super::draws::Draws;
use super::worker::Worker;

/// The routing policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Any live worker.
    Random,
    /// The one with the fewest running and queued images; beside a training they count for more.
    LeastLoaded,
    /// The server's policy.
    Server,
}

impl Policy {
    /// Picks the worker for an image of `codes` codes with `concept`; `None` if every worker is dead or full.
    pub(super) fn choose(
        self,
        workers: &[Worker],
        (concept, codes): (Option<u32>, u32),
        draws: &mut Draws,
    ) -> Option<usize> {
        if self == Self::Random {
            return random(workers, draws);
        }
        if self == Self::Server {
            let able: Vec<usize> = (0..workers.len()).filter(|&index| workers[index].has_room()).collect();
            let candidates: Vec<Candidate> = able
                .iter()
                .map(|&index| workers[index].candidate(concept, codes))
                .collect();
            return choose_worker(&candidates, codes.into()).map(|chosen| able[chosen]);
        }
        least(workers, Worker::has_room)
    }
}

/// A uniformly random live worker; full ones reject the request.
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
