//! Stored generations, from the engine's events to rows and files. Foreground generations go to the engine at once.
//! Background generations wait in the database and are submitted a few at a time, so the engine queue keeps capacity
//! for the foreground.

mod drawing;
mod watch;

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

pub use drawing::provenance;
use drawing::{Drawn, Ending};

use super::ends::{Ends, Interest};
use super::{Wake, Wakes, Webhooks};
use crate::cluster::{Executor, Prepared};
use crate::registry::{Generation, NewGeneration, Registry, RegistryError, StoredImage};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::GenerationId;
use coar_core::image::RgbImage;

/// Buffered events for a slow reader. Progress and partial images are dropped if it falls behind; there is always
/// capacity for ten images and the final event.
const EVENTS: usize = 64;
/// Delay before a retry when the engine's queue was full.
const RETRY: Duration = Duration::from_millis(500);
/// How long a registry that does not answer is retried, with and without a waiting caller.
const RETRY_FOR: Duration = Duration::from_secs(15);
const RETRY_LONG_FOR: Duration = Duration::from_secs(600);
/// Poll interval of the queue without a notification.
const POLL: Duration = Duration::from_secs(5);

/// Events for a reader. Indices are those of the seed: the first image's is `first_index`.
#[derive(Debug)]
pub enum DrawEvent {
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    /// A partial image.
    Partial {
        index: u32,
        number: u32,
        image: RgbImage,
    },
    /// A finished image's file, and its row if the generation is stored.
    Image {
        index: u32,
        file: Bytes,
        stored: Option<StoredImage>,
    },
    /// The last event; if the generation is stored, its row has the same state.
    Ended(Result<(), Error>),
}

/// A running generation, as seen by its caller.
#[derive(Debug)]
struct Live {
    cancel: CancellationToken,
    /// Whether it has a row in the database.
    stored: bool,
    background: AtomicBool,
    done: AtomicU32,
}

/// Cancels a foreground generation when its caller disconnects.
#[derive(Debug)]
pub struct Waiting {
    live: Arc<Live>,
    armed: bool,
}

impl Waiting {
    /// Detaches the generation from its caller. [`Drawings::keep`] calls it.
    fn disarm(mut self) {
        self.live.background.store(true, Ordering::Relaxed);
        self.armed = false;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.armed {
            self.live.cancel.cancel();
        }
    }
}

/// Something that is dropped when a generation ends: its slot among its tenant's requests in flight.
pub type Held = Box<dyn Any + Send>;

/// Shared state of generations.
#[derive(Debug, Clone)]
pub struct Drawings {
    registry: Registry,
    executor: Executor,
    webhooks: Webhooks,
    /// Whether files record how they were made.
    provenance: bool,
    live: Arc<Mutex<HashMap<GenerationId, Arc<Live>>>>,
    /// The queued generation that is being submitted to the engine.
    taken: Arc<Mutex<Option<GenerationId>>>,
    held: Arc<Mutex<HashMap<GenerationId, Held>>>,
    queued: Wake,
    ends: Ends,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Drawings {
    /// At most `background` background generations are in the engine at once.
    pub fn new(
        registry: Registry,
        executor: Executor,
        webhooks: Webhooks,
        background: usize,
        provenance: bool,
    ) -> Self {
        Self {
            registry,
            executor,
            webhooks,
            provenance,
            live: Arc::default(),
            taken: Arc::default(),
            held: Arc::default(),
            queued: Wake::default(),
            ends: Ends::default(),
            slots: Arc::new(Semaphore::new(background.max(1))),
            tasks: TaskTracker::new(),
        }
    }

    /// With notifications for other processes.
    pub fn with_wakes(mut self, wakes: &Wakes) -> Self {
        self.queued = wakes.generations.clone();
        self.ends = wakes.ends.clone();
        self
    }

    fn live(&self) -> MutexGuard<'_, HashMap<GenerationId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<GenerationId, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Codes generated so far, while it is in the engine.
    pub fn progress(&self, id: GenerationId) -> Option<u32> {
        self.live().get(&id).map(|live| live.done.load(Ordering::Relaxed))
    }

    /// Subscribes to the end of a generation that another request started.
    pub fn interest(&self, id: GenerationId) -> Interest {
        self.ends.interest(id)
    }

    /// Adds a generation to the queue.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queue(&self, new: NewGeneration, held: Held) -> Result<Generation, RegistryError> {
        let generation = self.registry.add_generation(new).await?;
        self.held().insert(generation.id, held);
        self.queued.now();
        Ok(generation)
    }

