//! The device thread: generations advance by one token each turn, trainings by one slice in between.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::command::{EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingProgress, TrainingRequest};
use super::handle::{Command, EngineHandle, Health, ModelInfo};
use super::plan::{PlannedConcept, plan_sequence};
use crate::concept::{DeviceConcept, Placement, context_batch};
use crate::model::decoding::{Decoding, DecodingRequest};
use crate::model::{LuminaMgpt, ModelError};
use crate::training::{Advance, Trainer};

/// How the device thread works.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Requests that may wait; more are refused.
    pub queue: usize,
    /// Generations that advance side by side.
    pub active: usize,
    /// A training's checkpoint is handed out at least this often.
    pub checkpoint_every: Duration,
    /// Threads for libtorch; 0 leaves its default.
    pub threads: i32,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            queue: 64,
            active: 4,
            checkpoint_every: Duration::from_secs(5),
            threads: 0,
        }
    }
}

/// Places in an event channel that progress leaves free for pictures, checkpoints and ends.
const RESERVED_EVENTS: usize = 24;

/// Starts the device thread; `load` runs on it. Returns when the model is loaded.
///
/// # Errors
/// What `load` says.
pub fn start(
    options: EngineOptions,
    load: impl FnOnce() -> Result<(LuminaMgpt, ModelInfo), ModelError> + Send + 'static,
) -> Result<EngineHandle, ModelError> {
    let (commands, inbox) = mpsc::channel(options.queue);
    let (health_sender, health) = watch::channel(Health::Loading);
    let (loaded_sender, loaded) = std::sync::mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("coar-device".to_owned())
        .spawn(move || {
            if options.threads > 0 {
                tch::set_num_threads(options.threads);
            }
            let _no_grad = tch::no_grad_guard();
            let model = match load() {
                Ok((model, info)) => {
                    health_sender.send_replace(Health::Ready);
                    // The starter may have given up; the closed channel ends the loop below.
                    let _ = loaded_sender.send(Ok(info));
                    model
                }
                Err(error) => {
                    health_sender.send_replace(Health::Stopped(error.to_string()));
                    let _ = loaded_sender.send(Err(error));
                    return;
                }
            };
            Thread {
                model,
                options,
                inbox,
                waiting: VecDeque::new(),
                active: vec![],
                trainings: VecDeque::new(),
            }
            .run();
            health_sender.send_replace(Health::Stopped("the engine has stopped".to_owned()));
        });
    spawned.map_err(|error| ModelError::invalid("engine", format!("cannot start its thread: {error}")))?;
    let info = loaded
        .recv()
        .map_err(|_| ModelError::invalid("engine", "ended while it was loading"))??;
    Ok(EngineHandle {
        commands,
        health,
        info: Arc::new(info),
    })
}

struct Generation {
    request: GenerateRequest,
    decoding: Decoding,
    text_tokens: usize,
    events: mpsc::Sender<GenerationEvent>,
}

struct Training {
    trainer: Trainer,
    events: mpsc::Sender<TrainingEvent>,
    checkpointed: Instant,
    started: Instant,
    first_step: u32,
}

struct Thread {
    model: LuminaMgpt,
    options: EngineOptions,
    inbox: mpsc::Receiver<Command>,
    waiting: VecDeque<(GenerateRequest, mpsc::Sender<GenerationEvent>)>,
    active: Vec<Generation>,
    trainings: VecDeque<Training>,
}

fn device(error: &ModelError) -> EngineError {
    match error {
        ModelError::Invalid { field, problem } => EngineError::Invalid {
            field,
            problem: problem.clone(),
        },
        other => EngineError::Device(other.to_string()),
    }
}

/// Runs one unit of work; a panic inside it is that unit's failure, not the thread's end.
fn guarded<T>(work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| device(&error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            tracing::error!(panic = text, "a unit of work panicked");
            Err(EngineError::Device(
                "an internal error; the server's log has the details".to_owned(),
            ))
        }
    }
}

