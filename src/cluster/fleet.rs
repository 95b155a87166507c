//! Workers as seen by an API process: discovery, routing, and failover when a worker is lost.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use reqwest::{Client, Response};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Streams;
use super::member::{LoadReport, short};
use super::wire::{Decoder, Frame, GenerationRequest, Refusal, TokenizerFile};
use super::worker::worker_token;
use crate::registry::{Process, Registry, SharedSecrets, now};
use coar_core::engine::{EngineError, GenerationEvent, ModelInfo, TokenCounter};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ProcessId;
use coar_core::routing::{Candidate, choose_worker};

/// How often the list of workers is refreshed.
const REFRESH: Duration = Duration::from_millis(500);
/// A worker sends a frame at least every two seconds; one that is silent for this long is considered lost.
const SILENCE: Duration = Duration::from_secs(6);
/// How long a worker may take to accept a request.
const ACCEPT: Duration = Duration::from_secs(4);
/// A worker that did not respond is avoided for this long if there are others. If it is dead, it is off the list by
/// then.
const SUSPECT_FOR: Duration = Duration::from_secs(7);
/// How long a generation that has lost its worker waits for another.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many workers one generation may lose.
const LOSSES: usize = 4;
/// Buffered events for a slow reader.
const EVENTS: usize = 64;

/// The workers that serve one base model.
#[derive(Debug, Clone)]
pub struct Fleet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    info: ModelInfo,
    counter: TokenCounter,
    registry: Registry,
    client: Client,
    secrets: SharedSecrets,
    workers: RwLock<Vec<Worker>>,
    /// Workers that did not respond, and since when.
    suspects: Mutex<HashMap<ProcessId, Instant>>,
    streams: Streams,
}

#[derive(Debug, Clone)]
struct Worker {
    id: ProcessId,
    address: String,
    draining: bool,
    report: LoadReport,
    /// Tokens that this process has sent to the worker and that are not generated yet.
    sent: Arc<AtomicU64>,
    /// Tokens queued at the worker in addition to those, from other processes, according to its last report.
    others: u64,
}

/// Counts tokens sent to a worker until dropped.
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

/// Events of a generation that runs on a worker. Dropping it cancels the generation.
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

/// What this process shows to workers at this moment.
fn token(secrets: &SharedSecrets) -> String {
    worker_token(secrets.get().signing(now()))
}

/// Fetches the data for counting tokens the same way as the worker at `address`.
async fn tokenizer_of(client: &Client, address: &str, token: &str) -> Result<TokenCounter, String> {
    let url = format!("{}{}", address.trim_end_matches('/'), super::worker::TOKENIZER);
    let file = async {
        let answer = client.get(url).bearer_auth(token).send().await?.error_for_status()?;
        answer.json::<TokenizerFile>().await
    };
    let file = tokio::time::timeout(ACCEPT, file)
        .await
        .map_err(|_| format!("no answer within {} s", ACCEPT.as_secs()))?
        .map_err(|error| error.to_string())?;
    TokenCounter::try_from(file).map_err(|error| error.to_string())
}

fn model_of(process: &Process) -> Option<ModelInfo> {
    serde_json::from_str(process.model.as_deref()?).ok()
}

/// The cost of a request for a worker, as a relative measure: a code covers 16 x 16 pixels.
fn tokens(request: &GenerationRequest) -> u64 {
    let settings = &request.settings;
    u64::from(settings.n) * u64::from(settings.sampling.width) * u64::from(settings.sampling.height) / 256
}

fn no_worker() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "no_worker",
        "No worker is available; retry shortly.",
    )
    .retry_after(Duration::from_secs(2))
}