    /// Submits a foreground generation to the engine at once. Dropping [`Waiting`] cancels it.
    ///
    /// # Errors
    /// When the engine's queue is full or it is stopping: then nothing is stored; when the database fails.
    pub async fn begin(
        &self,
        new: NewGeneration,
        prepared: &Prepared,
    ) -> Result<(Generation, mpsc::Receiver<DrawEvent>, Waiting), Error> {
        let stream = self.executor.start(prepared).await?;
        let generation = self.registry.add_generation(new).await?;
        let (reader, events) = mpsc::channel(EVENTS);
        let live = self.start(Drawn::Stored(generation.clone()), stream, (Some(reader), None));
        Ok((generation, events, Waiting { live, armed: true }))
    }

    /// As [`Self::begin`], but nothing is stored: the images go to the reader only.
    ///
    /// # Errors
    /// When the engine's queue is full or it is stopping.
    pub async fn begin_transient(
        &self,
        new: NewGeneration,
        prepared: &Prepared,
    ) -> Result<(mpsc::Receiver<DrawEvent>, Waiting), Error> {
        let stream = self.executor.start(prepared).await?;
        let (reader, events) = mpsc::channel(EVENTS);
        let live = self.start(Drawn::Transient(GenerationId::new(), new), stream, (Some(reader), None));
        Ok((events, Waiting { live, armed: true }))
    }

    /// Holds something until a generation that an earlier process has queued ends. Call it before [`Self::work`].
    pub fn hold_queued(&self, id: GenerationId, held: Held) {
        self.held().insert(id, held);
    }

    /// Holds something until a generation ends.
    pub fn hold(&self, id: GenerationId, held: Held) {
        let live = self.live();
        if live.contains_key(&id) {
            self.held().insert(id, held);
        }
    }

    /// Webhook deliveries.
    pub fn webhooks(&self) -> &Webhooks {
        &self.webhooks
    }

    /// Turns a foreground generation into a background one, which survives a restart.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keep(&self, id: GenerationId, waiting: Waiting) -> Result<(), RegistryError> {
        self.registry.keep_generation(id).await?;
        waiting.disarm();
        Ok(())
    }

    /// Cancels a generation; false if it has already ended. Finished images are kept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel(&self, mut generation: Generation) -> Result<bool, RegistryError> {
        let images = self.registry.images(generation.new.tenant, &[generation.id]).await?;
        generation.done = self.progress(generation.id).unwrap_or(generation.done);
        // The caller's request takes effect, whichever process runs the generation.
        generation.owner = None;
        let cancelled = self.end(&mut generation, &images, Ending::Cancelled).await?;
        self.stop(generation.id);
        Ok(cancelled)
    }

    /// Removes a generation from the engine whose row has ended or was deleted.
    pub fn stop(&self, id: GenerationId) {
        if let Some(live) = self.live().get(&id) {
            live.cancel.cancel();
        }
        self.held().remove(&id);
    }

    /// Runs queued generations until `stop`; returns when everything running has ended.
    pub async fn work(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            // Subscribe before reading the queue, so no notification is missed.
            let woken = self.queued.woken();
            let slot = tokio::select! {
                slot = self.slots.clone().acquire_owned() => slot,
                () = stop.cancelled() => break,
            };
            let Ok(slot) = slot else { break };
            let wait = match self.next(slot).await {
                Ok(true) => continue,
                Ok(false) => POLL,
                Err(error) => {
                    tracing::error!(%error, "cannot start a queued generation");
                    RETRY
                }
            };
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => {}
            }
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Ignores the queue; returns after `stop` when everything running has ended.
    pub async fn finish(self, stop: CancellationToken) {
        stop.cancelled().await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Starts the next queued generation. False if there is none.
    async fn next(&self, slot: OwnedSemaphorePermit) -> Result<bool, Error> {
        let Some(generation) = self.registry.claim_generation().await? else {
            return Ok(false);
        };
        let span = tracing::info_span!("job.run", generation = %generation.id);
        let taken = |id| *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = id;
        taken(Some(generation.id));
        let handed = self.hand_over(generation, slot).instrument(span).await;
        taken(None);
        handed
    }

    /// Submits a queued generation to the engine. False if there is no point in trying another.
    async fn hand_over(&self, mut generation: Generation, slot: OwnedSemaphorePermit) -> Result<bool, Error> {
        let request = Arc::new((&generation.new).into());
        match self.executor.draw(request).await {
            Ok(stream) => drop(self.start(Drawn::Stored(generation), stream, (None, Some(slot)))),
            // A fault of the store, the queue or the process, not of the request.
            Err(error)
                if matches!(
                    error.kind,
                    ErrorKind::Internal | ErrorKind::Overloaded | ErrorKind::Unavailable
                ) =>
            {
                let wait = RETRY.as_millis() as i64;
                retry_transient!(RETRY_FOR, self.registry.return_generation(generation.id, wait).await)?;
                if error.kind == ErrorKind::Internal {
                    return Err(error);
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => {
                self.end(&mut generation, &[], Ending::Failed(error)).await?;
            }
        }
        Ok(true)
    }
}
