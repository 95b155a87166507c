//! Workers, as an API process sees them: who is there, who should draw what, and what happens when one is lost.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use reqwest::{Client, Response};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Streams;
use super::member::{LoadReport, short};
use super::wire::{Decoder, GenerationRequest, Refusal, Said, TokenizerFile};
use crate::registry::{Process, Registry};
use coar_core::engine::{EngineError, GenerationEvent, ModelInfo, TokenCounter};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ProcessId;
use coar_core::routing::{Candidate, choose_worker};

/// How often the list of workers is read.
const REFRESH: Duration = Duration::from_millis(500);
/// A worker says at least every two seconds that it lives; one that is silent for this long is lost.
const SILENCE: Duration = Duration::from_secs(6);
/// How long a worker may take to accept.
const ACCEPT: Duration = Duration::from_secs(4);
/// One that has not answered is left alone for this long, as long as there are others: by then it is off the list, if it is
/// lost.
const DOUBT: Duration = Duration::from_secs(7);
/// How long a generation that has lost its worker waits for another.
const PATIENCE: Duration = Duration::from_secs(10);
/// Workers that one generation may lose.
const LOSSES: usize = 4;
/// Events on their way to a slow listener.
const EVENTS: usize = 64;

/// The workers of one base model.
#[derive(Debug, Clone)]
pub struct Fleet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    info: ModelInfo,
    counter: TokenCounter,
    registry: Registry,
    client: Client,
    token: String,
    workers: RwLock<Vec<Worker>>,
    /// Workers that have not answered, and since when.
    doubts: Mutex<HashMap<ProcessId, Instant>>,
    streams: Streams,
}

#[derive(Debug, Clone)]
struct Worker {
    id: ProcessId,
    address: String,
    draining: bool,
    report: LoadReport,
    /// Tokens that this process has sent there and that are not drawn yet.
    sent: Arc<AtomicU64>,
    /// Tokens that wait there beyond those, as far as its last report tells: other processes'.
    others: u64,
}

/// Tokens that are at a worker or on their way there, until dropped.
#[derive(Debug)]
struct Load {
    sent: Arc<AtomicU64>,
    tokens: u64,
}

impl Load {
    fn new(worker: &Worker, tokens: u64) -> Self {
        worker.sent.fetch_add(tokens, Ordering::Relaxed);
        Self {
            sent: worker.sent.clone(),
            tokens,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.sent.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// Events of a generation that workers draw; dropping it cancels the generation.
#[derive(Debug)]
pub struct RemoteStream {
    events: mpsc::Receiver<GenerationEvent>,
    _cancel: tokio_util::sync::DropGuard,
}

impl RemoteStream {
    pub(super) async fn next(&mut self) -> Option<GenerationEvent> {
        self.events.recv().await
    }
}

/// What is needed to count tokens as the worker at `address` does.
async fn tokenizer_of(client: &Client, address: &str, token: &str) -> Result<TokenCounter, String> {
    let url = format!("{}{}", address.trim_end_matches('/'), super::worker::TOKENIZER);
    let file = async {
        let answer = client.get(url).bearer_auth(token).send().await?.error_for_status()?;
        answer.json::<TokenizerFile>().await
    };
    let file = tokio::time::timeout(ACCEPT, file)
        .await
        .map_err(|_| format!("it has not answered for {} s", ACCEPT.as_secs()))?
        .map_err(|error| error.to_string())?;
    TokenCounter::try_from(file).map_err(|error| error.to_string())
}

fn model_of(process: &Process) -> Option<ModelInfo> {
    serde_json::from_str(process.model.as_deref()?).ok()
}

/// What an request gives a worker to do. Relative to others is enough: a code is 16 x 16 pixels.
fn tokens(request: &GenerationRequest) -> u64 {
    let settings = &request.settings;
    u64::from(settings.n) * u64::from(settings.sampling.width) * u64::from(settings.sampling.height) / 256
}

fn no_worker() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "no_worker",
        "No worker can be reached that draws; try again soon.",
    )
    .retry_after(Duration::from_secs(2))
}

/// Which of several workers draws next: see [`choose_worker`].
fn choose<'a>(
    workers: impl Iterator<Item = &'a Worker>,
    hashes: &[String],
    (rows, tokens): (usize, u64),
) -> Option<&'a Worker> {
    let workers: Vec<&Worker> = workers.collect();
    let candidate = |worker: &&Worker| {
        let warm: HashSet<&str> = worker.report.hot.iter().map(String::as_str).collect();
        Candidate {
            pending_tokens: worker.sent.load(Ordering::Relaxed) + worker.others,
            begins_at_once: worker.report.free_rows >= rows && worker.report.waiting_tokens == 0,
            warm_concepts: hashes.iter().filter(|hash| warm.contains(short(hash))).count(),
        }
    };
    let candidates: Vec<Candidate> = workers.iter().map(candidate).collect();
    choose_worker(&candidates, tokens).map(|index| workers[index])
}