/// Chooses one of several workers: see [`choose_worker`].
fn choose<'a>(
    workers: impl Iterator<Item = &'a Worker>,
    hashes: &[String],
    (rows, tokens): (usize, u64),
) -> Option<&'a Worker> {
    let workers: Vec<&Worker> = workers.collect();
    let candidate = |worker: &&Worker| {
        let warm: HashSet<&str> = worker.report.warm.iter().map(String::as_str).collect();
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
    /// Waits for the first worker. Its model becomes the fleet's model.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub async fn find(registry: Registry, secrets: SharedSecrets, streams: Streams) -> anyhow::Result<Self> {
        // Fails if a provider is already installed, which is then kept.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .no_proxy()
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        let mut logged = false;
        loop {
            match registry.processes().await {
                Ok(processes) => {
                    let found = processes.iter().find_map(|process| {
                        let address = process.address.as_ref().filter(|_| !process.draining)?;
                        Some((process.id, address, model_of(process)?))
                    });
                    if let Some((worker, address, info)) = found {
                        match tokenizer_of(&client, address, &token(&secrets)).await {
                            Ok(counter) => {
                                let fleet = Self(Arc::new(Shared {
                                    info,
                                    counter,
                                    registry,
                                    client,
                                    secrets,
                                    workers: RwLock::default(),
                                    suspects: Mutex::default(),
                                    streams,
                                }));
                                fleet.update(&processes);
                                return Ok(fleet);
                            }
                            Err(problem) => tracing::warn!(%worker, problem, "cannot fetch the worker's tokenizer"),
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot list workers"),
            }
            if !std::mem::replace(&mut logged, true) {
                tracing::info!("waiting for a worker");
            }
            tokio::time::sleep(REFRESH).await;
        }
    }

    /// The model that the workers have loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.0.info
    }

    /// Counts the cost of generations on that model.
    pub fn counter(&self) -> &TokenCounter {
        &self.0.counter
    }

    /// Refreshes the list of workers periodically until `stop`.
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
            // Keeps the previous list.
            Err(error) => tracing::warn!(%error, "cannot list workers"),
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
                    tracing::debug!(worker = %process.id, model = model.id, "ignoring worker with a different model");
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

    /// Picks the next worker. The request counts against it from now on, so concurrent calls see it.
    fn pick(&self, request: &GenerationRequest, tried: &HashSet<ProcessId>) -> Option<(Worker, Load)> {
        // Concurrent callers see each other's choices.
        let workers = self.0.workers.write().unwrap_or_else(PoisonError::into_inner);
        let hashes: Vec<String> = request.concepts.iter().map(|concept| concept.hash.clone()).collect();
        let rows_per_image = request.settings.sampling.rows_per_image();
        let mut suspects = self.0.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        suspects.retain(|_, since| since.elapsed() < SUSPECT_FOR);
        let (rows, able) = (rows_per_image * request.settings.n as usize, |worker: &&Worker| {
            !worker.draining && !tried.contains(&worker.id)
        });
        let healthy = workers
            .iter()
            .filter(|worker| able(worker) && !suspects.contains_key(&worker.id));
        let worker = choose(healthy, &hashes, (rows, tokens(request)))
            .or_else(|| choose(workers.iter().filter(able), &hashes, (rows, tokens(request))))?;
        Some((worker.clone(), Load::new(worker, tokens(request))))
    }

    fn suspect(&self, worker: ProcessId) {
        let mut suspects = self.0.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        suspects.insert(worker, Instant::now());
    }

    async fn post(&self, worker: &Worker, path: &str, request: &GenerationRequest) -> Result<Response, String> {
        let url = format!("{}{path}", worker.address.trim_end_matches('/'));
        let token = token(&self.0.secrets);
        let sent = self.0.client.post(url).bearer_auth(token).json(request).send();
        match tokio::time::timeout(ACCEPT, sent).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ACCEPT.as_secs())),
        }
    }

    /// Offers the request to one worker after another until one accepts it.
    async fn submit(
        &self,
        path: &str,
        request: &GenerationRequest,
        tried: &mut HashSet<ProcessId>,
    ) -> Result<Accepted, Error> {
        let mut last = None;
        while let Some((worker, load)) = self.pick(request, tried) {
            match self.post(&worker, path, request).await {
                Ok(answer) if answer.status().is_success() => return Ok(Accepted { worker, load, answer }),
                Ok(answer) => {
                    let error = match answer.json::<Refusal>().await {
                        Ok(refusal) => Error::from(refusal),
                        Err(error) => Error::internal(error),
                    };
                    // Another worker would refuse it too.
                    if !matches!(error.kind, ErrorKind::Overloaded | ErrorKind::Unavailable) {
                        return Err(error);
                    }
                    last = Some(error);
                }
                Err(problem) => {
                    tracing::warn!(worker = %worker.id, problem, "worker unreachable");
                    self.suspect(worker.id);
                }
            }
            tried.insert(worker.id);
        }
        Err(last.unwrap_or_else(no_worker))
    }

    /// Sends a generation to a worker.
    pub(super) async fn start(&self, request: Arc<GenerationRequest>) -> Result<RemoteStream, Error> {
        let mut tried = HashSet::new();
        let accepted = self.submit(super::worker::GENERATE, &request, &mut tried).await?;
        let (events, stream) = mpsc::channel(EVENTS);
        let cancel = CancellationToken::new();
        let stopped = cancel.clone();
        let forwarding = Forwarding {
            fleet: self.clone(),
            request,
            events,
            seen: Seen::default(),
        };
        self.0.streams.spawn(async move {
            tokio::select! {
                () = forwarding.run(accepted) => {}
                () = stopped.cancelled() => {}
            }
        });
        Ok(RemoteStream {
            events: stream,
            _cancel: cancel.drop_guard(),
        })
    }
}