impl Thread {
    fn run(mut self) {
        loop {
            let idle = self.waiting.is_empty() && self.active.is_empty() && self.trainings.is_empty();
            let command = match idle {
                true => self.inbox.blocking_recv(),
                false => self.inbox.try_recv().ok(),
            };
            match command {
                Some(Command::Generate { request, events }) => self.waiting.push_back((request, events)),
                Some(Command::Train { request, events }) => self.open_training(*request, events),
                Some(Command::Drain { done }) => return self.drain(done),
                None if idle => return,
                None => {}
            }
            self.admit();
            self.decode();
            self.train();
        }
    }

    /// Starts waiting generations while there is room.
    fn admit(&mut self) {
        while self.active.len() < self.options.active {
            let Some((request, events)) = self.waiting.pop_front() else {
                return;
            };
            if events.is_closed() {
                continue;
            }
            match guarded(|| start_generation(&self.model, &request)) {
                Ok((decoding, text_tokens)) => {
                    let _ = events.try_send(GenerationEvent::Started);
                    self.active.push(Generation {
                        request,
                        decoding,
                        text_tokens,
                        events,
                    });
                }
                Err(error) => drop(events.try_send(GenerationEvent::Failed(error))),
            }
        }
    }

    /// One token for every active generation; finished ones are decoded and leave.
    fn decode(&mut self) {
        let model = &self.model;
        self.active.retain_mut(|generation| {
            if generation.events.is_closed() {
                return false;
            }
            let stepped = guarded(|| {
                generation.decoding.step(&model.transformer, &model.vocabulary)?;
                if generation.decoding.is_done() {
                    finish(model, generation).map(Some)
                } else {
                    Ok(None)
                }
            });
            match stepped {
                Ok(None) => {
                    if generation.events.capacity() > RESERVED_EVENTS {
                        let (done, total) = generation.decoding.progress();
                        let _ = generation.events.try_send(GenerationEvent::Progress {
                            done: done as u32,
                            total: total as u32,
                        });
                    }
                    true
                }
                Ok(Some(events)) => {
                    for event in events {
                        let _ = generation.events.try_send(event);
                    }
                    false
                }
                Err(error) => {
                    let _ = generation.events.try_send(GenerationEvent::Failed(error));
                    false
                }
            }
        });
    }

    fn open_training(&mut self, request: TrainingRequest, events: mpsc::Sender<TrainingEvent>) {
        let TrainingRequest {
            spec,
            pictures,
            checkpoint,
        } = request;
        let opened = guarded(|| match &checkpoint {
            Some(bytes) => Trainer::resume(&self.model, spec, &pictures, bytes),
            None => Trainer::new(&self.model, spec, &pictures),
        });
        match opened {
            Ok(trainer) => {
                let now = Instant::now();
                let first_step = trainer.step();
                self.trainings.push_back(Training {
                    trainer,
                    events,
                    checkpointed: now,
                    started: now,
                    first_step,
                });
            }
            Err(error) => drop(events.try_send(TrainingEvent::Failed(error))),
        }
    }

    /// One slice of the training whose turn it is.
    fn train(&mut self) {
        let Some(mut training) = self.trainings.pop_front() else {
            return;
        };
        if training.events.is_closed() {
            return;
        }
        match guarded(|| training.trainer.advance(&self.model)) {
            Ok(Advance::Finished) => {
                let finished = guarded(|| training.trainer.concept_file(self.model.fingerprint()))
                    .and_then(|file| file.to_bytes().map_err(|error| EngineError::Device(error.to_string())));
                let event = match finished {
                    Ok(bytes) => TrainingEvent::Done {
                        file: bytes.into(),
                        report: report(&training),
                    },
                    Err(error) => TrainingEvent::Failed(error),
                };
                let _ = training.events.try_send(event);
            }
            Ok(advance) => {
                if let Advance::Step(losses) = advance {
                    training.tell(losses.total);
                }
                if training.checkpointed.elapsed() >= self.options.checkpoint_every {
                    training.hand_out_checkpoint();
                }
                self.trainings.push_back(training);
            }
            Err(error) => drop(training.events.try_send(TrainingEvent::Failed(error))),
        }
    }

