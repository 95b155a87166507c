//! The device thread, the only owner of model and cache. In each iteration, images advance by one code or a training
//! by one slice.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::device_time::DeviceTime;
use super::ending::Joined;
use super::generations::Generations;
use super::images;
use super::memory::{KvMemory, free_bytes, kv_rows};
use super::meters::Published;
use super::trainings::Trainings;
use crate::cgroup::Limits;
use crate::model::decoding::{BatchOptions, DecodeBatch, Speculation};
use crate::model::kv_cache::KvCache;
use crate::model::{LuminaMgpt, ModelError, accelerator};
use crate::training::Estimate;
use coar_core::engine::{Command, DeviceThread, EngineHandle, Gauge, Health, ModelInfo};
use coar_core::metrics::meters;
use coar_core::scheduler::{DeviceShare, Turn};
use coar_core::training::Preset;

/// Settings of the device thread.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Limit of queued requests; more are rejected.
    pub queue: usize,
    /// Memory for the KV cache, allocated once at startup.
    pub kv_bytes: KvMemory,
    /// Maximum number of rows of the batch, regardless of memory; a guided image takes two.
    pub rows: usize,
    /// Text tokens that fit into a row.
    pub prompt_tokens: usize,
    /// Memory for resident concepts that are not in use, in bytes.
    pub concept_bytes: usize,
    /// Share of device time for trainings while images wait, 0..=1. Without images they get all of it.
    pub training_share: f64,
    /// Memory limit in bytes for the graph of one optimizer step; a training that needs more recomputes layers in
    /// its backward pass. `None`: half of what is free when the training starts.
    pub training_bytes: Option<u64>,
    /// Maximum interval between a training's checkpoints.
    pub checkpoint_every: Duration,
    /// Threads for libtorch; 0: its default, or fewer under a quota.
    pub threads: i32,
    /// Makes an image's codes independent of the rest of the batch even if libtorch's kernels depend on the batch
    /// size: every step has the shapes of the full batch. Not needed with the CPU's own decode step.
    pub deterministic: bool,
    /// Codes per decode step.
    pub speculation: Speculation,
    /// Measure device time spent on images and on trainings by the device's own clock: see [`super::Load`].
    pub measure_device_time: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            queue: 64,
            kv_bytes: KvMemory::Auto,
            rows: 64,
            prompt_tokens: 256,
            concept_bytes: 256 << 20,
            training_share: 0.5,
            training_bytes: None,
            checkpoint_every: Duration::from_secs(5),
            threads: 0,
            deterministic: false,
            speculation: Speculation::Off,
            measure_device_time: false,
        }
    }
}

/// Starts the device thread; `load` runs on it. Returns when the model is loaded.
///
/// # Errors
/// Those of `load`.
pub fn start(
    options: EngineOptions,
    load: impl FnOnce() -> Result<(LuminaMgpt, ModelInfo), ModelError> + Send + 'static,
) -> Result<EngineHandle, ModelError> {
    let (commands, inbox) = mpsc::channel(options.queue.max(1));
    let (health_sender, health) = watch::channel(Health::Loading);
    let (loaded_sender, loaded) = std::sync::mpsc::channel();
    let gauge = Arc::new(Gauge::new(options.queue));
    let own_gauge = gauge.clone();
    let spawned = std::thread::Builder::new()
        .name("coar-device".to_owned())
        .spawn(move || {
            set_threads(options.threads);
            let _no_grad = tch::no_grad_guard();
            let thread = load().and_then(|(model, info)| {
                let counter = model.token_counter(longest_row(&model, options.prompt_tokens));
                let thread = Thread::new(model, (&options, info.preset), inbox, own_gauge)?;
                Ok((thread, (info, counter)))
            });
            match thread {
                Ok((thread, loaded)) => {
                    health_sender.send_replace(Health::Ready);
                    // If the receiver was dropped, the closed channel ends the loop below.
                    let _ = loaded_sender.send(Ok(loaded));
                    thread.run();
                    health_sender.send_replace(Health::Stopped("the engine has stopped".to_owned()));
                }
                Err(error) => {
                    health_sender.send_replace(Health::Stopped(error.to_string()));
                    let _ = loaded_sender.send(Err(error));
                }
            }
        });
    let thread = spawned.map_err(|error| ModelError::invalid("engine", format!("cannot start its thread: {error}")))?;
    let (info, counter) = loaded
        .recv()
        .map_err(|_| ModelError::invalid("engine", "ended while it was loading"))??;
    let thread = DeviceThread {
        commands,
        health,
        info,
        counter,
        gauge,
        guard: Arc::new(Joined(Some(thread))),
    };
    Ok(thread.into())
}

