//! Common to all roles.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::GRACE;
use crate::api;
use crate::cluster::{Executor, Member, Streams, WarmConcepts};
use crate::config::Config;
use crate::decoders::Decoders;
use crate::jobs::{AddressPolicy, Drawings, Wakes, Webhooks, Worker, sweep};
use crate::registry::{
    Backend, DataLock, QueueLimits, Registry, SECRETS_REFRESH, SharedSecrets, Storage, network_filesystem,
};
use crate::service::Links;
use coar_core::engine::EngineHandle;
use coar_core::metrics::meters;

/// Background generations use a quarter of the engine's queue, at most this many places: the rest is for requests whose
/// callers wait.
const BACKGROUND_LIMIT: usize = 32;
/// How often jobs are counted for the metrics: a scrape reads the last count and never the database.
const JOB_COUNT: Duration = Duration::from_secs(2);

/// The open database and blob store, and the lock on the data folder if only this process uses them.
pub(super) struct Opened {
    pub registry: Registry,
    pub lock: Option<DataLock>,
}

/// Opens the database and the blob store. If only this process uses them, takes the lock and cleans up after the
/// previous process: releases its trainings and idempotency keys, and removes unreferenced blobs.
pub(super) async fn open(config: &Config) -> anyhow::Result<Opened> {
    let storage = Storage {
        data: config.storage.data.clone(),
        database: config.storage.database.clone(),
        blobs: config.storage.blobs.clone(),
    };
    if storage.is_shared() {
        let registry = Registry::connect(&storage)
            .await?
            .with_queue_limits(queue_limits(config));
        probe(&storage, &registry).await?;
        tracing::info!(process = %registry.process(), "this process shares its database");
        return Ok(Opened { registry, lock: None });
    }
    if let Some(kind) = network_filesystem(&storage.data) {
        anyhow::ensure!(
            config.data_on_network.is_on(),
            "the folder {} is on a network file system ({kind}), on which SQLite can lose data: use a local disk, or PostgreSQL \
             (--database); --data-on-network=on takes the risk",
            storage.data.display()
        );
        tracing::warn!(kind, "SQLite is on a network file system, where it can lose data");
    }
    close_to_others(&storage.data);
    let lock = DataLock::take(&storage.data)?;
    let registry = Registry::connect(&storage)
        .await?
        .with_queue_limits(queue_limits(config));
    probe(&storage, &registry).await?;
    registry.forget_processes().await?;
    let released = registry.release_all().await?;
    if released > 0 {
        tracing::info!(
            trainings = released,
            "a previous server left unfinished trainings; they resume from their checkpoints"
        );
    }
    let freed = registry.release_keys().await?;
    if freed > 0 {
        tracing::info!(
            keys = freed,
            "requests with an idempotency key ended with the previous server; they may be sent again"
        );
    }
    registry.forget_holds().await?;
    let orphans = registry.collect_garbage().await?;
    if orphans > 0 {
        tracing::info!(blobs = orphans, "removed what an interrupted registration left");
    }
    Ok(Opened {
        registry,
        lock: Some(lock),
    })
}

/// Lists the bucket, if there is one, so that a wrong address or missing credentials are reported at startup.
async fn probe(storage: &Storage, registry: &Registry) -> anyhow::Result<()> {
    let Some(blobs) = &storage.blobs else { return Ok(()) };
    registry.blobs.probe().await.map_err(|error| {
        anyhow::anyhow!(
            "the blob store {blobs} cannot be used: {error}; does the bucket exist, and are AWS_ENDPOINT_URL, AWS_REGION and \
             the credentials right?"
        )
    })
}

fn queue_limits(config: &Config) -> QueueLimits {
    QueueLimits {
        trainings: config.queues.queued_trainings,
        generations: config.queues.queued_generations,
    }
}

/// Removes group and other permissions from the data folder and its database: they hold the secrets that sign URLs and
/// webhooks. A restored backup, for example, may have wider permissions.
fn close_to_others(data: &Path) {
    let names = ["", "coar.sqlite", "coar.sqlite-wal", "coar.sqlite-shm", "blobs"];
    for path in names.map(|name| data.join(name)) {
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        let mode = metadata.permissions().mode();
        if mode & 0o077 == 0 {
            continue;
        }
        let private = std::fs::Permissions::from_mode(mode & !0o077);
        match std::fs::set_permissions(&path, private) {
            Ok(()) => {
                tracing::warn!(path = %path.display(), mode = format!("{:o}", mode & 0o777), "group and others could read this; their permissions are removed");
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "group and others can read this, and their permissions cannot be removed");
            }
        }
    }
}

pub(super) fn webhooks(config: &Config, registry: &Registry, links: &Arc<Links>, own_address: &str) -> Webhooks {
    let policy = AddressPolicy {
        allow_private: config.webhook_allow_private.is_on(),
    };
    Webhooks::new(registry.clone(), api::describe(links.clone(), own_address), policy)
}

pub(super) fn drawings(
    config: &Config,
    registry: &Registry,
    executor: &Executor,
    webhooks: &Webhooks,
    wakes: &Wakes,
) -> Drawings {
    let background = (config.engine.queue / 4).min(BACKGROUND_LIMIT);
    let provenance = config.provenance.is_on();
    Drawings::new(
        registry.clone(),
        executor.clone(),
        webhooks.clone(),
        background,
        provenance,
    )
    .with_wakes(wakes)
}

