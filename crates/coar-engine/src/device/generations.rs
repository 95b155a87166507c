//! Generations on the device thread: requests come in, their images are rows of one batch, and codes come out.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use tch::Device;
use tokio::sync::mpsc;

use super::concept_cache::ConceptCache;
use super::guard::{end_process, guarded};
use super::images::{Order, Orders, Recipient};
use crate::injection::DeviceConcept;
use crate::model::accelerator::{self, Event};
use crate::model::decoding::{BatchImageId, DecodeBatch, Drawn};
use crate::model::{LuminaMgpt, ModelError};
use crate::plan::{DrawSettings, PlannedConcept, PlannedSequence, plan_sequence};
use coar_core::engine::{EngineError, GenerateRequest, GenerationEvent, Load, Ticket, Trace};
use coar_core::metrics::{DecodeStep, meters};
use coar_core::scheduler::{Admission, Cost, JobId, Scheduler};

/// Capacity of an event channel that is reserved for images, checkpoints and final events.
pub(super) const RESERVED_EVENTS: usize = 24;

struct Job {
    request: GenerateRequest,
    plan: PlannedSequence,
    events: mpsc::Sender<GenerationEvent>,
    recipient: Arc<Recipient>,
    /// Images in the batch.
    active: Vec<Active>,
    finished: u32,
    codes_per_image: u64,
    columns: i64,
    /// Held until every image has been admitted.
    ticket: Option<Ticket>,
    trace: Trace,
}

/// An image in the batch.
struct Active {
    image: BatchImageId,
    /// Its index in the request.
    index: u32,
    /// Rows of codes that were complete after the last step.
    rows: i64,
}

/// Queued and running requests.
pub(super) struct Generations {
    batch: DecodeBatch,
    scheduler: Scheduler,
    concepts: ConceptCache,
    jobs: HashMap<JobId, Job>,
    next_job: u64,
    orders: Orders,
    speed: Speed,
    device: Device,
    /// End events of the steps that the device may still be working on.
    steps: VecDeque<Event>,
}

/// The number of steps that the host may be ahead of the device. With one, the next step is prepared while the device
/// computes; with more, progress events and cancellations would no longer match what the device does.
const STEPS_AHEAD: usize = 1;

/// Tokens per second, smoothed, for wait estimates.
#[derive(Debug, Default)]
struct Speed {
    tokens_per_second: f64,
}

impl Speed {
    fn saw(&mut self, tokens: f64, seconds: f64) {
        let now = tokens / seconds.max(1e-6);
        self.tokens_per_second = if self.tokens_per_second == 0.0 {
            now
        } else {
            0.95 * self.tokens_per_second + 0.05 * now
        };
    }
}

impl Generations {
    pub(super) fn new(device: Device, batch: DecodeBatch, orders: Orders, concept_bytes: usize) -> Self {
        Self {
            device,
            steps: VecDeque::new(),
            batch,
            scheduler: Scheduler::default(),
            concepts: ConceptCache::new(concept_bytes),
            jobs: HashMap::new(),
            next_job: 0,
            orders,
            speed: Speed::default(),
        }
    }

    /// Whether anything is queued or running.
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether nothing is queued or running, but images are still being decoded to pixels.
    pub(super) fn only_decodes(&self) -> bool {
        self.is_empty() && self.orders.open() > 0
    }

    pub(super) fn load(&self) -> Load {
        let (concept_hits, concept_misses, concept_bytes) = self.concepts.counts();
        Load {
            waiting_tokens: self.scheduler.waiting_tokens(),
            tokens_per_second: self.speed.tokens_per_second,
            images: self.batch.len(),
            free_rows: self.batch.free_rows(),
            concept_hits,
            concept_misses,
            concept_bytes,
            ..Load::default()
        }
    }

    /// Lays out a request and queues it for rows.
    pub(super) fn enqueue(
        &mut self,
        model: &LuminaMgpt,
        request: GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
        ticket: Ticket,
    ) {
        let plan = match guarded(self.device, || plan(model, &request)) {
            Ok(plan) => plan,
            Err(error) => return drop(events.try_send(GenerationEvent::Failed(error))),
        };
        let (rows, columns) = model.codes_of(request.sampling.width, request.sampling.height);
        let job = JobId(self.next_job);
        self.next_job += 1;
        let per_row = plan.layout.ids.len() as u64 + (rows * (columns + 1)) as u64;
        let cost = Cost {
            images: request.count,
            rows_per_image: request.sampling.rows_per_image(),
            tokens_per_image: per_row * request.sampling.rows_per_image() as u64,
        };
        self.scheduler.push(&request.tenant, job, cost);
        let recipient = Arc::new(Recipient {
            events: events.clone(),
            size: request.sampling.size(),
            left: AtomicU32::new(request.count),
            text_tokens: plan.text_tokens as u64,
            image_tokens: u64::from(request.count) * (rows * columns) as u64,
            span: ticket.trace().request().clone(),
        });
        let job_state = Job {
            recipient,
            request,
            plan,
            events,
            active: vec![],
            finished: 0,
            codes_per_image: (rows * columns) as u64,
            columns,
            trace: ticket.trace(),
            ticket: Some(ticket),
        };
        self.jobs.insert(job, job_state);
    }

