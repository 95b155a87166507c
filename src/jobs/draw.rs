//! Stored generations, from the engine's events to rows and files. Those that somebody waits for go to the engine at once;
//! the others wait in the database and are fed to it a few at a time, so that its queue has room for whoever waits.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::ends::{Ends, Interest};
use super::{Wake, Webhooks};
use crate::engine::{ConceptUse, EngineError, EngineHandle, GenerateRequest, GenerationEvent, GenerationStream};
use crate::error::{Error, ErrorKind};
use crate::ids::{GenerationId, ImageId};
use crate::picture::{RgbPicture, encode};
use crate::registry::{
    GENERATION_ATTEMPTS, Generation, GenerationConcept, GenerationSettings, GenerationStatus, NewGeneration, Registry,
    RegistryError, StoredImage, TokenUsage, now,
};

/// Events that wait for a slow listener. Progress and unfinished pictures are left out where it is behind; there is
/// always room for ten pictures and the end.
const EVENTS: usize = 64;
const RESERVED: usize = 12;
/// When the engine's queue was full, it is tried again after this.
const RETRY: Duration = Duration::from_millis(500);
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
    engine: EngineHandle,
    webhooks: Webhooks,
    /// Whether files say what made them.
    provenance: bool,
    live: Arc<Mutex<HashMap<GenerationId, Arc<Live>>>>,
    held: Arc<Mutex<HashMap<GenerationId, Held>>>,
    queued: Wake,
    ends: Ends,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// A generation with an open line to the engine.
