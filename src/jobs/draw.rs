//! Stored generations, from the engine's events to rows and files. Those that somebody waits for go to the engine at once;
//! the others wait in the database and are fed to it a few at a time, so that its queue has room for whoever waits.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::ends::{Ends, Interest};
use super::{LEASE_LOST, Wake, Wakes, Webhooks};
use crate::cluster::{EventStream, Executor, Prepared};
use crate::engine::{EngineError, GenerationEvent};
use crate::error::{Error, ErrorKind};
use crate::ids::{GenerationId, ImageId};
use crate::picture::{RgbPicture, encode};
use crate::registry::{
    Backend, GENERATION_ATTEMPTS, Generation, GenerationConcept, GenerationSettings, GenerationStatus, KeyClaim,
    NewGeneration, Registry, RegistryError, StoredImage, TokenUsage,
};

/// Events that wait for a slow listener. Progress and unfinished pictures are left out where it is behind; there is
/// always room for ten pictures and the end.
const EVENTS: usize = 64;
const RESERVED: usize = 12;
/// When the engine's queue was full, it is tried again after this.
const RETRY: Duration = Duration::from_millis(500);
/// A registry that does not answer is asked again for this long: for somebody who waits, and for nobody.
const PATIENCE: Duration = Duration::from_secs(15);
const LONG_PATIENCE: Duration = Duration::from_secs(600);
/// How often generations that processes share are looked after.
const WATCH: Duration = Duration::from_secs(1);
/// A generation of its own that a process does not know is given back after this: longer than any statement takes.
const FORGOTTEN: Duration = Duration::from_secs(12);
/// Without a wake-up the queue is looked at this often.
const POLL: Duration = Duration::from_secs(5);

