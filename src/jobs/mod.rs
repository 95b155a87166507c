//! Work that outlives a request: trainings, generations, web-hooks, and the removal of what has expired. It holds no
//! tensors; the engine is reached through its door alone.

/// Does something with the registry until it succeeds, fails for good, or has failed for so long. A macro: futures that
/// borrow from closures cannot be sent between threads yet.
macro_rules! patiently {
    ($within:expr, $attempt:expr) => {{
        let since = tokio::time::Instant::now();
        loop {
            match $attempt {
                Err(error) if error.may_pass() && since.elapsed() < $within => {
                    tracing::warn!(%error, "the registry does not answer as it should; it is tried again");
                    tokio::time::sleep($crate::jobs::AGAIN).await;
                }
                outcome => break outcome,
            }
        }
    }};
}

mod address;
mod draw;
mod ends;
mod outbox;
mod previews;
mod progress;
mod sweeper;
mod train_concept;
mod webhook;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::registry::{Backend, LOST_AFTER_MS, Registry, RegistryError};
pub use address::AddressPolicy;
use coar_core::engine::EngineHandle;
pub use draw::{DrawEvent, Drawings, Held, Waiting, provenance};
pub use ends::{Ends, Interest};
use outbox::{Outbox, Signal};
pub use sweeper::sweep;
pub use webhook::{Describe, Webhooks, deliver, iso_8601};

/// The code of an error that says that another process has taken something over.
pub(crate) const LEASE_LOST: &str = "lease_lost";
/// How long a claimed training stays claimed without a sign of life: as long as a process counts as living.
pub(crate) const LEASE_MS: i64 = LOST_AFTER_MS;
/// Without a wake-up the queue is looked at this often.
const POLL: Duration = Duration::from_secs(2);

/// Wakes whoever waits for something: in this process, and in the others of the same database.
#[derive(Debug, Clone, Default)]
pub struct Wake {
    here: Arc<Notify>,
    /// `None`: there are no others.
    others: Option<(Signal, Outbox)>,
}

impl Wake {
    /// Something was queued, cancelled, or has ended.
    pub fn now(&self) {
        self.here();
        if let Some((signal, others)) = &self.others {
            others.add(*signal);
        }
    }

    /// Wakes this process alone.
    fn here(&self) {
        self.here.notify_waiters();
    }

    /// Resolves at the next wake-up; interest is registered when this is called.
    pub fn woken(&self) -> impl Future<Output = ()> + use<> {
        self.here.clone().notified_owned()
    }
}

/// What processes of one database tell each other.
#[derive(Debug, Clone, Default)]
pub struct Wakes {
    /// Trainings were queued or cancelled, or have ended.
    pub trainings: Wake,
    /// Generations were queued or cancelled.
    pub generations: Wake,
    /// Generations have ended.
    pub ends: Ends,
}

impl Wakes {
    /// Of a registry that several processes share; without others the same as the default.
    pub fn shared(registry: &Registry, stop: &CancellationToken, tracker: &TaskTracker) -> Self {
        if registry.backend() == Backend::Sqlite {
            return Self::default();
        }
        let others = Outbox::default();
        let wake = |signal| Wake {
            here: Arc::default(),
            others: Some((signal, others.clone())),
        };
        let wakes = Self {
            trainings: wake(Signal::Trainings),
            generations: wake(Signal::Generations),
            ends: Ends::shared(others.clone()),
        };
        tracker.spawn(tell(registry.clone(), others, stop.clone()));
        tracker.spawn(listen(registry.clone(), wakes.clone(), stop.clone()));
        wakes
    }
}

/// When the database does not answer, it is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);

async fn tell(registry: Registry, outbox: Outbox, stop: CancellationToken) {
    loop {
        let signals = tokio::select! {
            signals = outbox.take() => signals,
            () = stop.cancelled() => return,
        };
        for signal in signals {
            if let Err(error) = registry.signal(&signal.to_string()).await {
                tracing::debug!(%error, %signal, "other processes were not notified; they poll");
            }
        }
    }
}

async fn listen(registry: Registry, wakes: Wakes, stop: CancellationToken) {
    let hear = async {
        loop {
            let outcome: Result<(), RegistryError> = async {
                let Some(mut signals) = registry.signals().await? else {
                    return Ok(());
                };
                loop {
                    let text = signals.next().await?;
                    match text.parse() {
                        Ok(Signal::Trainings) => wakes.trainings.here(),
                        Ok(Signal::Generations) => wakes.generations.here(),
                        Ok(Signal::End(generation)) => wakes.ends.here(generation),
                        Ok(Signal::Ends) => wakes.ends.all_here(),
                        Err(()) => tracing::debug!(text, "unknown signal"),
                    }
                }
            }
            .await;
            if let Err(error) = outcome {
                tracing::warn!(%error, "signals of other processes cannot be heard; this one looks by itself");
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = hear => {}
        () = stop.cancelled() => {}
    }
}

/// One of the workers; as many trainings run at once as there are.
#[derive(Debug, Clone)]
pub struct Worker {
    pub registry: Registry,
    pub engine: EngineHandle,
    pub wake: Wake,
    pub stop: CancellationToken,
    /// Images that each training draws on its way; 0: none.
    pub previews: u32,
}

impl Worker {
    /// Works on queued trainings, one at a time, until it is to stop.
    pub async fn work(self) {
        while !self.stop.is_cancelled() {
            // Interest is registered before looking, so that no wake-up in between is lost.
            let woken = self.wake.woken();
            match self.registry.claim_training(LEASE_MS).await {
                Ok(Some(claimed)) => {
                    self.train_concept(claimed).await;
                    continue;
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the queue of trainings cannot be read"),
            }
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(POLL) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }
}