/// Sets libtorch's number of threads. 0 means its default, the machine's cores, but not more than a container's quota
/// allows.
pub(crate) fn set_threads(threads: i32) {
    let limits = Limits::current();
    let quota = limits.threads().and_then(|quota| i32::try_from(quota).ok());
    match (threads, quota) {
        (0, Some(quota)) if quota < tch::get_num_threads() => tch::set_num_threads(quota),
        (0, _) => {}
        (threads, _) => tch::set_num_threads(threads),
    }
    tracing::info!(
        threads = tch::get_num_threads(),
        processor_quota = limits.processors,
        memory_limit = limits.memory.map(|memory| memory.limit),
        memory_free = free_bytes(tch::Device::Cpu),
        "limits of the machine and its control groups"
    );
}

/// Poll interval of a waiting training.
const POLL: Duration = Duration::from_millis(1);

struct Thread {
    model: LuminaMgpt,
    images: Vec<JoinHandle<()>>,
    inbox: mpsc::Receiver<Command>,
    generations: Generations,
    trainings: Trainings,
    share: DeviceShare,
    time: Option<DeviceTime>,
    gauge: Arc<Gauge>,
    published: Published,
}

/// Length of the longest row: text, image start and sizes, context positions, and the largest image.
fn longest_row(model: &LuminaMgpt, prompt_tokens: usize) -> i64 {
    let image = |&(width, height): &(u32, u32)| {
        let (rows, columns) = model.codes_of(width, height);
        rows * (columns + 1)
    };
    let images = model.sizes().iter().map(image).max().unwrap_or(0);
    (prompt_tokens as i64 + images).min(model.transformer.config().max_position_embeddings)
}

impl Thread {
    fn new(
        model: LuminaMgpt,
        (options, preset): (&EngineOptions, Preset),
        inbox: mpsc::Receiver<Command>,
        gauge: Arc<Gauge>,
    ) -> Result<Self, ModelError> {
        let max_seq = longest_row(&model, options.prompt_tokens);
        let row = KvCache::row_bytes(model.transformer.config(), max_seq, model.transformer.kind());
        let device = model.transformer.device();
        // Releases memory that loading has cached.
        accelerator::synchronize(device)?;
        // CUDA graphs cannot be captured on the default stream.
        accelerator::use_own_stream(device)?;
        accelerator::empty_cache(device);
        let free = free_bytes(device);
        let reserve = model.decode_bytes() + Estimate::of_preset(&model, preset).least();
        let rows = kv_rows(options.kv_bytes.bytes(device, free, reserve), row, options.rows, free)?;
        tracing::info!(
            rows,
            max_seq,
            bytes = row * rows as u64,
            free,
            reserve,
            "key/value cache"
        );
        let batch = BatchOptions {
            rows,
            max_seq,
            fixed_shapes: options.deterministic,
            speculation: options.speculation,
        };
        meters().kv_rows.set(rows as i64);
        meters().kv_bytes.set((row * rows as u64) as i64);
        let batch = DecodeBatch::new(&model.transformer, &model.vocabulary, batch)?;
        // Other threads read the weights on streams of their own: the copies must have completed.
        accelerator::synchronize(device)?;
        let tokenizers = (0..images::threads(model.transformer.device()))
            .map(|_| model.share_vqgan())
            .collect::<Result<_, _>>()?;
        let (orders, images) = images::start(tokenizers)
            .map_err(|error| ModelError::invalid("engine", format!("cannot start its image thread: {error}")))?;
        let published = Published::new(model.transformer.device());
        Ok(Self {
            generations: Generations::new(device, batch, orders, options.concept_bytes),
            trainings: Trainings::new(device, options.checkpoint_every, options.training_bytes),
            share: DeviceShare::new(options.training_share),
            time: options.measure_device_time.then(|| DeviceTime::new(device)),
            model,
            images,
            inbox,
            gauge,
            published,
        })
    }

