//! One generation from the engine's first event to its row's end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{DrawEvent, Drawings, LONG_PATIENCE, Live, PATIENCE};
use crate::cluster::EventStream;
use crate::jobs::LEASE_LOST;
use crate::registry::{
    GENERATION_ATTEMPTS, Generation, GenerationConcept, GenerationSettings, GenerationStatus, KeyClaim, NewGeneration,
    RegistryError, StoredImage, TokenUsage,
};
use coar_core::engine::{EngineError, GenerationEvent};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::{GenerationId, ImageId};
use coar_core::image::{RgbImage, encode};

/// Of a listener's places those that progress and unfinished images leave free.
const RESERVED: usize = 12;

/// What is drawn.
pub(super) enum Drawn {
    /// A row of the database; its images become files.
    Stored(Generation),
    /// Only its reader gets the images.
    Transient(GenerationId, NewGeneration),
}

impl Drawn {
    fn id(&self) -> GenerationId {
        match self {
            Self::Stored(generation) => generation.id,
            Self::Transient(id, _) => *id,
        }
    }

    fn request(&self) -> &NewGeneration {
        match self {
            Self::Stored(generation) => &generation.new,
            Self::Transient(_, new) => new,
        }
    }

    fn stored(&mut self) -> Option<&mut Generation> {
        match self {
            Self::Stored(generation) => Some(generation),
            Self::Transient(..) => None,
        }
    }
}

/// A generation with an open line to the engine.
struct Drawing {
    drawn: Drawn,
    stream: EventStream,
    live: Arc<Live>,
    listener: Option<mpsc::Sender<DrawEvent>>,
    /// The key of whoever waits.
    claim: Option<KeyClaim>,
    images: Vec<StoredImage>,
    _slot: Option<OwnedSemaphorePermit>,
}

/// How a drawing came to its end.
pub(super) enum Ending {
    Succeeded(TokenUsage),
    Failed(Error),
    Cancelled,
    /// The server stops, or the device failed and another attempt is left.
    Again,
    /// The row is gone.
    Deleted,
}

/// What made an image, for its own metadata. The prompt stays out: it may be private, the image is passed around.
pub fn provenance(model: &str, settings: &GenerationSettings, concepts: &[GenerationConcept], index: u32) -> String {
    let concepts: Vec<Value> = concepts
        .iter()
        .map(|concept| json!({"name": concept.name, "version": concept.version, "hash": concept.hash}))
        .collect();
    json!({
        "software": concat!("coar ", env!("CARGO_PKG_VERSION")),
        "model": model,
        "concepts": concepts,
        "seed": settings.sampling.seed,
        "index": index,
        "guidance_scale": settings.sampling.guidance_scale,
        "temperature": settings.sampling.temperature,
        "top_k": settings.sampling.top_k,
    })
    .to_string()
}

fn error_json(error: &Error) -> Value {
    json!({"code": error.code, "message": error.message, "field": error.field})
}

