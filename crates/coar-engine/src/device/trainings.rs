//! Trainings on the device thread: slices of the open trainings, round-robin.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tch::Device;
use tokio::sync::mpsc;

use super::generations::RESERVED_EVENTS;
use super::guard::guarded;
use crate::model::{LuminaMgpt, ModelError, accelerator};
use crate::training::{Advance, Graph, Trainer};
use coar_core::engine::{EngineError, TrainingEvent, TrainingProgress, TrainingRequest};
use coar_core::metrics::meters;
use coar_core::training::StepLosses;

struct Training {
    trainer: Trainer,
    events: mpsc::Sender<TrainingEvent>,
    checkpointed: Instant,
    started: Instant,
    first_step: u32,
    /// Time spent on the current step.
    in_step: Duration,
    /// Steps after which a preview is sent.
    previews: Vec<u32>,
    span: tracing::Span,
}

/// A training that has not had its first slice.
struct Waiting {
    request: TrainingRequest,
    events: mpsc::Sender<TrainingEvent>,
    span: tracing::Span,
}

/// The state of an open training. A waiting one costs nothing: if it is cancelled before its first slice, it uses no
/// device time. Opening it (its images are encoded) is charged to the trainings' share.
enum Open {
    Waiting(Box<Waiting>),
    Running(Box<Training>),
}

/// Approximate length of a training slice while images wait. On the CPU images and trainings evict each other's caches
/// at every switch, so slices are longer (docs/performance.md).
fn slice_time(device: Device) -> Duration {
    match device {
        Device::Cpu => Duration::from_millis(100),
        _ => Duration::from_millis(20),
    }
}

/// Runs pieces of a training until the slice is over, something other than a piece is done, or `interrupted` returns true
/// after a piece. On an accelerator it waits for each piece: otherwise a slice would end while the device still computes,
/// and its time would be charged to the next unit of work.
fn slice(trainer: &mut Trainer, model: &LuminaMgpt, interrupted: &dyn Fn() -> bool) -> Result<Advance, ModelError> {
    let (device, begun) = (model.transformer.device(), Instant::now());
    loop {
        let advance = trainer.advance(model)?;
        accelerator::synchronize(device)?;
        if advance != Advance::Piece || begun.elapsed() >= slice_time(device) || interrupted() {
            return Ok(advance);
        }
    }
}

/// Open trainings.
pub(super) struct Trainings {
    open: VecDeque<Open>,
    checkpoint_every: Duration,
    /// Memory for the graph of one step; trainings alternate, so only one graph exists at a time.
    bytes: Option<u64>,
    /// New trainings are rejected.
    closed: bool,
    device: Device,
}

impl Trainings {
    /// Sends a checkpoint of each training at least every `checkpoint_every`. The graph of a step may take `bytes`,
    /// or half of what is free when the training starts.
    pub(super) fn new(device: Device, checkpoint_every: Duration, bytes: Option<u64>) -> Self {
        Self {
            device,
            open: VecDeque::new(),
            checkpoint_every,
            bytes,
            closed: false,
        }
    }

