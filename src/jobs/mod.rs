//! Work that outlives a request: trainings, generations, web-hooks, and the removal of what has expired. It holds no
//! tensors; the engine is reached through its door alone.

mod address;
mod draw;
mod ends;
mod previews;
mod progress;
mod sweeper;
mod train_concept;
mod webhook;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::engine::EngineHandle;
use crate::registry::Registry;
pub use address::AddressPolicy;
pub use draw::{DrawEvent, Drawings, Held, Waiting, concept_use, engine_request, provenance};
pub use ends::Interest;
pub use sweeper::sweep;
pub use webhook::{Describe, Webhooks, deliver};

/// How long a claimed training stays claimed without a sign of life.
pub(crate) const LEASE_MS: i64 = 30_000;
/// Without a wake-up the queue is looked at this often.
const POLL: Duration = Duration::from_secs(2);

/// Wakes the workers when something was queued.
#[derive(Debug, Clone, Default)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// Something was queued or cancelled.
    pub fn now(&self) {
        self.0.notify_waiters();
    }

    /// Resolves at the next wake-up; interest is registered when this is called.
    pub fn woken(&self) -> impl Future<Output = ()> + use<> {
        self.0.clone().notified_owned()
    }
}

/// One of the workers; as many trainings run at once as there are.
#[derive(Debug, Clone)]
pub struct Worker {
    pub registry: Registry,
    pub engine: EngineHandle,
    pub wake: Wake,
    pub stop: CancellationToken,
    /// Pictures that each training draws on its way; 0: none.
    pub previews: u32,
}

impl Worker {
    /// Works on queued trainings, one at a time, until it is to stop.
    pub async fn work(self) {
        while !self.stop.is_cancelled() {
            // Interest is registered before looking, so that no wake-up in between is lost.
            let woken = self.wake.0.notified();
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
