//! Recovery of generations whose process was lost, and supervision of those that several processes share.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Drawings;
use super::drawing::Ending;
use crate::registry::{Backend, GENERATION_ATTEMPTS, Generation, RegistryError};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::GenerationId;

/// How often shared generations are checked.
const WATCH: Duration = Duration::from_secs(1);
/// How long a process's own but unknown generation may exist before it is requeued: longer than any statement takes.
const UNKNOWN_FOR: Duration = Duration::from_secs(12);

impl Drawings {
    /// Ends or requeues what dead processes have left. Call it before anything else.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn recover(&self) -> Result<(), RegistryError> {
        let left = self.registry.left_generations().await?;
        self.end_left(left).await
    }

    async fn end_left(&self, left: Vec<Generation>) -> Result<(), RegistryError> {
        for mut lost in left {
            tracing::info!(generation = %lost.id, "its process is gone");
            let message = match lost.new.background {
                true => format!("The server was interrupted {GENERATION_ATTEMPTS} times during this generation."),
                false => "The server was restarted while a caller waited for this.".to_owned(),
            };
            let images = self.registry.images(lost.new.tenant, &[lost.id]).await?;
            let error = Error::new(ErrorKind::Unavailable, "interrupted", message);
            self.end(&mut lost, &images, Ending::Failed(error)).await?;
        }
        Ok(())
    }

    /// Supervises shared generations until `stop`. Cancels those that another process owns or has ended, reports the
    /// progress of its own, and recovers those of dead processes. Also recovers those that carry this process's name
    /// but are unknown to it, because a response of the database was lost.
    pub async fn watch_over(self, stop: CancellationToken) {
        let shared = self.registry.backend() == Backend::Postgres;
        let mut tick = tokio::time::interval(WATCH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut unknown = HashMap::new();
        loop {
            let woken = self.queued.woken();
            tokio::select! {
                _ = tick.tick() => {
                    if let Err(error) = self.requeue_unknown(&mut unknown).await {
                        tracing::warn!(%error, "cannot look up generations with lost claim responses");
                    }
                    // Workers do so too, once they have capacity; here so that nothing stays `running` until then.
                    if shared && let Err(error) = self.registry.release_lost().await {
                        tracing::warn!(%error, "cannot look up trainings of lost processes");
                    }
                    if shared && let Err(error) = self.recover().await {
                        tracing::warn!(%error, "cannot look up generations of lost processes");
                    }
                }
                () = woken => {}
                () = stop.cancelled() => return,
            }
            if shared && let Err(error) = self.sync_running().await {
                tracing::warn!(%error, "cannot look up generations that other processes have ended");
            }
        }
    }

    /// Requeues generations that carry this process's name and have been unknown to it for [`UNKNOWN_FOR`];
    /// `unknown` has the time since when.
    async fn requeue_unknown(&self, unknown: &mut HashMap<GenerationId, Instant>) -> Result<(), RegistryError> {
        let own = self.registry.own_generations().await?;
        let taken = *self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |id: &GenerationId| taken == Some(*id) || self.live().contains_key(id);
        let unclaimed: Vec<Generation> = own.into_iter().filter(|own| !known(&own.id)).collect();
        unknown.retain(|id, _| unclaimed.iter().any(|generation| generation.id == *id));
        let mut overdue = Vec::new();
        for generation in unclaimed {
            if unknown.entry(generation.id).or_insert_with(Instant::now).elapsed() > UNKNOWN_FOR {
                overdue.push(generation);
            }
        }
        if overdue.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            count = overdue.len(),
            "reclaiming generations with lost claim responses"
        );
        let left = self.registry.queue_again(overdue).await?;
        self.queued.now();
        self.end_left(left).await
    }

    /// Cancels generations that this process no longer owns, and stores the progress of the others.
    async fn sync_running(&self) -> Result<(), RegistryError> {
        let drawn: Vec<(GenerationId, u32)> = self
            .live()
            .iter()
            .filter(|(_, live)| live.stored)
            .map(|(id, live)| (*id, live.done.load(Ordering::Relaxed)))
            .collect();
        if drawn.is_empty() {
            return Ok(());
        }
        for id in self.registry.report_drawn(&drawn).await? {
            self.stop(id);
        }
        Ok(())
    }
}
