//! The door: clonable, bounded, and free of tensors.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use coar_core::engine::{Health, ModelInfo};

use super::guard::{device_error, end_process};
use super::meters::{GenerationClock, Trace};
use coar_core::engine::Load;
use coar_core::engine::{Cost, TokenCounter};
use coar_core::engine::{EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingRequest};
use coar_core::metrics::meters;

/// Events of one generation; dropping it cancels the generation.
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
    /// As [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<GenerationEvent> {
        let event = self.events.blocking_recv();
        self.clock.saw(event.as_ref());
        event
    }
}

/// Events of one training; dropping it cancels the training.
#[derive(Debug)]
pub struct TrainingStream(pub(super) mpsc::Receiver<TrainingEvent>);

impl TrainingStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<TrainingEvent> {
        self.0.recv().await
    }
    /// As [`Self::next`], for a thread without a runtime.
    pub fn blocking_next(&mut self) -> Option<TrainingEvent> {
        self.0.blocking_recv()
    }
}

#[derive(Debug)]
pub(super) enum Command {
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
    /// Send a checkpoint of every running training, then end it; generations go on.
    EndTrainings { done: tokio::sync::oneshot::Sender<()> },
    /// The same, and end generations too; used before the process stops.
    Drain { done: tokio::sync::oneshot::Sender<()> },
}

/// What the device thread tells of itself, without being asked.
#[derive(Debug)]
pub(super) struct Gauge {
    origin: Instant,
    /// Milliseconds after `origin` at which the thread last came by.
    beat: AtomicU64,
    busy: AtomicBool,
    load: Mutex<Load>,
    waiting_requests: AtomicUsize,
    limit: usize,
}

/// A slice of work that takes longer than this is stuck.
const STUCK: Duration = Duration::from_secs(60);
/// What is told to callers while the speed is not known yet.
const UNKNOWN_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(120);

impl Gauge {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            origin: Instant::now(),
            beat: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            load: Mutex::default(),
            waiting_requests: AtomicUsize::new(0),
            limit,
        }
    }

    pub(super) fn beat(&self, busy: bool) {
        self.beat
            .store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.busy.store(busy, Ordering::Relaxed);
    }

    pub(super) fn tell(&self, load: Load) {
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

    /// How long what waits will take at the present speed.
    fn wait(&self) -> Duration {
        let load = self.load();
        if load.tokens_per_second <= 0.0 {
            return UNKNOWN_WAIT;
        }
        let seconds = load.waiting_tokens as f64 / load.tokens_per_second;
        Duration::from_secs_f64(seconds.clamp(1.0, LONGEST_WAIT.as_secs_f64()))
    }
}

/// A place in the queue; dropping it gives the place back.
#[derive(Debug)]
pub(super) struct Ticket {
    gauge: Arc<Gauge>,
    trace: Trace,
    /// Ends with the wait.
    _queue: tracing::Span,
}

impl Ticket {
    /// The request that waits, for its later spans.
    pub(super) fn trace(&self) -> Trace {
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

/// Clonable door to the device thread.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) health: watch::Receiver<Health>,
    pub(super) info: Arc<ModelInfo>,
    pub(super) counter: Arc<TokenCounter>,
    pub(super) gauge: Arc<Gauge>,
    /// After `commands`, so that the thread sees its door closed before it is waited for.
    pub(super) _thread: Arc<Joined>,
}

/// Waits for the device thread when the last handle goes: libtorch's own statics must outlive every thread that computes.
#[derive(Debug)]
pub(super) struct Joined(pub Option<std::thread::JoinHandle<()>>);

/// A device thread that has not ended this long after its door was closed is hung.
const LAST_WAIT: Duration = Duration::from_secs(10);

impl Drop for Joined {
    /// On a thread of a runtime the wait goes to the runtime's blocking threads: other tasks go on, and the runtime's end
    /// waits for it.
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let ending = Ending(Some(thread));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // Where the runtime takes no more tasks, `ending` is dropped here, and waits here.
            runtime.spawn_blocking(move || drop(ending));
        }
    }
}

/// Waits for the thread when it is dropped.
struct Ending(Option<std::thread::JoinHandle<()>>);

impl Drop for Ending {
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let since = Instant::now();
        while !thread.is_finished() {
            if since.elapsed() > LAST_WAIT {
                tracing::error!("the device thread does not end; the process ends without it");
                end_process();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if thread.join().is_err() {
            tracing::error!("the device thread has panicked");
        }
    }
}

impl EngineHandle {
    /// What the loaded model is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The device thread's state; never asks the device.
    pub fn health(&self) -> Health {
        match (self.health.borrow().clone(), self.gauge.stuck_for()) {
            (Health::Ready, Some(since)) => Health::Stuck(since),
            (health, _) => health,
        }
    }

    /// What the device thread had to do when it last came by; never asks the device.
    pub fn load(&self) -> Load {
        self.gauge.load()
    }

    /// What a request will cost; counted here, the device is not asked.
    ///
    /// # Errors
    /// `Invalid` when the prompt cannot be tokenised or is too long for a row of the batch.
    pub fn cost(&self, request: &GenerateRequest) -> Result<Cost, EngineError> {
        self.counter.count(request).map_err(|error| device_error(&error.into()))
    }

    /// Hands a generation to the device thread. Bounded and without waiting.
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

    /// Hands a training to the device thread. It runs in slices between the steps of generations.
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

    /// Asks every running training for a last checkpoint and stops taking work; returns when that has happened, at the
    /// latest after `within`: a device that hangs holds nobody up for ever. False when it came to that.
    pub async fn drain(&self, within: Duration) -> bool {
        let (done, finished) = tokio::sync::oneshot::channel();
        let asked = async {
            if self.commands.send(Command::Drain { done }).await.is_ok() {
                let _ = finished.await;
            }
        };
        tokio::time::timeout(within, asked).await.is_ok()
    }

    /// Asks every running training for a last checkpoint and takes no more trainings; generations go on. Returns when that
    /// has happened, at the latest after `within`. False when it came to that.
    pub async fn end_trainings(&self, within: Duration) -> bool {
        let (done, finished) = tokio::sync::oneshot::channel();
        let asked = async {
            if self.commands.send(Command::EndTrainings { done }).await.is_ok() {
                let _ = finished.await;
            }
        };
        tokio::time::timeout(within, asked).await.is_ok()
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

/// A reader that falls this far behind loses intermediate progress events, never a picture, a checkpoint or the end.
const EVENTS_PER_REQUEST: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_handle_blocks_no_thread_of_a_runtime() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            ended.recv().unwrap_or(());
            let _ = done.send(());
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // With the wait on the runtime's only thread this would never come to the next line.
        runtime.block_on(async move { drop(Joined(Some(thread))) });
        drop(end);
        drop(runtime);
        assert!(is_done.try_recv().is_ok(), "the runtime's end waits for the thread");
        // Without a runtime it waits where it is.
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _ = done.send(());
        });
        drop(Joined(Some(thread)));
        assert!(is_done.try_recv().is_ok());
    }
}
