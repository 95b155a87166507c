//! Signals to other processes that are not sent yet.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use coar_core::ids::GenerationId;

/// Generations whose ends are kept apart. Beyond that one signal stands for all of them: each process then looks at what it
/// waits for.
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

/// Signals that wait to be sent. Each waits once, so that their number is bounded however long the database is away.
#[derive(Debug, Clone, Default)]
pub(super) struct Outbox(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    signals: Mutex<BTreeSet<Signal>>,
    added: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Signal>> {
        // Nothing in it can be half-written.
        self.0.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never waits.
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

    /// What waits, as soon as something does.
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
        // The database is away, and generations end.
        for _ in 0..10 * ENDS {
            outbox.add(Signal::End(GenerationId::new()));
            assert!(outbox.lock().len() <= ENDS);
        }
        outbox.add(Signal::Generations);
        let taken = outbox.take().await;
        assert!(taken.contains(&Signal::Ends) && taken.contains(&Signal::Generations));
        // A waiting task is woken by the next signal.
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
