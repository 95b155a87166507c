//! Waiting for one generation's end: an end wakes whoever waits for that generation, and nobody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Wake;
use super::outbox::{Outbox, Signal};
use coar_core::ids::GenerationId;

/// Who waits for which end.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    awaited: Arc<Mutex<HashMap<GenerationId, Awaited>>>,
    /// `None`: there are no other processes.
    others: Option<Outbox>,
}

#[derive(Debug, Default)]
struct Awaited {
    wake: Wake,
    interests: usize,
}

/// Somebody's interest in one generation's end.
#[derive(Debug)]
pub struct Interest {
    ends: Ends,
    id: GenerationId,
    wake: Wake,
}

impl Ends {
    fn lock(&self) -> MutexGuard<'_, HashMap<GenerationId, Awaited>> {
        // Nothing in it can be half-written.
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn interest(&self, id: GenerationId) -> Interest {
        let mut all = self.lock();
        let awaited = all.entry(id).or_default();
        awaited.interests += 1;
        Interest {
            ends: self.clone(),
            id,
            wake: awaited.wake.clone(),
        }
    }

    /// Heard by other processes too.
    pub(super) fn shared(others: Outbox) -> Self {
        Self {
            awaited: Arc::default(),
            others: Some(others),
        }
    }

    /// The generation has ended, or is gone.
    pub(super) fn tell(&self, id: GenerationId) {
        self.here(id);
        if let Some(others) = &self.others {
            others.add(Signal::End(id));
        }
    }

    /// Tells this process alone.
    pub(super) fn here(&self, id: GenerationId) {
        if let Some(awaited) = self.lock().get(&id) {
            awaited.wake.now();
        }
    }
}

impl Ends {
    /// Many have ended elsewhere: in this process everybody who waits for one looks.
    pub(super) fn all_here(&self) {
        for awaited in self.lock().values() {
            awaited.wake.now();
        }
    }
}

impl Interest {
    /// Resolves when the generation ends; an end after this call is not missed.
    pub fn woken(&self) -> impl Future<Output = ()> + use<> {
        self.wake.woken()
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        let mut all = self.ends.lock();
        if let Some(awaited) = all.get_mut(&self.id) {
            awaited.interests -= 1;
            if awaited.interests == 0 {
                all.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn an_end_wakes_those_who_wait_for_it_alone() {
        let (ends, id) = (Ends::default(), GenerationId::new());
        let (one, two, other) = (ends.interest(id), ends.interest(id), ends.interest(GenerationId::new()));
        let (first, second, third) = (one.woken(), two.woken(), other.woken());
        ends.tell(id);
        assert!(first.now_or_never().is_some() && second.now_or_never().is_some());
        assert!(third.now_or_never().is_none());
        let all = [&one, &two, &other].map(Interest::woken);
        ends.all_here();
        assert!(all.into_iter().all(|woken| woken.now_or_never().is_some()));
        drop((one, two, other));
        assert!(ends.lock().is_empty(), "nothing is left of those who have gone");
    }
}