impl Drawings {
    pub(super) fn start(
        &self,
        drawn: Drawn,
        stream: EventStream,
        (listener, slot): (Option<mpsc::Sender<DrawEvent>>, Option<OwnedSemaphorePermit>),
    ) -> Arc<Live> {
        let live = Arc::new(Live {
            cancel: CancellationToken::new(),
            background: AtomicBool::new(drawn.request().background),
            done: AtomicU32::new(0),
        });
        self.live().insert(drawn.id(), live.clone());
        let drawing = Drawing {
            drawn,
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
        let id = drawing.drawn.id();
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
        if let Drawn::Stored(generation) = &mut drawing.drawn {
            let end = self.end(generation, &drawing.images, ending);
            let mut ended = match drawing.claim.take() {
                Some(claim) => claim.under(end).await,
                None => end.await,
            };
            if matches!(ended, Err(RegistryError::LeaseLost)) {
                // Whoever has waited has asked again meanwhile, and another process draws it.
                let again = Ending::Failed(RegistryError::LeaseLost.into());
                ended = self.end(generation, &drawing.images, again).await;
            }
            if let Err(error) = ended {
                tracing::error!(generation = %id, %error, "a generation's end cannot be written down");
            }
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
                    if let Some(generation) = drawing.drawn.stored() {
                        let at = patiently!(patience(&live), self.registry.lease_time().await)?;
                        let (id, attempt) = (generation.id, generation.attempt);
                        if !patiently!(patience(&live), self.registry.begin_generation(id, attempt, at).await)? {
                            return Ok(Ending::Deleted);
                        }
                        generation.attempt += 1;
                        generation.started_at = Some(at);
                        generation.status = GenerationStatus::Running;
                    }
                    drawing.tell(DrawEvent::Started);
                }
                Some(GenerationEvent::Progress { done, total }) => {
                    if let Some(generation) = drawing.drawn.stored() {
                        generation.done = done;
                    }
                    live.done.store(done, Ordering::Relaxed);
                    drawing.tell(DrawEvent::Progress { done, total });
                }
                Some(GenerationEvent::Partial { index, number, image }) => {
                    let index = drawing.drawn.request().settings.first_index + index;
                    drawing.tell(DrawEvent::Partial { index, number, image });
                }
                Some(GenerationEvent::Image { index, image }) => {
                    let index = drawing.drawn.request().settings.first_index + index;
                    match self.finish_image(drawing, index, image).await {
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
                    if let Some(generation) = drawing.drawn.stored() {
                        generation.done = generation.new.total;
                    }
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

    /// An image as its caller wants it, with what made it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn encode(&self, new: &NewGeneration, index: u32, image: RgbImage) -> Result<Bytes, Error> {
        let mut text = vec![];
        if self.provenance {
            text.push((
                "coar",
                provenance(&self.executor.info().id, &new.settings, &new.concepts, index),
            ));
        }
        let format = new.settings.format();
        let encoded = tokio::task::spawn_blocking(move || encode(&image, format, &text)).await;
        Ok(encoded.map_err(Error::internal)?.map_err(Error::internal)?.into())
    }

    /// Encodes an image, stores it where its generation is stored, and hands it to the listener.
    async fn finish_image(&self, drawing: &mut Drawing, index: u32, image: RgbImage) -> Result<(), Error> {
        let size = (image.width, image.height);
        let file = self.encode(drawing.drawn.request(), index, image).await?;
        let patience = patience(&drawing.live);
        let stored = match drawing.drawn.stored() {
            Some(generation) => Some(self.store(generation, (index, size), file.clone(), patience).await?),
            None => None,
        };
        drawing.images.extend(stored.clone());
        drawing.tell(DrawEvent::Image { index, file, stored });
        Ok(())
    }

    /// Stores an image's file and its row.
    async fn store(
        &self,
        generation: &Generation,
        (index, size): (u32, (u32, u32)),
        file: Bytes,
        patience: Duration,
    ) -> Result<StoredImage, Error> {
        let new = &generation.new;
        let created_at = patiently!(patience, self.registry.lease_time().await)?;
        let stored = patiently!(patience, self.registry.store(vec![file.clone()]).await)?;
        let image = StoredImage {
            id: ImageId::new(),
            tenant: new.tenant,
            generation: Some(generation.id),
            index,
            seed: Some(new.settings.sampling.seed),
            size,
            blob: stored.first().to_owned(),
            format: new.settings.output_format,
            created_at,
            expires_at: None,
        };
        let attempt = generation.attempt;
        let added = patiently!(patience, self.registry.add_image(&image, attempt).await);
        self.registry.settle(stored, added.is_ok()).await;
        added?;
        Ok(image)
    }

    /// Writes an end down and tells whoever wants to know. False when it had ended before.
    pub(super) async fn end(
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
        EngineError::Device(_) | EngineError::Lost => match &drawing.drawn {
            Drawn::Stored(generation) => generation.attempt < GENERATION_ATTEMPTS,
            Drawn::Transient(..) => false,
        },
        EngineError::Invalid { .. } | EngineError::Overloaded { .. } => false,
    };
    match background && again {
        true => Ending::Again,
        false => Ending::Failed(error.into()),
    }
}
