//! Routing: which of several workers runs a request.

/// The part of a worker's state that routing uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens of its unfinished requests.
    pub pending_tokens: u64,
    /// Whether the request would find free rows and an empty queue.
    pub begins_at_once: bool,
    /// How many of the request's concepts are resident on its device.
    pub warm_concepts: usize,
}

/// Returns the index of the worker for a request of `tokens` tokens: the one with the least pending work. A worker
/// with more of the request's concepts resident wins if the request starts at once there and its pending work
/// exceeds the minimum by at most one such request. A warm cache is never worth a longer wait: a fuller batch costs
/// every request in it more than a swap does (docs/scaling.md).
pub fn choose_worker(candidates: &[Candidate], tokens: u64) -> Option<usize> {
    let least = candidates.iter().map(|candidate| candidate.pending_tokens).min()?;
    candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| {
            let close = candidate.pending_tokens <= least.saturating_add(tokens);
            candidate.pending_tokens == least || (candidate.begins_at_once && close)
        })
        .min_by_key(|(_, candidate)| (usize::MAX - candidate.warm_concepts, candidate.pending_tokens))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(pending_tokens: u64, begins_at_once: bool, warm_concepts: usize) -> Candidate {
        Candidate {
            pending_tokens,
            begins_at_once,
            warm_concepts,
        }
    }

    #[test]
    fn prefers_the_least_busy_unless_a_warm_one_is_close() {
        assert_eq!(choose_worker(&[], 100), None);
        let busy = candidate(200, true, 0);
        assert_eq!(choose_worker(&[busy, candidate(100, false, 0)], 100), Some(1));
        // Warm, starts at once, and one request more pending: it wins.
        assert_eq!(
            choose_worker(&[candidate(100, true, 0), candidate(200, true, 1)], 100),
            Some(1)
        );
        // Two requests more, or a wait: it does not.
        assert_eq!(
            choose_worker(&[candidate(100, true, 0), candidate(201, true, 1)], 100),
            Some(0)
        );
        assert_eq!(
            choose_worker(&[candidate(100, true, 0), candidate(200, false, 1)], 100),
            Some(0)
        );
        // More resident concepts beat fewer.
        assert_eq!(
            choose_worker(&[candidate(100, true, 1), candidate(150, true, 2)], 100),
            Some(1)
        );
    }
}
