//! Work that outlives a request: trainings, generations, webhooks, and the removal of expired data. This module
//! holds no tensors; it uses the engine through its handle.

/// Retries a registry operation until it succeeds, fails permanently, or has failed for the given time. A macro,
/// since futures that borrow from closures cannot be sent between threads yet.
macro_rules! retry_transient {
    ($within:expr, $attempt:expr) => {{
        let since = tokio::time::Instant::now();
        loop {
            match $attempt {
                Err(error) if error.is_transient() && since.elapsed() < $within => {
                    tracing::warn!(%error, "transient registry error; retrying");
                    tokio::time::sleep($crate::jobs::RETRY_DELAY).await;
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

use crate::decoders::Decoders;
use crate::registry::{Backend, LOST_AFTER_MS, Registry, RegistryError};
pub use address::AddressPolicy;
use coar_core::engine::EngineHandle;
pub use draw::{DrawEvent, Drawings, Held, Waiting, provenance};
pub use ends::{Ends, Interest};
use outbox::{Outbox, Signal};
pub use sweeper::sweep;
pub use webhook::{Describe, Webhooks, deliver, iso_8601};

pub(crate) use crate::registry::LEASE_LOST;
/// How long a training's lease lasts without renewal: as long as a process counts as alive.
pub(crate) const LEASE_MS: i64 = LOST_AFTER_MS;
/// Poll interval of the queue without a notification.
const POLL: Duration = Duration::from_secs(2);

/// Notifies waiting tasks, in this process and in the others of the same database.
#[derive(Debug, Clone, Default)]
pub struct Wake {
    local: Arc<Notify>,
    /// `None`: there are no others.
    others: Option<(Signal, Outbox)>,
}

impl Wake {
    /// Notifies that something was queued, cancelled, or has ended.
    pub fn now(&self) {
        self.notify_local();
        if let Some((signal, others)) = &self.others {
            others.add(*signal);
        }
    }

    /// Notifies this process only.
    fn notify_local(&self) {
        self.local.notify_waiters();
    }

    /// Resolves at the next notification after this call.
    pub fn woken(&self) -> impl Future<Output = ()> + use<> {
        self.local.clone().notified_owned()
    }
}

/// Notifications between the processes of one database.
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
    /// For a registry that several processes share; otherwise the same as the default.
    pub fn shared(registry: &Registry, stop: &CancellationToken, tracker: &TaskTracker) -> Self {
        if registry.backend() == Backend::Sqlite {
            return Self::default();
        }
        let others = Outbox::default();
        let wake = |signal| Wake {
            local: Arc::default(),
            others: Some((signal, others.clone())),
        };
        let wakes = Self {
            trainings: wake(Signal::Trainings),
            generations: wake(Signal::Generations),
            ends: Ends::shared(others.clone()),
        };
        tracker.spawn(send_signals(registry.clone(), others, stop.clone()));
        tracker.spawn(receive_signals(registry.clone(), wakes.clone(), stop.clone()));
        wakes
    }
}

/// Delay before a retry when the database does not answer.
const RETRY_DELAY: Duration = Duration::from_secs(1);

async fn send_signals(registry: Registry, outbox: Outbox, stop: CancellationToken) {
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

async fn receive_signals(registry: Registry, wakes: Wakes, stop: CancellationToken) {
    let receive = async {
        loop {
            let outcome: Result<(), RegistryError> = async {
                let Some(mut signals) = registry.signals().await? else {
                    return Ok(());
                };
                loop {
                    let text = signals.next().await?;
                    match text.parse() {
                        Ok(Signal::Trainings) => wakes.trainings.notify_local(),
                        Ok(Signal::Generations) => wakes.generations.notify_local(),
                        Ok(Signal::End(generation)) => wakes.ends.notify_local(generation),
                        Ok(Signal::Ends) => wakes.ends.notify_all_local(),
                        Err(()) => tracing::debug!(text, "unknown signal"),
                    }
                }
            }
            .await;
            if let Err(error) = outcome {
                tracing::warn!(%error, "cannot receive signals of other processes; polling");
            }
            tokio::time::sleep(RETRY_DELAY).await;
        }
    };
    tokio::select! {
        () = receive => {}
        () = stop.cancelled() => {}
    }
}

/// One training worker; as many trainings run at once as there are workers.
#[derive(Debug, Clone)]
pub struct Worker {
    pub registry: Registry,
    pub engine: EngineHandle,
    pub wake: Wake,
    pub stop: CancellationToken,
    /// Preview images per training; 0: none.
    pub previews: u32,
    /// Where reference images are decoded.
    pub decoders: Arc<Decoders>,
}

impl Worker {
    /// Runs queued trainings, one at a time, until `stop`.
    pub async fn work(self) {
        while !self.stop.is_cancelled() {
            // Subscribe before reading the queue, so no notification is missed.
            let woken = self.wake.woken();
            match self.registry.claim_training(LEASE_MS).await {
                Ok(Some(claimed)) => {
                    self.train_concept(claimed).await;
                    continue;
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "cannot read the queue of trainings"),
            }
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(POLL) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }
}
