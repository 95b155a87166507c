//! One generation, from the engine's first event to the end of its row.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{DrawEvent, Drawings, Live, RETRY_FOR, RETRY_LONG_FOR};
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

/// Buffer capacity that progress and partial images leave free.
const RESERVED: usize = 12;

/// The target of a generation.
pub(super) enum Drawn {
    /// A row of the database; its images become files.
    Stored(Generation),
    /// Images go to the reader only.
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

/// A generation with an open stream from the engine.
struct RunningGeneration {
    drawn: Drawn,
    stream: EventStream,
    live: Arc<Live>,
    reader: Option<mpsc::Sender<DrawEvent>>,
    /// The idempotency key of the caller.
    claim: Option<KeyClaim>,
    images: Vec<StoredImage>,
    _slot: Option<OwnedSemaphorePermit>,
}

/// How a generation ended.
pub(super) enum Ending {
    Succeeded(TokenUsage),
    Failed(Error),
    Cancelled,
    /// The server is stopping, or the device failed and another attempt is left.
    Again,
    /// The row was deleted.
    Deleted,
}

/// How codes are sampled. Another method draws another image from the same seed, so it is part of the provenance.
/// Images without this entry were sampled by inverting the cumulative distribution.
const SAMPLER: &str = "gumbel_max";

/// Provenance for an image's metadata. The prompt is left out: it may be private, and images are shared.
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
        "sampler": SAMPLER,
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
        (reader, slot): (Option<mpsc::Sender<DrawEvent>>, Option<OwnedSemaphorePermit>),
    ) -> Arc<Live> {
        let live = Arc::new(Live {
            cancel: CancellationToken::new(),
            stored: matches!(drawn, Drawn::Stored(_)),
            background: AtomicBool::new(drawn.request().background),
            done: AtomicU32::new(0),
        });
        self.live().insert(drawn.id(), live.clone());
        let running = RunningGeneration {
            drawn,
            stream,
            live: live.clone(),
            reader,
            claim: KeyClaim::current(),
            images: vec![],
            _slot: slot,
        };
        // The span ends with the generation.
        self.tasks.spawn(self.clone().run(running).in_current_span());
        live
    }

    async fn run(self, mut running: RunningGeneration) {
        let id = running.drawn.id();
        let ending = match self.follow(&mut running).await {
            Ok(ending) => ending,
            Err(error) if error.is_transient() && running.live.background.load(Ordering::Relaxed) => {
                tracing::error!(generation = %id, %error, "generation requeued");
                Ending::Again
            }
            Err(error) => Ending::Failed(Error::internal(error)),
        };
        let result = match &ending {
            Ending::Succeeded(_) => Ok(()),
            Ending::Failed(error) => Err(error.clone()),
            Ending::Cancelled | Ending::Deleted => Err(Error::new(
                ErrorKind::Conflict,
                "cancelled",
                "The generation was cancelled.",
            )),
            Ending::Again => Err(EngineError::Stopped.into()),
        };
        if let Drawn::Stored(generation) = &mut running.drawn {
            let end = self.end(generation, &running.images, ending);
            let mut ended = match running.claim.take() {
                Some(claim) => claim.under(end).await,
                None => end.await,
            };
            if matches!(ended, Err(RegistryError::LeaseLost)) {
                // The caller has retried in the meantime, and another process owns the key.
                let again = Ending::Failed(RegistryError::LeaseLost.into());
                ended = self.end(generation, &running.images, again).await;
            }
            if let Err(error) = ended {
                tracing::error!(generation = %id, %error, "cannot store the end of a generation");
            }
        }
        self.live().remove(&id);
        self.held().remove(&id);
        running.send(DrawEvent::Ended(result));
        self.ends.notify(id);
        // A slot is free: the next one may start.
        self.queued.now();
    }

    /// From the first event to the last.
    async fn follow(&self, running: &mut RunningGeneration) -> Result<Ending, RegistryError> {
        let live = running.live.clone();
        loop {
            let event = tokio::select! {
                event = running.stream.next() => event,
                () = live.cancel.cancelled() => return Ok(Ending::Cancelled),
            };
            match event {
                Some(GenerationEvent::Started) => {
                    if let Some(generation) = running.drawn.stored() {
                        let at = retry_transient!(retry_for(&live), self.registry.lease_time().await)?;
                        let (id, attempt) = (generation.id, generation.attempt);
                        if !retry_transient!(retry_for(&live), self.registry.begin_generation(id, attempt, at).await)? {
                            return Ok(Ending::Deleted);
                        }
                        generation.attempt += 1;
                        generation.started_at = Some(at);
                        generation.status = GenerationStatus::Running;
                    }
                    running.send(DrawEvent::Started);
                }
                Some(GenerationEvent::Progress { done, total }) => {
                    if let Some(generation) = running.drawn.stored() {
                        generation.done = done;
                    }
                    live.done.store(done, Ordering::Relaxed);
                    running.send(DrawEvent::Progress { done, total });
                }
                Some(GenerationEvent::Partial { index, number, image }) => {
                    let index = running.drawn.request().settings.first_index + index;
                    running.send(DrawEvent::Partial { index, number, image });
                }
                Some(GenerationEvent::Image { index, image }) => {
                    let index = running.drawn.request().settings.first_index + index;
                    match self.finish_image(running, index, image).await {
                        Ok(()) => {}
                        // The row was deleted in the meantime, or another process owns it.
                        Err(_) if live.cancel.is_cancelled() => return Ok(Ending::Deleted),
                        Err(error) if error.code == LEASE_LOST => return Ok(Ending::Deleted),
                        Err(error) => return Ok(Ending::Failed(error)),
                    }
                }
                Some(GenerationEvent::Done {
                    text_tokens,
                    image_tokens,
                }) => {
                    if let Some(generation) = running.drawn.stored() {
                        generation.done = generation.new.total;
                    }
                    running.images.sort_by_key(|image| image.index);
                    return Ok(Ending::Succeeded(TokenUsage {
                        text_tokens,
                        image_tokens,
                    }));
                }
                Some(GenerationEvent::Failed(error)) => return Ok(failed(running, error)),
                None => return Ok(failed(running, EngineError::Stopped)),
            }
        }
    }

    /// Encodes an image as requested, with its provenance.
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

    /// Encodes an image, stores it if its generation is stored, and sends it to the reader.
    async fn finish_image(&self, running: &mut RunningGeneration, index: u32, image: RgbImage) -> Result<(), Error> {
        let size = (image.width, image.height);
        let file = self.encode(running.drawn.request(), index, image).await?;
        let retry_for = retry_for(&running.live);
        let stored = match running.drawn.stored() {
            Some(generation) => Some(self.store(generation, (index, size), file.clone(), retry_for).await?),
            None => None,
        };
        running.images.extend(stored.clone());
        running.send(DrawEvent::Image { index, file, stored });
        Ok(())
    }

    /// Stores an image's file and its row.
    async fn store(
        &self,
        generation: &Generation,
        (index, size): (u32, (u32, u32)),
        file: Bytes,
        retry_for: Duration,
    ) -> Result<StoredImage, Error> {
        let new = &generation.new;
        let created_at = retry_transient!(retry_for, self.registry.lease_time().await)?;
        let stored = retry_transient!(retry_for, self.registry.store(vec![file.clone()]).await)?;
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
        let added = retry_transient!(retry_for, self.registry.add_image(&image, attempt).await);
        self.registry.settle(stored, added.is_ok()).await;
        added?;
        Ok(image)
    }

    /// Stores the end of a generation and notifies subscribers. False if it had already ended.
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
                retry_transient!(RETRY_LONG_FOR, self.registry.requeue_generation(generation).await)?;
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
        generation.finished_at = Some(retry_transient!(RETRY_LONG_FOR, self.registry.lease_time().await)?);
        let delivery = self.webhooks.of_generation(generation, images);
        // Retries for a long time: a row must not stay `running` forever.
        let ended = retry_transient!(
            RETRY_LONG_FOR,
            self.registry.end_generation(generation, delivery.as_ref()).await
        )?;
        if ended && delivery.is_some() {
            self.webhooks.stored();
        }
        self.held().remove(&id);
        self.ends.notify(id);
        Ok(ended)
    }
}

impl RunningGeneration {
    /// Sends an event to the reader, if there is one; see [`EVENTS`].
    fn send(&self, event: DrawEvent) {
        let Some(reader) = &self.reader else { return };
        let expendable = matches!(event, DrawEvent::Progress { .. } | DrawEvent::Partial { .. });
        if !expendable || reader.capacity() > RESERVED {
            // A reader that falls behind can read the row instead.
            let _ = reader.try_send(event);
        }
    }
}

fn retry_for(live: &Live) -> Duration {
    match live.background.load(Ordering::Relaxed) {
        true => RETRY_LONG_FOR,
        false => RETRY_FOR,
    }
}

/// What the engine's refusal means for a generation.
fn failed(running: &RunningGeneration, error: EngineError) -> Ending {
    let background = running.live.background.load(Ordering::Relaxed);
    let again = match error {
        EngineError::Stopped => true,
        EngineError::Device(_) | EngineError::Lost => match &running.drawn {
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