/// The state that this process reports in its heartbeats.
pub(super) fn member(config: &Config, address: Option<String>, engine: Option<&EngineHandle>) -> Member {
    Member {
        role: config.role.as_str(),
        address,
        engine: engine.cloned(),
        warm: WarmConcepts::default(),
        draining: Arc::new(AtomicBool::new(false)),
    }
}

/// Registers this process: once, or with heartbeats until `ended` if there may be other processes.
pub(super) async fn announce(
    registry: &Registry,
    member: &Member,
    ended: &CancellationToken,
    tracker: &TaskTracker,
) -> anyhow::Result<()> {
    member.announce(registry).await?;
    if registry.backend() == Backend::Postgres {
        tracker.spawn(member.clone().beat(registry.clone(), ended.clone()));
    }
    Ok(())
}

/// The server's present secrets; [`upkeep`] follows their changes.
pub(super) async fn secrets(registry: &Registry) -> anyhow::Result<SharedSecrets> {
    Ok(SharedSecrets::new(registry.server_secrets().await?))
}

/// Follows changes of the server's secrets.
async fn follow_secrets(registry: Registry, secrets: SharedSecrets, stop: CancellationToken) {
    let mut tick = tokio::time::interval(SECRETS_REFRESH);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        if let Err(error) = secrets.refresh(&registry).await {
            tracing::debug!(%error, "the server's secret cannot be read again");
        }
    }
}

/// Removes expired data, counts jobs, and follows changes of the secrets.
pub(super) fn upkeep(
    config: &Config,
    registry: &Registry,
    secrets: &SharedSecrets,
    (tracker, stop): (&TaskTracker, &CancellationToken),
) {
    tracker.spawn(follow_secrets(registry.clone(), secrets.clone(), stop.clone()));
    tracker.spawn(sweep(registry.clone(), config.keep_images(), stop.clone()));
    tracker.spawn(count_jobs(registry.clone(), stop.clone()));
}

/// Runs generations: those of the queue if this process has a device (`here`), otherwise only its own.
pub(super) fn draw(drawings: Drawings, here: bool, tracker: &TaskTracker, stop: &CancellationToken) {
    tracker.spawn(drawings.clone().watch_over(stop.clone()));
    if here {
        tracker.spawn(drawings.work(stop.clone()));
    } else {
        tracker.spawn(drawings.finish(stop.clone()));
    }
}

/// Starts a worker for each training slot.
pub(super) fn train(
    config: &Config,
    registry: &Registry,
    engine: &EngineHandle,
    (wakes, decoders): (&Wakes, Arc<Decoders>),
    (tracker, stop): (&TaskTracker, &CancellationToken),
) {
    let worker = Worker {
        registry: registry.clone(),
        engine: engine.clone(),
        wake: wakes.trainings.clone(),
        stop: stop.clone(),
        previews: config.engine.training_previews,
        decoders,
    };
    for _ in 0..config.engine.training_slots {
        tracker.spawn(worker.clone().work());
    }
}

/// Publishes the number of jobs in each status.
async fn count_jobs(registry: Registry, stop: CancellationToken) {
    let mut tick = tokio::time::interval(JOB_COUNT);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let set = |kind, status, count| meters().jobs.with_label_values(&[kind, status]).set(count);
        match tokio::try_join!(registry.training_counts(), registry.generation_counts()) {
            Ok((trainings, generations)) => {
                trainings
                    .iter()
                    .for_each(|(status, count)| set("training", status.as_str(), *count));
                generations
                    .iter()
                    .for_each(|(status, count)| set("generation", status.as_str(), *count));
            }
            Err(error) => tracing::debug!(%error, "jobs cannot be counted"),
        }
    }
}

/// What is shut down at the end of a process.
pub(super) struct Device {
    pub engine: Option<EngineHandle>,
    pub member: Member,
    /// Ends the heartbeats.
    pub ended: CancellationToken,
    /// Event streams of generations between processes.
    pub streams: Streams,
}

impl Device {
    /// Ends the engine and the background work, and unregisters the process.
    pub(super) async fn end(self, registry: &Registry, tracker: &TaskTracker) -> anyhow::Result<()> {
        let Self {
            engine,
            member,
            ended,
            streams,
        } = self;
        drop(member);
        if let Some(engine) = &engine
            && tokio::time::timeout(GRACE, engine.drain()).await.is_err()
        {
            tracing::error!("the device does not respond; trainings resume from their last checkpoint");
        }
        ended.cancel();
        if tokio::time::timeout(GRACE, tracker.wait()).await.is_err() {
            tracing::error!("background work does not end; its leases expire");
        }
        streams.close().await;
        if let Err(error) = registry.leave().await {
            tracing::warn!(%error, "this process cannot be signed off; the others declare it dead when its heartbeats are missing");
        }
        // Blocks until the device thread has ended, which must not block a thread of the runtime.
        tokio::task::spawn_blocking(move || drop(engine)).await?;
        Ok(())
    }
}