    /// Hands out a last checkpoint of every training and ends.
    fn drain(mut self, done: oneshot::Sender<()>) {
        for training in &mut self.trainings {
            training.hand_out_checkpoint();
        }
        for (_, events) in self.waiting.drain(..) {
            let _ = events.try_send(GenerationEvent::Failed(EngineError::Stopped));
        }
        for generation in self.active.drain(..) {
            let _ = generation
                .events
                .try_send(GenerationEvent::Failed(EngineError::Stopped));
        }
        // Whoever asked may be gone.
        let _ = done.send(());
    }
}

impl Training {
    fn tell(&self, loss: f32) {
        if self.events.capacity() <= RESERVED_EVENTS {
            return;
        }
        let step = self.trainer.step();
        let seconds = self.started.elapsed().as_secs_f32().max(1e-3);
        let steps_per_second = (step - self.first_step) as f32 / seconds;
        let total_steps = self.trainer.spec().steps;
        let progress = TrainingProgress {
            step,
            total_steps,
            loss,
            steps_per_second,
        };
        let _ = self.events.try_send(TrainingEvent::Progress(progress));
    }

    fn hand_out_checkpoint(&mut self) {
        match guarded(|| self.trainer.checkpoint()) {
            Ok(bytes) => {
                let step = self.trainer.step();
                let _ = self.events.try_send(TrainingEvent::Checkpoint {
                    step,
                    bytes: bytes.into(),
                });
            }
            Err(error) => tracing::warn!(%error, "a training's checkpoint could not be made"),
        }
        self.checkpointed = Instant::now();
    }
}

fn report(training: &Training) -> serde_json::Value {
    serde_json::json!({
        "seconds": training.started.elapsed().as_secs_f64(),
        "resumed_from_step": training.first_step,
        "losses": training.trainer.losses(),
    })
}

fn start_generation(model: &LuminaMgpt, request: &GenerateRequest) -> Result<(Decoding, usize), ModelError> {
    let size = (request.width, request.height);
    if !model.sizes().contains(&size) {
        return Err(ModelError::invalid(
            "size",
            format!("is {}x{}, which this model does not draw", size.0, size.1),
        ));
    }
    let planned: Vec<PlannedConcept> = request
        .concepts
        .iter()
        .map(|concept| PlannedConcept {
            name: concept.name.clone(),
            kind: concept.kind,
            text_tokens: concept.tensors.text_tokens,
            image_tokens: concept.tensors.image_tokens,
        })
        .collect();
    let (layout, order, text_tokens) = plan_sequence(model, &request.prompt, &planned, size)?;
    let device = model.transformer.device();
    let concepts = order
        .iter()
        .map(|&index| DeviceConcept::upload(&request.concepts[index].tensors, device))
        .collect::<Result<Vec<_>, _>>()?;
    let mut placements = Vec::new();
    for row in 0..i64::from(request.count) {
        for (concept, (text_at, image_at)) in concepts.iter().zip(layout.text_at.iter().zip(&layout.image_at)) {
            placements.push(Placement {
                row,
                concept,
                text_at: text_at.clone(),
                image_at: Some(*image_at),
            });
        }
    }
    let context = context_batch(&placements, request.identity_mask, device)?;
    let (rows, columns) = model.codes_of(size.0, size.1);
    let decoding = Decoding::start(
        &model.transformer,
        DecodingRequest {
            prompt: layout.ids,
            unconditional: model.image_start(size.0, size.1)?.to_vec(),
            context: Some(context),
            rows,
            columns,
            guidance_scale: request.guidance_scale,
            temperature: request.temperature,
            top_k: i64::from(request.top_k),
            streams: (0..u64::from(request.count))
                .map(|index| (request.seed, index))
                .collect(),
        },
    )?;
    Ok((decoding, text_tokens))
}

fn finish(model: &LuminaMgpt, generation: &Generation) -> Result<Vec<GenerationEvent>, ModelError> {
    let (width, height) = (generation.request.width, generation.request.height);
    let mut events = Vec::new();
    let mut image_tokens = 0;
    for (index, codes) in generation.decoding.codes().iter().enumerate() {
        image_tokens += codes.len() as u64;
        let picture = model.decode_picture(codes, width, height)?;
        events.push(GenerationEvent::Picture {
            index: index as u32,
            picture,
        });
    }
    events.push(GenerationEvent::Done {
        text_tokens: generation.text_tokens as u64,
        image_tokens,
    });
    Ok(events)
}