impl Fleet {
    /// Waits for the first worker: its model is the fleet's.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub async fn find(registry: Registry, token: String, streams: Streams) -> anyhow::Result<Self> {
        // Refused where one is chosen already, which then stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .no_proxy()
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        let mut told = false;
        loop {
            match registry.processes().await {
                Ok(processes) => {
                    let found = processes.iter().find_map(|process| {
                        let address = process.address.as_ref().filter(|_| !process.draining)?;
                        Some((process.id, address, model_of(process)?))
                    });
                    if let Some((worker, address, info)) = found {
                        match tokenizer_of(&client, address, &token).await {
                            Ok(counter) => {
                                let fleet = Self(Arc::new(Shared {
                                    info,
                                    counter,
                                    registry,
                                    client,
                                    token,
                                    workers: RwLock::default(),
                                    doubts: Mutex::default(),
                                    streams,
                                }));
                                fleet.update(&processes);
                                return Ok(fleet);
                            }
                            Err(problem) => tracing::warn!(%worker, problem, "the worker's tokenizer cannot be read"),
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "the list of workers cannot be read"),
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!("waiting for a worker");
            }
            tokio::time::sleep(REFRESH).await;
        }
    }

    /// The model that the workers have loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.0.info
    }

    /// Counts what generations cost on that model.
    pub fn counter(&self) -> &TokenCounter {
        &self.0.counter
    }