    /// One iteration: removes cancelled requests, admits queued images that fit, and runs one decode step.
    pub(super) fn run_slice(&mut self, model: &LuminaMgpt) {
        self.drop_cancelled();
        while let Some(admission) = self.scheduler.admit(self.batch.free_rows()) {
            self.admit(model, admission);
        }
        if self.batch.is_empty() {
            return;
        }
        let (begun, images, free) = (Instant::now(), self.batch.len(), self.batch.free_rows());
        match self.step(model) {
            Ok(drawn) => {
                // Most images have two rows; the unit only has to match the unit of the cost.
                let (seconds, pass) = (begun.elapsed().as_secs_f64(), self.batch.last_pass());
                self.speed.saw(2.0 * pass.codes as f64, seconds);
                meters().decode_step(&DecodeStep {
                    seconds,
                    images,
                    codes: pass.codes,
                    free_rows: free,
                    window: pass.tokens,
                    guesses: pass.guesses,
                    right: pass.right,
                });
                drawn.into_iter().for_each(|drawn| self.leave(drawn));
                self.emit_progress();
            }
            Err(error) => self.fail_active(&error),
        }
    }

    /// One decode step, at most [`STEPS_AHEAD`] ahead of the device.
    fn step(&mut self, model: &LuminaMgpt) -> Result<Vec<Drawn>, EngineError> {
        let (batch, steps, device) = (&mut self.batch, &mut self.steps, self.device);
        guarded(device, || {
            while steps.len() > STEPS_AHEAD {
                if let Some(step) = steps.pop_front() {
                    step.wait()?;
                }
            }
            let drawn = batch.step(&model.transformer)?;
            steps.push_back(Event::record(device)?);
            Ok(drawn)
        })
    }

