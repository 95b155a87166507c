//! The handle of a device thread: clonable, bounded, and free of tensors.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::trace::{GenerationClock, Trace};
use super::{
    EngineError, GenerateRequest, GenerationEvent, Health, Load, ModelInfo, TokenCounter, TrainingEvent,
    TrainingRequest,
};
use crate::metrics::meters;

/// Events of one generation. Dropping it cancels the generation.
#[derive(Debug)]
pub struct GenerationStream {
    events: mpsc::Receiver<GenerationEvent>,
    clock: GenerationClock,
}

impl GenerationStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        let event = self.events.recv().await;
        self.clock.saw(event.as_ref());
        event
    }
    /// Blocking version of [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<GenerationEvent> {
        let event = self.events.blocking_recv();
        self.clock.saw(event.as_ref());
        event
    }
}

/// Events of one training. Dropping it cancels the training.
#[derive(Debug)]
pub struct TrainingStream(mpsc::Receiver<TrainingEvent>);

impl TrainingStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<TrainingEvent> {
        self.0.recv().await
    }
    /// Blocking version of [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<TrainingEvent> {
        self.0.blocking_recv()
    }
}

#[derive(Debug)]
pub enum Command {
    Generate {
        request: Box<GenerateRequest>,
        events: mpsc::Sender<GenerationEvent>,
        ticket: Ticket,
    },
    Train {
        request: Box<TrainingRequest>,
        events: mpsc::Sender<TrainingEvent>,
        span: tracing::Span,
    },
    /// Send a checkpoint of every running training, then end it; generations continue.
    EndTrainings { done: tokio::sync::oneshot::Sender<()> },
    /// Like `EndTrainings`, but ends generations too; used before the process stops.
    Drain { done: tokio::sync::oneshot::Sender<()> },
}

/// State that the device thread publishes.
#[derive(Debug)]
pub struct Gauge {
    origin: Instant,
    /// When the thread last reported, in milliseconds after `origin`.
    beat: AtomicU64,
    busy: AtomicBool,
    load: Mutex<Load>,
    waiting_requests: AtomicUsize,
    limit: usize,
}

/// A unit of work that takes longer than this is stuck.
const STUCK: Duration = Duration::from_secs(60);
/// Estimate for callers while the speed is not known yet.
const UNKNOWN_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(120);

impl Gauge {
    pub fn new(limit: usize) -> Self {
        Self {
            origin: Instant::now(),
            beat: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            load: Mutex::default(),
            waiting_requests: AtomicUsize::new(0),
            limit,
        }
    }

    pub fn beat(&self, busy: bool) {
        self.beat
            .store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.busy.store(busy, Ordering::Relaxed);
    }

    pub fn publish(&self, load: Load) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }

    fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stuck_for(&self) -> Option<Duration> {
        let beat = Duration::from_millis(self.beat.load(Ordering::Relaxed));
        let since = self.origin.elapsed().saturating_sub(beat);
        (self.busy.load(Ordering::Relaxed) && since > STUCK).then_some(since)
    }

    /// Estimated time to process the whole queue at the current speed.
    fn wait(&self) -> Duration {
        let load = self.load();
        if load.tokens_per_second <= 0.0 {
            return UNKNOWN_WAIT;
        }
        let seconds = load.waiting_tokens as f64 / load.tokens_per_second;
        Duration::from_secs_f64(seconds.clamp(1.0, LONGEST_WAIT.as_secs_f64()))
    }
}

/// A slot in the queue, released on drop.
#[derive(Debug)]
pub struct Ticket {
    gauge: Arc<Gauge>,
    trace: Trace,
    /// Closed when the request leaves the queue.
    _queue: tracing::Span,
}

impl Ticket {
    /// The request's span, the parent of its later spans.
    pub fn trace(&self) -> Trace {
        self.trace.clone()
    }

