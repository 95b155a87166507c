//! Generations that lost whoever drew them, and those that several processes share.

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

/// How often generations that processes share are looked after.
const WATCH: Duration = Duration::from_secs(1);
/// A generation of its own that a process does not know is given back after this: longer than any statement takes.
const FORGOTTEN: Duration = Duration::from_secs(12);

impl Drawings {
    /// Ends what a process has left that is gone, and queues the rest again. Before anything else is asked of this.
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
                true => format!("The server ended {GENERATION_ATTEMPTS} times while this was drawn."),
                false => "The server was restarted while somebody waited for this.".to_owned(),
            };
            let images = self.registry.images(lost.new.tenant, &[lost.id]).await?;
            let error = Error::new(ErrorKind::Unavailable, "interrupted", message);
            self.end(&mut lost, &images, Ending::Failed(error)).await?;
        }
        Ok(())
    }

    /// Looks after generations that several processes share, until `stop`: lets go of those that are another's or have
    /// been ended elsewhere, tells how far its own are, and takes care of those whose process is gone; and of those that bear
    /// this process's name while it knows nothing of them, because an answer of the database was lost.
    pub async fn watch_over(self, stop: CancellationToken) {
        let shared = self.registry.backend() == Backend::Postgres;
        let mut tick = tokio::time::interval(WATCH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut unknown = HashMap::new();
        loop {
            let woken = self.queued.woken();
            tokio::select! {
                _ = tick.tick() => {
                    if let Err(error) = self.forgotten(&mut unknown).await {
                        tracing::warn!(%error, "generations that this process should know cannot be looked for");
                    }
                    // Workers do so too, when they have room: here so that none waits as if it were at work.
                    if shared && let Err(error) = self.registry.release_lost().await {
                        tracing::warn!(%error, "trainings of lost processes cannot be looked for");
                    }
                    if shared && let Err(error) = self.recover().await {
                        tracing::warn!(%error, "generations of lost processes cannot be looked for");
                    }
                }
                () = woken => {}
                () = stop.cancelled() => return,
            }
            if shared && let Err(error) = self.let_go().await {
                tracing::warn!(%error, "generations that others have ended cannot be looked for");
            }
        }
    }

    /// Takes care of generations that bear this process's name and that it has not known for [`FORGOTTEN`]; `unknown` says
    /// since when.
    async fn forgotten(&self, unknown: &mut HashMap<GenerationId, Instant>) -> Result<(), RegistryError> {
        let own = self.registry.own_generations().await?;
        let taken = *self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |id: &GenerationId| taken == Some(*id) || self.live().contains_key(id);
        let strange: Vec<Generation> = own.into_iter().filter(|own| !known(&own.id)).collect();
        unknown.retain(|id, _| strange.iter().any(|generation| generation.id == *id));
        let mut forgotten = Vec::new();
        for generation in strange {
            if unknown.entry(generation.id).or_insert_with(Instant::now).elapsed() > FORGOTTEN {
                forgotten.push(generation);
            }
        }
        if forgotten.is_empty() {
            return Ok(());
        }
        tracing::warn!(count = forgotten.len(), "generations were taken whose answer was lost");
        let left = self.registry.queue_again(forgotten).await?;
        self.queued.now();
        self.end_left(left).await
    }

    /// Takes off the engine what is this process's no longer, and writes down how far the rest is.
    async fn let_go(&self) -> Result<(), RegistryError> {
        let drawn: Vec<(GenerationId, u32)> = self
            .live()
            .iter()
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