    /// Number of open trainings.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether there is no open training.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn enqueue(
        &mut self,
        request: TrainingRequest,
        events: mpsc::Sender<TrainingEvent>,
        span: tracing::Span,
    ) {
        if !self.closed {
            self.open
                .push_back(Open::Waiting(Box::new(Waiting { request, events, span })));
        }
    }

    /// Encodes the images and allocates what the training needs; `None` if that fails, which is reported as an event.
    fn begin(&self, model: &LuminaMgpt, waiting: Waiting) -> Option<Training> {
        let Waiting { request, events, span } = waiting;
        let TrainingRequest {
            spec,
            images,
            checkpoint,
            previews,
        } = request;
        let device = model.transformer.device();
        let opened = span.in_scope(|| {
            guarded(device, || match &checkpoint {
                Some(bytes) => Trainer::resume(model, spec, &images, bytes),
                None => Trainer::new(model, spec, &images),
            })
        });
        let mut trainer = match opened {
            Ok(trainer) => trainer,
            Err(error) => {
                drop(events.try_send(TrainingEvent::Failed(error)));
                return None;
            }
        };
        let free = || super::memory::free_bytes(device).map(|free| free / 2);
        let estimate = trainer.estimate(model);
        if let Some(budget) = self.bytes.or_else(free) {
            let graph = estimate.within(budget);
            tracing::info!(budget, kept = estimate.bytes(Graph::Kept), ?graph, "training started");
            trainer.set_graph(graph);
            trainer.set_class_batch(estimate.class_images_at_once(budget));
        }
        let now = Instant::now();
        let first_step = trainer.step();
        Some(Training {
            trainer,
            events,
            checkpointed: now,
            started: now,
            first_step,
            in_step: Duration::ZERO,
            previews,
            span,
        })
    }

    /// Runs one slice of the next training: its opening, or some of its steps; `interrupted` ends it early.
    pub(super) fn run_slice(&mut self, model: &LuminaMgpt, interrupted: &dyn Fn() -> bool) {
        let mut training = match self.open.pop_front() {
            Some(Open::Waiting(waiting)) if !waiting.events.is_closed() => {
                let training = self.begin(model, *waiting);
                self.open
                    .extend(training.map(|training| Open::Running(Box::new(training))));
                return;
            }
            Some(Open::Running(training)) if !training.events.is_closed() => training,
            _ => return,
        };
        let (span, begun) = (
            tracing::info_span!(parent: &training.span, "train.slice"),
            Instant::now(),
        );
        let device = model.transformer.device();
        let advanced = span.in_scope(|| guarded(device, || slice(&mut training.trainer, model, interrupted)));
        training.in_step += begun.elapsed();
        match advanced {
            Ok(Advance::Finished) => {
                let finished = guarded(device, || training.trainer.concept_file(model.fingerprint()))
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
                    meters().training_step(training.in_step.as_secs_f64(), losses.total);
                    training.emit(losses);
                    training.emit_preview(model);
                }
                if advance != Advance::Piece {
                    training.in_step = Duration::ZERO;
                }
                if training.checkpointed.elapsed() >= self.checkpoint_every {
                    training.emit_checkpoint(device);
                }
                self.open.push_back(Open::Running(training));
            }
            Err(error) => drop(training.events.try_send(TrainingEvent::Failed(error))),
        }
    }

    /// Sends a last checkpoint of each running training. Later trainings end at once, before they start.
    pub(super) fn close(&mut self) {
        self.closed = true;
        for open in self.open.drain(..) {
            if let Open::Running(mut training) = open {
                training.emit_checkpoint(self.device);
            }
        }
    }
}

impl Training {
    fn emit(&self, losses: StepLosses) {
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
            losses,
            steps_per_second,
        };
        let _ = self.events.try_send(TrainingEvent::Progress(progress));
    }

    /// Previews are best effort: skipped if the channel is full or the device fails.
    fn emit_preview(&self, model: &LuminaMgpt) {
        let step = self.trainer.step();
        if !self.previews.contains(&step) || self.events.capacity() <= RESERVED_EVENTS {
            return;
        }
        let file = guarded(model.transformer.device(), || {
            self.trainer.concept_file(model.fingerprint())
        });
        match file.map(|file| file.to_bytes()) {
            Ok(Ok(bytes)) => drop(self.events.try_send(TrainingEvent::Preview {
                step,
                file: bytes.into(),
            })),
            Ok(Err(error)) => tracing::warn!(%error, "cannot encode a training preview"),
            Err(error) => tracing::warn!(%error, "cannot generate a training preview"),
        }
    }

    fn emit_checkpoint(&mut self, device: Device) {
        match guarded(device, || self.trainer.checkpoint()) {
            Ok(bytes) => {
                let step = self.trainer.step();
                let _ = self.events.try_send(TrainingEvent::Checkpoint {
                    step,
                    bytes: bytes.into(),
                });
            }
            Err(error) => tracing::warn!(%error, "cannot create a training checkpoint"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lumina::CheckpointFiles;
    use crate::pocket::unpack_shipped;
    use coar_core::concept::ConceptKind;
    use coar_core::training::{Preset, TrainingSpec};

    /// Fails as soon as it is opened: it has no images.
    fn request() -> TrainingRequest {
        TrainingRequest {
            spec: TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6),
            images: vec![],
            checkpoint: None,
            previews: vec![],
        }
    }

    #[test]
    fn a_training_is_opened_in_its_own_slice_and_not_at_all_once_it_is_cancelled() {
        let cache = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
        let model = LuminaMgpt::load(&files, Device::Cpu, tch::Kind::Float, None).unwrap();
        let mut trainings = Trainings::new(Device::Cpu, Duration::from_secs(60), None);
        let (sender, mut events) = mpsc::channel(4);
        trainings.enqueue(request(), sender, tracing::Span::none());
        assert!(events.try_recv().is_err(), "queueing does no work");
        trainings.run_slice(&model, &|| false);
        assert!(matches!(events.try_recv(), Ok(TrainingEvent::Failed(_))));
        assert!(trainings.is_empty());
        let (sender, events) = mpsc::channel(4);
        let weak = sender.downgrade();
        trainings.enqueue(request(), sender, tracing::Span::none());
        drop(events);
        trainings.run_slice(&model, &|| false);
        assert!(trainings.is_empty() && weak.upgrade().is_none());
    }
}