/// What a listener is told. Indices are those of the seed: the first picture's is `first_index`.
#[derive(Debug)]
pub enum DrawEvent {
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    /// An unfinished picture.
    Partial {
        index: u32,
        number: u32,
        picture: RgbPicture,
    },
    /// A picture that is stored, and its file.
    Image {
        image: StoredImage,
        file: Bytes,
    },
    /// The last event; the row says the same.
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

/// A generation with an open line to the engine.
struct Drawing {
    generation: Generation,
    stream: EventStream,
    live: Arc<Live>,
    listener: Option<mpsc::Sender<DrawEvent>>,
    /// The key of whoever waits.
    claim: Option<KeyClaim>,
    images: Vec<StoredImage>,
    _slot: Option<OwnedSemaphorePermit>,
}

/// How a drawing came to its end.
enum Ending {
    Succeeded(TokenUsage),
    Failed(Error),
    Cancelled,
    /// The server stops, or the device failed and another attempt is left.
    Again,
    /// The row is gone.
    Deleted,
}

/// What made a picture, for its own metadata. The prompt stays out: it may be private, the picture is passed around.
pub fn provenance(model: &str, settings: &GenerationSettings, concepts: &[GenerationConcept], index: u32) -> String {
    let concepts: Vec<Value> = concepts
        .iter()
        .map(|concept| json!({"name": concept.name, "version": concept.version, "hash": concept.hash}))
        .collect();
    json!({
        "software": concat!("coar ", env!("CARGO_PKG_VERSION")),
        "model": model,
        "concepts": concepts,
        "seed": settings.seed,
        "index": index,
        "guidance_scale": settings.guidance_scale,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
    })
    .to_string()
}

fn error_json(error: &Error) -> Value {
    json!({"code": error.code, "message": error.message, "field": error.field})
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
        let live = self.start(generation.clone(), stream, (Some(listener), None));
        Ok((generation, events, Waiting { live, armed: true }))
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

    /// Cancels a generation; false when it has ended. Pictures that are drawn already stay.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel(&self, mut generation: Generation) -> Result<bool, RegistryError> {
        let images = self.registry.images(generation.new.tenant, generation.id).await?;
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
            let images = self.registry.images(lost.new.tenant, lost.id).await?;
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
        let started = async {
            let prepared = self.executor.prepare(&generation.new).await?;
            self.executor.start(&prepared).await
        };
        match started.await {
            Ok(stream) => drop(self.start(generation, stream, (None, Some(slot)))),
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

    fn start(
        &self,
        generation: Generation,
        stream: EventStream,
        (listener, slot): (Option<mpsc::Sender<DrawEvent>>, Option<OwnedSemaphorePermit>),
    ) -> Arc<Live> {
        let live = Arc::new(Live {
            cancel: CancellationToken::new(),
            background: AtomicBool::new(generation.new.background),
            done: AtomicU32::new(0),
        });
        self.live().insert(generation.id, live.clone());
        let drawing = Drawing {
            generation,
            stream,
            live: live.clone(),
            listener,
            claim: KeyClaim::current(),
            images: vec![],
            _slot: slot,
        };
        // Its span ends when it has ended.
        self.tasks.spawn(self.clone().run(drawing).in_current_span());
        live
    }

    async fn run(self, mut drawing: Drawing) {
        let id = drawing.generation.id;
        let ending = match self.follow(&mut drawing).await {
            Ok(ending) => ending,
            Err(error) if error.may_pass() && drawing.live.background.load(Ordering::Relaxed) => {
                tracing::error!(generation = %id, %error, "it is drawn again later");
                Ending::Again
            }
            Err(error) => Ending::Failed(Error::internal(error)),
        };
        let told = match &ending {
            Ending::Succeeded(_) => Ok(()),
            Ending::Failed(error) => Err(error.clone()),
            Ending::Cancelled | Ending::Deleted => Err(Error::new(
                ErrorKind::Conflict,
                "cancelled",
                "The generation was cancelled.",
            )),
            Ending::Again => Err(EngineError::Stopped.into()),
        };
        let mut ended = match drawing.claim.take() {
            Some(claim) => {
                let end = self.end(&mut drawing.generation, &drawing.images, ending);
                claim.under(end).await
            }
            None => self.end(&mut drawing.generation, &drawing.images, ending).await,
        };
        if matches!(ended, Err(RegistryError::LeaseLost)) {
            // Whoever has waited has asked again meanwhile, and another process draws it.
            let again = Ending::Failed(RegistryError::LeaseLost.into());
            ended = self.end(&mut drawing.generation, &drawing.images, again).await;
        }
        if let Err(error) = ended {
            tracing::error!(generation = %id, %error, "a generation's end cannot be written down");
        }
        self.live().remove(&id);
        self.held().remove(&id);
        drawing.tell(DrawEvent::Ended(told));
        self.ends.tell(id);
        // One at work less: the next may begin.
        self.queued.now();
    }

    /// From the first event to the last.
    async fn follow(&self, drawing: &mut Drawing) -> Result<Ending, RegistryError> {
        let live = drawing.live.clone();
        loop {
            let event = tokio::select! {
                event = drawing.stream.next() => event,
                () = live.cancel.cancelled() => return Ok(Ending::Cancelled),
            };
            match event {
                Some(GenerationEvent::Started) => {
                    let at = patiently!(patience(&live), self.registry.lease_time().await)?;
                    let (id, attempt) = (drawing.generation.id, drawing.generation.attempt);
                    if !patiently!(patience(&live), self.registry.begin_generation(id, attempt, at).await)? {
                        return Ok(Ending::Deleted);
                    }
                    drawing.generation.attempt += 1;
                    drawing.generation.started_at = Some(at);
                    drawing.generation.status = GenerationStatus::Running;
                    drawing.tell(DrawEvent::Started);
                }
                Some(GenerationEvent::Progress { done, total }) => {
                    drawing.generation.done = done;
                    live.done.store(done, Ordering::Relaxed);
                    drawing.tell(DrawEvent::Progress { done, total });
                }
                Some(GenerationEvent::Partial { index, number, picture }) => {
                    let index = drawing.generation.new.settings.first_index + index;
                    drawing.tell(DrawEvent::Partial { index, number, picture });
                }
                Some(GenerationEvent::Picture { index, picture }) => {
                    let index = drawing.generation.new.settings.first_index + index;
                    match self.store(drawing, index, picture).await {
                        Ok(()) => {}
                        // The row was deleted meanwhile, or it is another process's by now.
                        Err(_) if live.cancel.is_cancelled() => return Ok(Ending::Deleted),
                        Err(error) if error.code == LEASE_LOST => return Ok(Ending::Deleted),
                        Err(error) => return Ok(Ending::Failed(error)),
                    }
                }
                Some(GenerationEvent::Done {
                    text_tokens,
                    image_tokens,
                }) => {
                    drawing.generation.done = drawing.generation.new.total;
                    drawing.images.sort_by_key(|image| image.index);
                    return Ok(Ending::Succeeded(TokenUsage {
                        text_tokens,
                        image_tokens,
                    }));
                }
                Some(GenerationEvent::Failed(error)) => return Ok(failed(drawing, error)),
                None => return Ok(failed(drawing, EngineError::Stopped)),
            }
        }
    }

    /// A picture as its caller wants it, with what made it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn encode(&self, new: &NewGeneration, index: u32, picture: RgbPicture) -> Result<Bytes, Error> {
        let mut text = vec![];
        if self.provenance {
            text.push((
                "coar",
                provenance(&self.executor.info().id, &new.settings, &new.concepts, index),
            ));
        }
        let format = new.settings.format();
        let encoded = tokio::task::spawn_blocking(move || encode(&picture, format, &text)).await;
        Ok(encoded.map_err(Error::internal)?.map_err(Error::internal)?.into())
    }

    /// Encodes a picture and stores it.
    async fn store(&self, drawing: &mut Drawing, index: u32, picture: RgbPicture) -> Result<(), Error> {
        let new = &drawing.generation.new;
        let size = (picture.width, picture.height);
        let file = self.encode(new, index, picture).await?;
        let patience = patience(&drawing.live);
        let stored = patiently!(patience, self.registry.store(vec![file.clone()]).await)?;
        let image = StoredImage {
            id: ImageId::new(),
            tenant: new.tenant,
            generation: Some(drawing.generation.id),
            index,
            seed: Some(new.settings.seed),
            size,
            blob: stored.first().to_owned(),
            format: new.settings.output_format,
            created_at: self.registry.lease_time().await?,
            expires_at: None,
        };
        let attempt = drawing.generation.attempt;
        let added = patiently!(patience, self.registry.add_image(&image, attempt).await);
        let hashes = stored.release();
        if let Err(error) = added {
            self.registry.remove_unreferenced(&hashes).await?;
            return Err(error.into());
        }
        drawing.images.push(image.clone());
        drawing.tell(DrawEvent::Image { image, file });
        Ok(())
    }

    /// Writes an end down and tells whoever wants to know. False when it had ended before.
    async fn end(
        &self,
        generation: &mut Generation,
        images: &[StoredImage],
        ending: Ending,
    ) -> Result<bool, RegistryError> {
        let id = generation.id;
        match ending {
            Ending::Deleted => return Ok(false),
            Ending::Again => {
                patiently!(LONG_PATIENCE, self.registry.requeue_generation(generation).await)?;
                return Ok(false);
            }
            Ending::Succeeded(usage) => {
                generation.usage = Some(usage);
                generation.status = GenerationStatus::Succeeded;
            }
            Ending::Failed(error) => {
                generation.error = Some(error_json(&error));
                generation.status = GenerationStatus::Failed;
            }
            Ending::Cancelled => generation.status = GenerationStatus::Cancelled,
        }
        generation.finished_at = Some(patiently!(LONG_PATIENCE, self.registry.lease_time().await)?);
        let delivery = self.webhooks.of_generation(generation, images);
        // A row that says for ever that it is being drawn would be worse than any wait.
        let ended = patiently!(
            LONG_PATIENCE,
            self.registry.end_generation(generation, delivery.as_ref()).await
        )?;
        if ended && delivery.is_some() {
            self.webhooks.stored();
        }
        self.held().remove(&id);
        self.ends.tell(id);
        Ok(ended)
    }
}

impl Drawing {
    /// Tells the listener, if there is one; see [`EVENTS`].
    fn tell(&self, event: DrawEvent) {
        let Some(listener) = &self.listener else { return };
        let expendable = matches!(event, DrawEvent::Progress { .. } | DrawEvent::Partial { .. });
        if !expendable || listener.capacity() > RESERVED {
            // Who does not listen any more has other ways to ask.
            let _ = listener.try_send(event);
        }
    }
}

fn patience(live: &Live) -> Duration {
    match live.background.load(Ordering::Relaxed) {
        true => LONG_PATIENCE,
        false => PATIENCE,
    }
}

/// What the engine's refusal means for a generation.
fn failed(drawing: &Drawing, error: EngineError) -> Ending {
    let background = drawing.live.background.load(Ordering::Relaxed);
    let again = match error {
        EngineError::Stopped => true,
        EngineError::Device(_) | EngineError::Lost => drawing.generation.attempt < GENERATION_ATTEMPTS,
        EngineError::Invalid { .. } | EngineError::Overloaded { .. } => false,
    };
    match background && again {
        true => Ending::Again,
        false => Ending::Failed(error.into()),
    }
}
