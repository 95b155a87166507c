//! Stored generations, from the engine's events to rows and files. Those that somebody waits for go to the engine at once;
//! the others wait in the database and are fed to it a few at a time, so that its queue has room for whoever waits.

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

/// Events that wait for a slow listener. Progress and unfinished images are left out where it is behind; there is
/// always room for ten images and the end.
const EVENTS: usize = 64;
/// When the engine's queue was full, it is tried again after this.
const RETRY: Duration = Duration::from_millis(500);
/// A registry that does not answer is asked again for this long: for somebody who waits, and for nobody.
const PATIENCE: Duration = Duration::from_secs(15);
const LONG_PATIENCE: Duration = Duration::from_secs(600);
/// Without a wake-up the queue is looked at this often.
const POLL: Duration = Duration::from_secs(5);

/// What a listener is told. Indices are those of the seed: the first image's is `first_index`.
#[derive(Debug)]
pub enum DrawEvent {
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    /// An unfinished image.
    Partial {
        index: u32,
        number: u32,
        image: RgbImage,
    },
    /// A finished image's file, and where the generation is stored its row.
    Image {
        index: u32,
        file: Bytes,
        stored: Option<StoredImage>,
    },
    /// The last event; where the generation is stored its row says the same.
    Ended(Result<(), Error>),
}

/// A generation at work, seen from outside.
#[derive(Debug)]
struct Live {
    cancel: CancellationToken,
    background: AtomicBool,
    done: AtomicU32,
}

/// Ends a generation that somebody waits for, when they are gone.
#[derive(Debug)]
pub struct Waiting {
    live: Arc<Live>,
    armed: bool,
}

impl Waiting {
    /// The generation goes on without anybody waiting. [`Drawings::keep`] calls it.
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

/// Something that is given back when a generation ends: its place among its tenant's requests in flight.
pub type Held = Box<dyn Any + Send>;

/// What drawing needs.
#[derive(Debug, Clone)]
pub struct Drawings {
    registry: Registry,
    executor: Executor,
    webhooks: Webhooks,
    /// Whether files say what made them.
    provenance: bool,
    live: Arc<Mutex<HashMap<GenerationId, Arc<Live>>>>,
    /// The one of the queue that is being handed to the engine.
    taken: Arc<Mutex<Option<GenerationId>>>,
    held: Arc<Mutex<HashMap<GenerationId, Held>>>,
    queued: Wake,
    ends: Ends,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Drawings {
    /// `background` generations that nobody waits for are at the engine at once.
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

    /// The same, heard by other processes too.
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

    /// Codes drawn so far, while it is at the engine.
    pub fn progress(&self, id: GenerationId) -> Option<u32> {
        self.live().get(&id).map(|live| live.done.load(Ordering::Relaxed))
    }

    /// For whoever waits for a generation's end without having begun it.
    pub fn interest(&self, id: GenerationId) -> Interest {
        self.ends.interest(id)
    }

    /// Puts a generation into the queue.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queue(&self, new: NewGeneration, held: Held) -> Result<Generation, RegistryError> {
        let generation = self.registry.add_generation(new).await?;
        self.held().insert(generation.id, held);
        self.queued.now();
        Ok(generation)
    }

    /// Hands a generation to the engine at once, for somebody who waits: dropping [`Waiting`] cancels it.
    ///
    /// # Errors
    /// When the engine's queue is full or it stops: then nothing is stored; when the database fails.
    pub async fn begin(
        &self,
        new: NewGeneration,
        prepared: &Prepared,
    ) -> Result<(Generation, mpsc::Receiver<DrawEvent>, Waiting), Error> {
        let stream = self.executor.start(prepared).await?;
        let generation = self.registry.add_generation(new).await?;
        let (listener, events) = mpsc::channel(EVENTS);
        let live = self.start(Drawn::Stored(generation.clone()), stream, (Some(listener), None));
        Ok((generation, events, Waiting { live, armed: true }))
    }

    /// As [`Self::begin`], for images that only their reader gets: nothing is stored.
    ///
    /// # Errors
    /// When the engine's queue is full or it stops.
    pub async fn begin_transient(
        &self,
        new: NewGeneration,
        prepared: &Prepared,
    ) -> Result<(mpsc::Receiver<DrawEvent>, Waiting), Error> {
        let stream = self.executor.start(prepared).await?;
        let (listener, events) = mpsc::channel(EVENTS);
        let live = self.start(
            Drawn::Transient(GenerationId::new(), new),
            stream,
            (Some(listener), None),
        );
        Ok((events, Waiting { live, armed: true }))
    }

    /// Keeps something until a generation has ended that an earlier process has queued. Before [`Self::work`].
    pub fn hold_queued(&self, id: GenerationId, held: Held) {
        self.held().insert(id, held);
    }

    /// Keeps something until a generation that was begun has ended.
    pub fn hold(&self, id: GenerationId, held: Held) {
        let live = self.live();
        if live.contains_key(&id) {
            self.held().insert(id, held);
        }
    }

    /// Tells who wants to know of an end.
    pub fn webhooks(&self) -> &Webhooks {
        &self.webhooks
    }

    /// From now on nobody waits for it, and it survives a restart.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keep(&self, id: GenerationId, waiting: Waiting) -> Result<(), RegistryError> {
        self.registry.keep_generation(id).await?;
        waiting.disarm();
        Ok(())
    }

    /// Cancels a generation; false when it has ended. Images that are drawn already stay.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel(&self, mut generation: Generation) -> Result<bool, RegistryError> {
        let images = self.registry.images(generation.new.tenant, &[generation.id]).await?;
        generation.done = self.progress(generation.id).unwrap_or(generation.done);
        // Whoever draws it: the caller's word counts.
        generation.owner = None;
        let cancelled = self.end(&mut generation, &images, Ending::Cancelled).await?;
        self.stop(generation.id);
        Ok(cancelled)
    }

    /// Takes a generation off the engine, whose row is ended or gone.
    pub fn stop(&self, id: GenerationId) {
        if let Some(live) = self.live().get(&id) {
            live.cancel.cancel();
        }
        self.held().remove(&id);
    }

    /// Draws what is queued until `stop`; returns when everything at work has ended.
    pub async fn work(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            // Interest is registered before looking, so that no wake-up in between is lost.
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
                    tracing::error!(%error, "a queued generation cannot be begun");
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

    /// Draws nothing of the queue; returns after `stop` when everything at work has ended.
    pub async fn finish(self, stop: CancellationToken) {
        stop.cancelled().await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Begins the next queued generation. False when there is none.
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

    /// Hands a generation of the queue to the engine. False when there is no point in looking for another.
    async fn hand_over(&self, mut generation: Generation, slot: OwnedSemaphorePermit) -> Result<bool, Error> {
        let request = Arc::new((&generation.new).into());
        match self.executor.draw(request).await {
            Ok(stream) => drop(self.start(Drawn::Stored(generation), stream, (None, Some(slot)))),
            // The store, the queue or the process: what was asked for is not to blame.
            Err(error)
                if matches!(
                    error.kind,
                    ErrorKind::Internal | ErrorKind::Overloaded | ErrorKind::Unavailable
                ) =>
            {
                let wait = RETRY.as_millis() as i64;
                patiently!(PATIENCE, self.registry.return_generation(generation.id, wait).await)?;
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