    /// Reads the list of workers now and then, until `stop`.
    pub async fn follow(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(REFRESH) => {}
            }
            self.refresh().await;
        }
    }

    async fn refresh(&self) {
        match self.0.registry.processes().await {
            Ok(processes) => self.update(&processes),
            // Those that were there may be there still.
            Err(error) => tracing::warn!(%error, "the list of workers cannot be read"),
        }
    }

    fn update(&self, processes: &[Process]) {
        let mut workers = self.0.workers.write().unwrap_or_else(PoisonError::into_inner);
        let sent: HashMap<ProcessId, Arc<AtomicU64>> =
            workers.iter().map(|worker| (worker.id, worker.sent.clone())).collect();
        *workers = processes
            .iter()
            .filter_map(|process| {
                let model = model_of(process)?;
                if model.fingerprint != self.0.info.fingerprint {
                    tracing::debug!(worker = %process.id, model = model.id, "a worker has another model");
                    return None;
                }
                let sent = sent.get(&process.id).cloned().unwrap_or_default();
                let report: LoadReport = serde_json::from_str(&process.load).unwrap_or_default();
                Some(Worker {
                    id: process.id,
                    address: process.address.clone()?,
                    draining: process.draining,
                    others: report.waiting_tokens.saturating_sub(sent.load(Ordering::Relaxed)),
                    report,
                    sent,
                })
            })
            .collect();
    }

    /// The worker that draws next. The request counts there from now on: others that ask at the same moment see it.
    fn pick(&self, request: &GenerationRequest, tried: &HashSet<ProcessId>) -> Option<(Worker, Load)> {
        // Of several that choose at once each sees what those before it have chosen.
        let workers = self.0.workers.write().unwrap_or_else(PoisonError::into_inner);
        let hashes: Vec<String> = request.concepts.iter().map(|concept| concept.hash.clone()).collect();
        let each = request.settings.sampling.rows_per_image();
        let mut doubts = self.0.doubts.lock().unwrap_or_else(PoisonError::into_inner);
        doubts.retain(|_, since| since.elapsed() < DOUBT);
        let (rows, able) = (each * request.settings.n as usize, |worker: &&Worker| {
            !worker.draining && !tried.contains(&worker.id)
        });
        let sound = workers
            .iter()
            .filter(|worker| able(worker) && !doubts.contains_key(&worker.id));
        let worker = choose(sound, &hashes, (rows, tokens(request)))
            .or_else(|| choose(workers.iter().filter(able), &hashes, (rows, tokens(request))))?;
        Some((worker.clone(), Load::new(worker, tokens(request))))
    }

    fn doubt(&self, worker: ProcessId) {
        let mut doubts = self.0.doubts.lock().unwrap_or_else(PoisonError::into_inner);
        doubts.insert(worker, Instant::now());
    }

    async fn post(&self, worker: &Worker, path: &str, request: &GenerationRequest) -> Result<Response, String> {
        let url = format!("{}{path}", worker.address.trim_end_matches('/'));
        let sent = self.0.client.post(url).bearer_auth(&self.0.token).json(request).send();
        match tokio::time::timeout(ACCEPT, sent).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("it has not answered for {} s", ACCEPT.as_secs())),
        }
    }

    /// Asks workers in turn until one accepts.
    async fn ask(
        &self,
        path: &str,
        request: &GenerationRequest,
        tried: &mut HashSet<ProcessId>,
    ) -> Result<Asked, Error> {
        let mut last = None;
        while let Some((worker, load)) = self.pick(request, tried) {
            match self.post(&worker, path, request).await {
                Ok(answer) if answer.status().is_success() => return Ok(Asked { worker, load, answer }),
                Ok(answer) => {
                    let error = match answer.json::<Refusal>().await {
                        Ok(refusal) => Error::from(refusal),
                        Err(error) => Error::internal(error),
                    };
                    // Another worker would say the same.
                    if !matches!(error.kind, ErrorKind::Overloaded | ErrorKind::Unavailable) {
                        return Err(error);
                    }
                    last = Some(error);
                }
                Err(problem) => {
                    tracing::warn!(worker = %worker.id, problem, "a worker cannot be reached");
                    self.doubt(worker.id);
                }
            }
            tried.insert(worker.id);
        }
        Err(last.unwrap_or_else(no_worker))
    }

    /// Lets a worker draw.
    pub(super) async fn start(&self, request: Arc<GenerationRequest>) -> Result<RemoteStream, Error> {
        let mut tried = HashSet::new();
        let asked = self.ask(super::worker::GENERATE, &request, &mut tried).await?;
        let (events, stream) = mpsc::channel(EVENTS);
        let cancel = CancellationToken::new();
        let stopped = cancel.clone();
        let following = Following {
            fleet: self.clone(),
            request,
            events,
            seen: Seen::default(),
        };
        self.0.streams.spawn(async move {
            tokio::select! {
                () = following.run(asked) => {}
                () = stopped.cancelled() => {}
            }
        });
        Ok(RemoteStream {
            events: stream,
            _cancel: cancel.drop_guard(),
        })
    }
}

/// What a listener has been told: another worker begins anew, and nothing is told twice.
#[derive(Debug, Default)]
struct Seen {
    started: bool,
    done: u32,
    partials: HashSet<(u32, u32)>,
    images: HashSet<u32>,
}

impl Seen {
    fn is_new(&mut self, event: &GenerationEvent) -> bool {
        match event {
            GenerationEvent::Started => !std::mem::replace(&mut self.started, true),
            GenerationEvent::Progress { done, .. } => {
                let further = *done > self.done;
                self.done = self.done.max(*done);
                further
            }
            GenerationEvent::Partial { index, number, .. } => {
                !self.images.contains(index) && self.partials.insert((*index, *number))
            }
            GenerationEvent::Image { index, .. } => self.images.insert(*index),
            GenerationEvent::Done { .. } | GenerationEvent::Failed(_) => true,
        }
    }
}

/// Whether a stream has come to its end, or its worker is lost.
enum Outcome {
    Ended,
    Lost(String),
}

/// A worker that has accepted, and its answer.
struct Asked {
    worker: Worker,
    load: Load,
    answer: Response,
}

struct Following {
    fleet: Fleet,
    request: Arc<GenerationRequest>,
    events: mpsc::Sender<GenerationEvent>,
    seen: Seen,
}

impl Following {
    /// Passes events on; where a worker is lost, another draws the same images.
    async fn run(mut self, mut asked: Asked) {
        for _ in 0..LOSSES {
            let lost = asked.worker.id;
            let problem = match self.follow(asked).await {
                Outcome::Ended => return,
                Outcome::Lost(problem) => problem,
            };
            tracing::warn!(worker = %lost, problem, "a worker was lost while it drew; another draws it again");
            self.fleet.doubt(lost);
            match self.another(lost).await {
                Some(next) => asked = next,
                None => break,
            }
        }
        let _ = self.events.send(GenerationEvent::Failed(EngineError::Lost)).await;
    }

