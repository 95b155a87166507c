//! Which of several workers draws next.

/// A worker, as far as the choice looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens of the requests that it has and that have not ended.
    pub pending_tokens: u64,
    /// Whether the request would find rows free and nothing waiting before it.
    pub begins_at_once: bool,
    /// How many of the request's concepts are on its device.
    pub warm_concepts: usize,
}

/// The index of the worker for a request of `tokens` tokens: the one with the least to do; but one that has more of the
/// request's concepts on its device wins where the request begins at once and where it has at most one such request more
/// to do than the least busy one. Nobody waits longer for the sake of a warm cache: a fuller batch costs everybody in it
/// more than a swap does (docs/scaling.md).
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
    fn the_least_busy_worker_draws_unless_a_warm_one_is_as_good() {
        assert_eq!(choose_worker(&[], 100), None);
        let busy = candidate(200, true, 0);
        assert_eq!(choose_worker(&[busy, candidate(100, false, 0)], 100), Some(1));
        // Warm, begins at once, and one request more to do: it wins.
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
        // More of its concepts beat fewer.
        assert_eq!(
            choose_worker(&[candidate(100, true, 1), candidate(150, true, 2)], 100),
            Some(1)
        );
    }
}
