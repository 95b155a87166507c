//! Signals to other processes that are not sent yet.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use coar_core::ids::GenerationId;

/// How many ended generations are named one by one. Beyond that a single signal covers all of them, and each process
/// checks what it waits for.
const ENDS: usize = 1024;

/// A signal to other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Signal {
    /// Trainings were queued or cancelled, or have ended.
    Trainings,
    /// Generations were queued or cancelled.
    Generations,
    /// One generation has ended.
    End(GenerationId),
    /// More generations have ended than are named.
    Ends,
}

impl std::fmt::Display for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Trainings => f.write_str("trainings"),
            Self::Generations => f.write_str("generations"),
            Self::End(id) => id.fmt(f),
            Self::Ends => f.write_str("ends"),
        }
    }
}

impl std::str::FromStr for Signal {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "trainings" => Ok(Self::Trainings),
            "generations" => Ok(Self::Generations),
            "ends" => Ok(Self::Ends),
            id => id.parse().map(Self::End).map_err(|_| ()),
        }
    }
}

/// Signals to be sent. Each is queued once, so the outbox is bounded however long the database is unavailable.
#[derive(Debug, Clone, Default)]
pub(super) struct Outbox(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    signals: Mutex<BTreeSet<Signal>>,
    added: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Signal>> {
        // The set is valid even if a holder of the lock has panicked.
        self.0.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never blocks.
    pub(super) fn add(&self, signal: Signal) {
        let mut signals = self.lock();
        signals.insert(signal);
        if signals.len() > ENDS {
            signals.retain(|signal| !matches!(signal, Signal::End(_)));
            signals.insert(Signal::Ends);
        }
        drop(signals);
        self.0.added.notify_one();
    }

    /// Takes the queued signals, as soon as there are any.
    pub(super) async fn take(&self) -> BTreeSet<Signal> {
        loop {
            let signals = std::mem::take(&mut *self.lock());
            if !signals.is_empty() {
                return signals;
            }
            self.0.added.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_outbox_is_bounded_and_loses_nothing() {
        let outbox = Outbox::default();
        let (first, second) = (GenerationId::new(), GenerationId::new());
        for signal in [
            Signal::Trainings,
            Signal::End(first),
            Signal::Trainings,
            Signal::End(second),
        ] {
            outbox.add(signal);
        }
        let taken = outbox.take().await;
        assert_eq!(
            taken,
            [Signal::Trainings, Signal::End(first), Signal::End(second)].into()
        );
        // The database is unavailable, and generations end.
        for _ in 0..10 * ENDS {
            outbox.add(Signal::End(GenerationId::new()));
            assert!(outbox.lock().len() <= ENDS);
        }
        outbox.add(Signal::Generations);
        let taken = outbox.take().await;
        assert!(taken.contains(&Signal::Ends) && taken.contains(&Signal::Generations));
        // The next signal wakes a waiting task.
        let waiting = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.take().await }
        });
        outbox.add(Signal::Trainings);
        assert_eq!(waiting.await.unwrap(), [Signal::Trainings].into());
    }

    #[test]
    fn signals_read_back() {
        for signal in [
            Signal::Trainings,
            Signal::Generations,
            Signal::Ends,
            Signal::End(GenerationId::new()),
        ] {
            assert_eq!(signal.to_string().parse(), Ok(signal));
        }
        assert_eq!("concept_1".parse::<Signal>(), Err(()));
    }
}
