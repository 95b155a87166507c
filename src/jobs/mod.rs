//! The worker that trains queued concepts: it claims a training, feeds it to the engine, and writes down what comes back.
//! It holds no tensors; the engine is reached through its door alone.

mod train_concept;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::engine::EngineHandle;
use crate::registry::Registry;
use train_concept::train_concept;

/// How long a claimed training stays claimed without a sign of life.
pub(crate) const LEASE_MS: i64 = 30_000;
/// Without a wake-up the queue is looked at this often.
const POLL: Duration = Duration::from_secs(2);

/// Wakes the worker when something was queued.
#[derive(Debug, Clone, Default)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// Something was queued or cancelled.
    pub fn now(&self) {
        self.0.notify_waiters();
    }
}

/// Works on queued trainings, one at a time, until `stop`.
pub async fn work(registry: Registry, engine: EngineHandle, wake: Wake, stop: CancellationToken) {
    while !stop.is_cancelled() {
        // Interest is registered before looking, so that no wake-up in between is lost.
        let woken = wake.0.notified();
        match registry.claim_training(LEASE_MS).await {
            Ok(Some(claimed)) => {
                train_concept(&registry, &engine, claimed, &wake, &stop).await;
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "the queue of trainings cannot be read"),
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(POLL) => {}
            () = stop.cancelled() => {}
        }
    }
}