    /// Waits until the device has completed all submitted steps.
    pub(super) fn settle(&mut self) {
        self.steps.clear();
        if let Err(error) = guarded(self.device, || accelerator::synchronize(self.device)) {
            self.fail_active(&error);
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.events.is_closed())
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            self.end(id);
        }
    }

    /// Removes a job with all its queued and running images.
    fn end(&mut self, id: JobId) -> Option<Job> {
        self.scheduler.remove(id);
        let job = self.jobs.remove(&id)?;
        for active in &job.active {
            if let Err(error) = guarded(self.device, || self.batch.remove(active.image)) {
                tracing::error!(%error, "cannot remove an image from the batch");
                self.fail_active(&error);
                break;
            }
        }
        Some(job)
    }

    fn fail(&mut self, id: JobId, error: &EngineError) {
        if let Some(job) = self.end(id) {
            let _ = job.events.try_send(GenerationEvent::Failed(error.clone()));
        }
    }

    /// After a failed step the state of the batch is undefined, so every running request fails; queued ones
    /// continue.
    fn fail_active(&mut self, error: &EngineError) {
        if let Err(beyond) = guarded(self.device, || self.batch.clear()) {
            // A poisoned CUDA context fails every later call; only a new process gets a new one.
            tracing::error!(%error, %beyond, "the device does not recover; exiting to be restarted");
            end_process();
        }
        let active: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| !job.active.is_empty())
            .map(|(&id, _)| id)
            .collect();
        for id in active {
            self.scheduler.remove(id);
            if let Some(job) = self.jobs.remove(&id) {
                let _ = job.events.try_send(GenerationEvent::Failed(error.clone()));
            }
        }
    }

    fn admit(&mut self, model: &LuminaMgpt, admission: Admission) {
        let Some(job) = self.jobs.get_mut(&admission.job) else {
            return;
        };
        if admission.last {
            job.ticket = None;
        }
        if admission.first == 0 {
            let _ = job.events.try_send(GenerationEvent::Started);
        }
        let (batch, concepts) = (&mut self.batch, &mut self.concepts);
        let prefill = job.trace.prefill();
        let started = guarded(self.device, || start(model, batch, concepts, job, admission));
        prefill.end();
        match started {
            Ok(ids) => {
                job.trace.decode();
                let active = |(image, index)| Active { image, index, rows: 0 };
                job.active.extend(ids.into_iter().zip(admission.first..).map(active));
            }
            Err(error) => self.fail(admission.job, &error),
        }
    }

    fn leave(&mut self, drawn: Drawn) {
        let owner = self
            .jobs
            .iter()
            .find_map(|(&id, job)| Some((id, job.active.iter().position(|active| active.image == drawn.id)?)));
        let Some((id, at)) = owner else { return };
        let codes = match drawn.codes {
            Ok(codes) => codes,
            Err(error) => {
                let error = EngineError::Device(format!("{error}; check the weights of the model and of the concepts"));
                return self.fail(id, &error);
            }
        };
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let index = job.active.swap_remove(at).index;
        job.finished += 1;
        let order = Order {
            recipient: job.recipient.clone(),
            index,
            codes,
            partial: None,
        };
        let complete = job.finished == job.request.count;
        if !self.orders.send(id.0, order) {
            let error = EngineError::Device("a thread that decodes images has ended".to_owned());
            return self.fail(id, &error);
        }
        if complete {
            self.jobs.remove(&id);
        }
    }

    fn emit_progress(&mut self) {
        for (&id, job) in self.jobs.iter_mut().filter(|(_, job)| !job.active.is_empty()) {
            let room = job.events.capacity();
            // A partial image must leave enough capacity for images, final events and failures.
            let unfinished = (job.request.count - job.finished) as usize;
            let has_room = room > unfinished + 2 + job.active.len();
            let mut done = u64::from(job.finished) * job.codes_per_image;
            for active in &mut job.active {
                let Some((drawn, total)) = self.batch.progress(active.image) else {
                    continue;
                };
                done += drawn as u64;
                // A step may complete several rows.
                let rows = drawn / job.columns;
                let completed = std::mem::replace(&mut active.rows, rows) + 1..=rows;
                let due = completed.filter_map(|row| {
                    let number = partial_due(job.request.partial_images, row, total / job.columns)?;
                    Some((row, number))
                });
                for (row, number) in due.filter(|_| has_room) {
                    let Ok(mut codes) = self.batch.codes_so_far(active.image) else {
                        continue;
                    };
                    codes.truncate((row * job.columns) as usize);
                    // If the image threads fall behind, partial images are dropped first.
                    let order = Order {
                        recipient: job.recipient.clone(),
                        index: active.index,
                        codes,
                        partial: Some(number),
                    };
                    self.orders.offer(id.0, order);
                }
            }
            if room > RESERVED_EVENTS {
                let _ = job.events.try_send(GenerationEvent::Progress {
                    done: done as u32,
                    total: (u64::from(job.request.count) * job.codes_per_image) as u32,
                });
            }
        }
    }

    /// Notifies all readers that the engine has stopped.
    pub(super) fn stop(&mut self) {
        for (_, job) in self.jobs.drain() {
            let _ = job.events.try_send(GenerationEvent::Failed(EngineError::Stopped));
        }
    }
}

/// Which of `wanted` partial images is due when `row` of `rows` rows of codes are done: evenly spread.
fn partial_due(wanted: u32, row: i64, rows: i64) -> Option<u32> {
    (0..wanted).find(|&number| rows * i64::from(number + 1) / i64::from(wanted + 1) == row && row > 0)
}

fn plan(model: &LuminaMgpt, request: &GenerateRequest) -> Result<PlannedSequence, ModelError> {
    let size = request.sampling.size();
    if !model.sizes().contains(&size) {
        return Err(ModelError::invalid(
            "size",
            format!("is {}x{}, which this model does not support", size.0, size.1),
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
    plan_sequence(model, &request.prompt, &planned, size)
}

/// Adds some of a job's images to the batch.
fn start(
    model: &LuminaMgpt,
    batch: &mut DecodeBatch,
    cache: &mut ConceptCache,
    job: &Job,
    admission: Admission,
) -> Result<Vec<BatchImageId>, ModelError> {
    let request = &job.request;
    let concepts = request
        .concepts
        .iter()
        .map(|concept| cache.get(concept, model.transformer.device()))
        .collect::<Result<Vec<Rc<DeviceConcept>>, _>>()?;
    let first = u64::from(request.first_index) + u64::from(admission.first);
    let settings = DrawSettings {
        sampling: request.sampling,
        images: first..first + u64::from(admission.count),
    };
    let concepts: Vec<&DeviceConcept> = concepts.iter().map(Rc::as_ref).collect();
    batch.add(&model.transformer, &job.plan.request(model, &concepts, &settings)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_images_are_spread_over_the_rows() {
        let due = |wanted: u32| -> Vec<(i64, u32)> {
            (1..12)
                .filter_map(|row| Some((row, partial_due(wanted, row, 12)?)))
                .collect()
        };
        assert_eq!(due(0), []);
        assert_eq!(due(1), [(6, 0)]);
        assert_eq!(due(3), [(3, 0), (6, 1), (9, 2)]);
    }
}