    fn run(mut self) {
        self.work();
        let Self {
            generations, images, ..
        } = self;
        // The threads' queues close when the sender is dropped; images in progress are still delivered.
        drop(generations);
        for thread in images {
            if thread.join().is_err() {
                tracing::error!("an image decoding thread panicked");
            }
        }
    }

    fn work(&mut self) {
        loop {
            let idle = self.generations.is_empty() && self.trainings.is_empty();
            self.gauge.beat(!idle);
            let mut command = match idle {
                true => match self.inbox.blocking_recv() {
                    Some(command) => Some(command),
                    None => return,
                },
                false => self.inbox.try_recv().ok(),
            };
            self.gauge.beat(true);
            while let Some(next) = command {
                match next {
                    Command::Generate {
                        request,
                        events,
                        ticket,
                    } => self.generations.enqueue(&self.model, *request, events, ticket),
                    Command::Train { request, events, span } => {
                        self.trainings.enqueue(*request, events, span);
                    }
                    Command::EndTrainings { done } => {
                        self.trainings.close();
                        let _ = done.send(());
                    }
                    Command::Drain { done } => return self.drain(done),
                }
                command = self.inbox.try_recv().ok();
            }
            let training = !self.trainings.is_empty();
            // On the CPU, images are decoded on the same cores as trainings run. Decoding counts as generation time: if
            // generation is behind, a training waits for it instead of competing with it.
            let on_cpu = self.model.transformer.device() == tch::Device::Cpu;
            let decoding = on_cpu && training && self.generations.only_decodes();
            let drawing = decoding || !self.generations.is_empty();
            let turn = self.share.turn(drawing, training);
            if turn == Turn::Training {
                // Submitted work for images that the device has not completed counts as image time.
                let begun = Instant::now();
                self.generations.settle();
                self.share.spent(Turn::Generation, begun.elapsed(), drawing && training);
            }
            let measured = self.time.as_ref().map(DeviceTime::begin);
            let begun = Instant::now();
            match turn {
                Turn::Generation if decoding => std::thread::sleep(POLL),
                Turn::Generation => self.generations.run_slice(&self.model),
                // Without images that wait, a slice ends as soon as one arrives.
                Turn::Training => {
                    let inbox = &self.inbox;
                    self.trainings.run_slice(&self.model, &|| !drawing && !inbox.is_empty());
                }
                Turn::Idle => {}
            }
            let spent = begun.elapsed();
            self.share.spent(turn, spent, drawing && training);
            let mut load = self.generations.load();
            if let (Some(time), Some(begun)) = (&mut self.time, measured) {
                if let Err(error) = begun.and_then(|begun| time.end(turn, begun)) {
                    tracing::warn!(%error, "cannot measure device time");
                }
                (load.generation_seconds, load.training_seconds) = (time.generation, time.training);
            }
            self.published.slice(turn, spent, &load, self.trainings.len());
            self.gauge.publish(load);
        }
    }

    /// Sends a last checkpoint of every training and ends it.
    fn drain(&mut self, done: oneshot::Sender<()>) {
        self.trainings.close();
        self.generations.stop();
        // The caller may have stopped waiting.
        let _ = done.send(());
    }
}