/// What the reader has already received. Another worker starts over, and duplicates are dropped.
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

/// Whether a stream has ended, or its worker was lost.
enum Outcome {
    Ended,
    Lost(String),
}

/// A worker that has accepted, with its response.
struct Accepted {
    worker: Worker,
    load: Load,
    answer: Response,
}

struct Forwarding {
    fleet: Fleet,
    request: Arc<GenerationRequest>,
    events: mpsc::Sender<GenerationEvent>,
    seen: Seen,
}

impl Forwarding {
    /// Forwards events. If a worker is lost, another one generates the same images.
    async fn run(mut self, mut accepted: Accepted) {
        for _ in 0..LOSSES {
            let lost = accepted.worker.id;
            let problem = match self.follow(accepted).await {
                Outcome::Ended => return,
                Outcome::Lost(problem) => problem,
            };
            tracing::warn!(worker = %lost, problem, "worker lost during a generation; retrying on another worker");
            self.fleet.suspect(lost);
            match self.another(lost).await {
                Some(next) => accepted = next,
                None => break,
            }
        }
        let _ = self.events.send(GenerationEvent::Failed(EngineError::Lost)).await;
    }

    async fn another(&self, lost: ProcessId) -> Option<Accepted> {
        let until = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < until {
            let mut tried = HashSet::from([lost]);
            if let Ok(next) = self
                .fleet
                .submit(super::worker::GENERATE, &self.request, &mut tried)
                .await
            {
                return Some(next);
            }
            tokio::time::sleep(REFRESH).await;
            self.fleet.refresh().await;
        }
        None
    }

    async fn follow(&mut self, accepted: Accepted) -> Outcome {
        let Accepted {
            load: _load,
            mut answer,
            ..
        } = accepted;
        let mut decoder = Decoder::default();
        loop {
            let piece = match tokio::time::timeout(SILENCE, answer.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Outcome::Lost("the response ended early".to_owned()),
                Ok(Err(error)) => return Outcome::Lost(error.to_string()),
                Err(_) => return Outcome::Lost(format!("no data for {} s", SILENCE.as_secs())),
            };
            decoder.add(&piece);
            loop {
                let event = match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(Frame::Alive)) => continue,
                    Ok(Some(Frame::Event(GenerationEvent::Failed(EngineError::Stopped)))) => {
                        return Outcome::Lost("it stops".to_owned());
                    }
                    Ok(Some(Frame::Event(event))) => event,
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

    fn worker(waiting: u64, free_rows: usize, warm: &[&str]) -> Worker {
        Worker {
            id: ProcessId::new(),
            address: String::new(),
            draining: false,
            report: LoadReport {
                waiting_tokens: waiting,
                free_rows,
                warm: warm.iter().map(|hash| (*hash).to_owned()).collect(),
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
    fn prefers_a_warm_worker_without_extra_wait() {
        let (a, b) = ("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb");
        // Both have free capacity: the warm one.
        assert_eq!(chosen(&[worker(0, 8, &[]), worker(0, 8, &[b, a])], &[a]), 1);
        // The warm one is full: the cold one.
        assert_eq!(chosen(&[worker(0, 8, &[]), worker(500, 0, &[a])], &[a]), 0);
        // Both are equally full: the warm one.
        assert_eq!(chosen(&[worker(500, 0, &[]), worker(500, 0, &[a])], &[a]), 1);
        // Neither is warm: the one with less queued work, including what was just sent.
        let busy = [worker(0, 8, &[]), worker(0, 8, &[])];
        busy[0].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&busy, &[a]), 1);
        // A warm cache is worth one extra request, not two.
        let warm = [worker(0, 8, &[]), worker(0, 8, &[a])];
        warm[1].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&warm, &[a]), 1);
        warm[1].sent.fetch_add(144, Ordering::Relaxed);
        assert_eq!(chosen(&warm, &[a]), 0);
        assert!(choose([].iter(), &[], (2, 144)).is_none());
    }

    #[test]
    fn failover_drops_duplicate_events() {
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