struct Drawing {
    generation: Generation,
    request: GenerateRequest,
    stream: GenerationStream,
    live: Arc<Live>,
    listener: Option<mpsc::Sender<DrawEvent>>,
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
        engine: EngineHandle,
        webhooks: Webhooks,
        background: usize,
        provenance: bool,
    ) -> Self {
        Self {
            registry,
            engine,
            webhooks,
            provenance,
            live: Arc::default(),
            held: Arc::default(),
            queued: Wake::default(),
            ends: Ends::default(),
            slots: Arc::new(Semaphore::new(background.max(1))),
            tasks: TaskTracker::new(),
        }
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
        request: GenerateRequest,
    ) -> Result<(Generation, mpsc::Receiver<DrawEvent>, Waiting), Error> {
        let stream = self.engine.generate(request.clone())?;
        let generation = self.registry.add_generation(new).await?;
        let (listener, events) = mpsc::channel(EVENTS);
        let live = self.start(generation.clone(), request, stream, (Some(listener), None));
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
        for mut lost in self.registry.left_generations().await? {
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

    /// Draws what is queued until `stop`; returns when everything at work has ended.
    pub async fn work(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            // Interest is registered before looking, so that no wake-up in between is lost.
            let woken = self.queued.0.notified();
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

    /// Begins the next queued generation. False when there is none.
    async fn next(&self, slot: OwnedSemaphorePermit) -> Result<bool, Error> {
        let at_work: Vec<GenerationId> = self.live().keys().copied().collect();
        let waiting = self.registry.next_generations(at_work.len() + 1).await?;
        let Some(generation) = waiting.into_iter().find(|next| !at_work.contains(&next.id)) else {
            return Ok(false);
        };
        let span = tracing::info_span!("job.run", generation = %generation.id);
        self.hand_over(generation, slot).instrument(span).await
    }

    /// Hands a queued generation to the engine. False when that stops.
    async fn hand_over(&self, mut generation: Generation, slot: OwnedSemaphorePermit) -> Result<bool, Error> {
        let request = match self.request(&generation).await {
            Ok(request) => request,
            Err(error) if error.kind == ErrorKind::Internal => return Err(error),
            Err(error) => {
                self.end(&mut generation, &[], Ending::Failed(error)).await?;
                return Ok(true);
            }
        };
        match self.engine.generate(request.clone()) {
            Ok(stream) => drop(self.start(generation, request, stream, (None, Some(slot)))),
            Err(EngineError::Overloaded { .. }) => tokio::time::sleep(RETRY).await,
            Err(EngineError::Stopped) => return Ok(false),
            Err(error) => {
                self.end(&mut generation, &[], Ending::Failed(error.into())).await?;
            }
        }
        Ok(true)
    }

    /// A row as the engine takes it, with the versions of its concepts that it was accepted with.
    async fn request(&self, generation: &Generation) -> Result<GenerateRequest, Error> {
        let new = &generation.new;
        let mut concepts = Vec::new();
        for concept in &new.concepts {
            let gone = || {
                let message = format!("The concept `{}` was deleted before this was drawn.", concept.name);
                Error::new(ErrorKind::NotFound, "concept_not_found", message)
            };
            let bytes = match self.registry.blobs.get(&concept.hash).await {
                Err(crate::registry::BlobError::Missing(_)) => return Err(gone()),
                other => other?,
            };
            concepts.push(concept_use(&self.engine, concept, &bytes)?);
        }
        Ok(engine_request(new, concepts))
    }

    fn start(
        &self,
        generation: Generation,
        request: GenerateRequest,
        stream: GenerationStream,
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
            request,
            stream,
            live: live.clone(),
            listener,
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
        if let Err(error) = self.end(&mut drawing.generation, &drawing.images, ending).await {
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
                    let at = now();
                    if !self.registry.begin_generation(drawing.generation.id, at).await? {
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
                    let index = drawing.request.first_index + index;
                    drawing.tell(DrawEvent::Partial { index, number, picture });
                }
                Some(GenerationEvent::Picture { index, picture }) => {
                    let index = drawing.request.first_index + index;
                    match self.store(drawing, index, picture).await {
                        Ok(()) => {}
                        // The row was deleted meanwhile.
                        Err(_) if live.cancel.is_cancelled() => return Ok(Ending::Deleted),
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
                provenance(&self.engine.info().id, &new.settings, &new.concepts, index),
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
        let image = StoredImage {
            id: ImageId::new(),
            tenant: new.tenant,
            generation: Some(drawing.generation.id),
            index,
            seed: Some(new.settings.seed),
            size,
            blob: self.registry.blobs.put(file.clone()).await?,
            format: new.settings.output_format,
            created_at: now(),
            expires_at: None,
        };
        if let Err(error) = self.registry.add_image(&image).await {
            self.registry.remove_unreferenced(&[image.blob]).await?;
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
                self.registry.requeue_generation(id).await?;
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
        generation.finished_at = Some(now());
        let delivery = self.webhooks.of_generation(generation, images);
        let ended = self.registry.end_generation(generation, delivery.as_ref()).await?;
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

/// What the engine's refusal means for a generation.
fn failed(drawing: &Drawing, error: EngineError) -> Ending {
    let background = drawing.live.background.load(Ordering::Relaxed);
    let again = match error {
        EngineError::Stopped => true,
        EngineError::Device(_) => drawing.generation.attempt < GENERATION_ATTEMPTS,
        EngineError::Invalid { .. } | EngineError::Overloaded { .. } => false,
    };
    match background && again {
        true => Ending::Again,
        false => Ending::Failed(error.into()),
    }
}

/// A concept's file as the engine takes it.
///
/// # Errors
/// `concept_unusable`: it was trained on another model.
pub fn concept_use(engine: &EngineHandle, concept: &GenerationConcept, file: &[u8]) -> Result<ConceptUse, Error> {
    let file = engine.info().read_concept(file).map_err(|error| {
        let message = format!("The concept `{}` cannot be used: {error}.", concept.name);
        Error::new(ErrorKind::Conflict, "concept_unusable", message)
    })?;
    Ok(ConceptUse {
        name: concept.name.clone(),
        content_hash: concept.hash.clone(),
        kind: concept.kind,
        tensors: Arc::new(file.tensors),
    })
}

/// A generation as the engine takes it.
pub fn engine_request(new: &NewGeneration, concepts: Vec<ConceptUse>) -> GenerateRequest {
    let settings = &new.settings;
    GenerateRequest {
        tenant: new.tenant.to_string(),
        prompt: new.prompt.clone(),
        concepts,
        width: settings.width,
        height: settings.height,
        count: settings.n,
        seed: settings.seed,
        first_index: settings.first_index,
        guidance_scale: settings.guidance_scale,
        temperature: settings.temperature,
        top_k: settings.top_k,
        identity_mask: settings.identity_mask,
        partial_images: settings.partial_images,
    }
}