    fn take(gauge: &Arc<Gauge>) -> Result<Self, EngineError> {
        let taken = gauge
            .waiting_requests
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
                (waiting < gauge.limit).then_some(waiting + 1)
            });
        match taken {
            Ok(_) => {
                meters().waiting.inc();
                Ok(Self {
                    gauge: gauge.clone(),
                    trace: Trace::current(),
                    _queue: tracing::info_span!("engine.queue"),
                })
            }
            Err(_) => Err(EngineError::Overloaded {
                limit: gauge.limit,
                retry_after: gauge.wait(),
            }),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        meters().waiting.dec();
        self.gauge.waiting_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Shared state between a device thread and its handle.
#[derive(Debug)]
pub struct DeviceThread {
    /// Sends commands to the thread.
    pub commands: mpsc::Sender<Command>,
    pub health: watch::Receiver<Health>,
    pub info: ModelInfo,
    pub counter: TokenCounter,
    pub gauge: Arc<Gauge>,
    /// Joins the thread when dropped with the last handle, after `commands`.
    pub guard: Arc<dyn Any + Send + Sync>,
}

/// Clonable handle of a device thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    health: watch::Receiver<Health>,
    info: Arc<ModelInfo>,
    counter: Arc<TokenCounter>,
    gauge: Arc<Gauge>,
    /// Dropped after `commands`, so the thread sees its channel closed before it is joined.
    _guard: Arc<dyn Any + Send + Sync>,
}

impl From<DeviceThread> for EngineHandle {
    fn from(thread: DeviceThread) -> Self {
        Self {
            commands: thread.commands,
            health: thread.health,
            info: Arc::new(thread.info),
            counter: Arc::new(thread.counter),
            gauge: thread.gauge,
            _guard: thread.guard,
        }
    }
}

impl EngineHandle {
    /// The loaded model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The device thread's state; does not involve the device.
    pub fn health(&self) -> Health {
        match (self.health.borrow().clone(), self.gauge.stuck_for()) {
            (Health::Ready, Some(since)) => Health::Stuck(since),
            (health, _) => health,
        }
    }

    /// The device thread's load as last reported; does not involve the device.
    pub fn load(&self) -> Load {
        self.gauge.load()
    }

    /// Counts the cost of requests; does not involve the device.
    pub fn counter(&self) -> &TokenCounter {
        &self.counter
    }

    /// Submits a generation to the device thread. Bounded and non-blocking.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full, `Stopped` while draining.
    pub fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, EngineError> {
        let (events, stream) = mpsc::channel(EVENTS_PER_REQUEST);
        let ticket = Ticket::take(&self.gauge)?;
        let request = Box::new(request);
        self.send(Command::Generate {
            request,
            events,
            ticket,
        })?;
        Ok(GenerationStream {
            events: stream,
            clock: GenerationClock::start(),
        })
    }

    /// Submits a training to the device thread. It runs in slices between decode steps.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full, `Stopped` while draining.
    pub fn train(&self, request: TrainingRequest) -> Result<TrainingStream, EngineError> {
        let (events, stream) = mpsc::channel(EVENTS_PER_REQUEST);
        self.send(Command::Train {
            request: Box::new(request),
            events,
            span: tracing::Span::current(),
        })?;
        Ok(TrainingStream(stream))
    }

    /// Requests a last checkpoint of every running training and rejects new work; returns when done. Use a timeout: a
    /// device that hangs never responds.
    pub async fn drain(&self) {
        let (done, finished) = tokio::sync::oneshot::channel();
        if self.commands.send(Command::Drain { done }).await.is_ok() {
            let _ = finished.await;
        }
    }

    /// Requests a last checkpoint of every running training and rejects new trainings; generations continue. Returns
    /// when done. Use a timeout: a device that hangs never responds.
    pub async fn end_trainings(&self) {
        let (done, finished) = tokio::sync::oneshot::channel();
        if self.commands.send(Command::EndTrainings { done }).await.is_ok() {
            let _ = finished.await;
        }
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Overloaded {
                limit: self.commands.max_capacity(),
                retry_after: self.gauge.wait(),
            },
            mpsc::error::TrySendError::Closed(_) => EngineError::Stopped,
        })
    }
}

/// A reader that falls this far behind loses intermediate progress events, never an image, a checkpoint or the final
/// event.
const EVENTS_PER_REQUEST: usize = 64;
