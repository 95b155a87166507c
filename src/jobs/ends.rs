//! Notifications about the end of a generation, for the subscribers of that generation only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Wake;
use super::outbox::{Outbox, Signal};
use coar_core::ids::GenerationId;

/// Subscriptions by generation.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    awaited: Arc<Mutex<HashMap<GenerationId, Awaited>>>,
    /// `None`: there are no other processes.
    others: Option<Outbox>,
}

#[derive(Debug, Default)]
struct Awaited {
    wake: Wake,
    subscribers: usize,
}

/// A subscription to one generation's end.
#[derive(Debug)]
pub struct Interest {
    ends: Ends,
    id: GenerationId,
    wake: Wake,
}

impl Ends {
    fn lock(&self) -> MutexGuard<'_, HashMap<GenerationId, Awaited>> {
        // The map is valid even if a holder of the lock has panicked.
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn interest(&self, id: GenerationId) -> Interest {
        let mut all = self.lock();
        let awaited = all.entry(id).or_default();
        awaited.subscribers += 1;
        Interest {
            ends: self.clone(),
            id,
            wake: awaited.wake.clone(),
        }
    }

    /// With notifications for other processes.
    pub(super) fn shared(others: Outbox) -> Self {
        Self {
            awaited: Arc::default(),
            others: Some(others),
        }
    }

    /// Notifies that the generation has ended or was deleted.
    pub(super) fn notify(&self, id: GenerationId) {
        self.notify_local(id);
        if let Some(others) = &self.others {
            others.add(Signal::End(id));
        }
    }

    /// Notifies subscribers in this process.
    pub(super) fn notify_local(&self, id: GenerationId) {
        if let Some(awaited) = self.lock().get(&id) {
            awaited.wake.now();
        }
    }
}

impl Ends {
    /// Many generations have ended elsewhere: notifies every subscriber in this process.
    pub(super) fn notify_all_local(&self) {
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
            awaited.subscribers -= 1;
            if awaited.subscribers == 0 {
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
    fn an_end_notifies_its_subscribers_only() {
        let (ends, id) = (Ends::default(), GenerationId::new());
        let (one, two, other) = (ends.interest(id), ends.interest(id), ends.interest(GenerationId::new()));
        let (first, second, third) = (one.woken(), two.woken(), other.woken());
        ends.notify(id);
        assert!(first.now_or_never().is_some() && second.now_or_never().is_some());
        assert!(third.now_or_never().is_none());
        let all = [&one, &two, &other].map(Interest::woken);
        ends.notify_all_local();
        assert!(all.into_iter().all(|woken| woken.now_or_never().is_some()));
        drop((one, two, other));
        assert!(ends.lock().is_empty(), "dropped subscriptions are removed");
    }
}