    async fn another(&self, lost: ProcessId) -> Option<Asked> {
        let until = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < until {
            let mut tried = HashSet::from([lost]);
            if let Ok(next) = self.fleet.ask(super::worker::GENERATE, &self.request, &mut tried).await {
                return Some(next);
            }
            tokio::time::sleep(REFRESH).await;
            self.fleet.refresh().await;
        }
        None
    }

    async fn follow(&mut self, asked: Asked) -> Outcome {
        let Asked {
            load: _load,
            mut answer,
            ..
        } = asked;
        let mut decoder = Decoder::default();
        loop {
            let piece = match tokio::time::timeout(SILENCE, answer.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Outcome::Lost("its answer ended in the middle".to_owned()),
                Ok(Err(error)) => return Outcome::Lost(error.to_string()),
                Err(_) => return Outcome::Lost(format!("it said nothing for {} s", SILENCE.as_secs())),
            };
            decoder.add(&piece);
            loop {
                let event = match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(Said::Alive)) => continue,
                    Ok(Some(Said::Event(GenerationEvent::Failed(EngineError::Stopped)))) => {
                        return Outcome::Lost("it stops".to_owned());
                    }
                    Ok(Some(Said::Event(event))) => event,
                    Err(problem) => return Outcome::Lost(problem),
                };
                if !self.seen.is_new(&event) {
                    continue;
                }
                let last = matches!(event, GenerationEvent::Done { .. } | GenerationEvent::Failed(_));
                if self.events.send(event).await.is_err() || last {
                    return Outcome::Ended;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(waiting: u64, free_rows: usize, hot: &[&str]) -> Worker {
        Worker {
            id: ProcessId::new(),
            address: String::new(),
            draining: false,
            report: LoadReport {
                waiting_tokens: waiting,
                free_rows,
                hot: hot.iter().map(|hash| (*hash).to_owned()).collect(),
                ..LoadReport::default()
            },
            sent: Arc::default(),
            others: waiting,
        }
    }

    fn chosen(workers: &[Worker], hashes: &[&str]) -> usize {
        let hashes: Vec<String> = hashes.iter().map(|hash| (*hash).to_owned()).collect();
        let id = choose(workers.iter(), &hashes, (2, 144)).unwrap().id;
        workers.iter().position(|worker| worker.id == id).unwrap()
    }

    #[test]
    fn a_warm_worker_is_chosen_where_it_makes_nobody_wait() {
        let (a, b) = ("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb");
        // Both have room: the warm one.
        assert_eq!(chosen(&[worker(0, 8, &[]), worker(0, 8, &[b, a])], &[a]), 1);
        // The warm one is full: the cold one.
        assert_eq!(chosen(&[worker(0, 8, &[]), worker(500, 0, &[a])], &[a]), 0);
        // Both are full alike: the warm one.
        assert_eq!(chosen(&[worker(500, 0, &[]), worker(500, 0, &[a])], &[a]), 1);
        // Nobody is warm: the one with less to do, what was just sent there included.
        let busy = [worker(0, 8, &[]), worker(0, 8, &[])];
        busy[0].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&busy, &[a]), 1);
        // One request more is worth a warm cache, two are not.
        let warm = [worker(0, 8, &[]), worker(0, 8, &[a])];
        warm[1].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&warm, &[a]), 1);
        warm[1].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&warm, &[a]), 0);
        assert!(choose([].iter(), &[], (2, 144)).is_none());
    }

    #[test]
    fn what_another_worker_draws_again_is_told_once() {
        let mut seen = Seen::default();
        let progress = |done| GenerationEvent::Progress { done, total: 9 };
        assert!(seen.is_new(&GenerationEvent::Started));
        assert!(!seen.is_new(&GenerationEvent::Started));
        assert!(seen.is_new(&progress(5)));
        assert!(!seen.is_new(&progress(3)));
        assert!(seen.is_new(&progress(6)));
        let image = || coar_core::image::RgbImage {
            width: 0,
            height: 0,
            rgb: vec![],
        };
        let drawn = |index| GenerationEvent::Image { index, image: image() };
        assert!(seen.is_new(&drawn(1)));
        assert!(!seen.is_new(&drawn(1)));
        let partial = GenerationEvent::Partial {
            index: 1,
            number: 0,
            image: image(),
        };
        assert!(!seen.is_new(&partial));
    }
}
