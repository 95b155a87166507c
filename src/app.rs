//! Wires the rooms together, starts and stops them in order.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, AppState, router};
use crate::config::Config;
use crate::engine::EngineHandle;
use crate::jobs::{AddressPolicy, Drawings, Wake, Webhooks, Worker, deliver, sweep};
use crate::registry::{DataLock, Registry};
use crate::service::{Keys, Limits, Links, Service, Tallies};
use crate::telemetry::meters;

/// Running generations get this long to finish when the server stops.
const GRACE: Duration = Duration::from_secs(20);

/// Background generations take a quarter of the engine's queue, at most so many of its places: the rest is for whoever
/// waits.
const BACKGROUND_LIMIT: usize = 32;

/// How often jobs are counted for the metrics: a scrape reads the last count and never the database.
const JOB_COUNT: Duration = Duration::from_secs(2);

/// Publishes how many jobs there are in each status.
async fn count_jobs(registry: Registry, stop: CancellationToken) {
    let mut tick = tokio::time::interval(JOB_COUNT);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let tell = |kind, status, count| meters().jobs.with_label_values(&[kind, status]).set(count);
        match tokio::try_join!(registry.training_counts(), registry.generation_counts()) {
            Ok((trainings, generations)) => {
                trainings
                    .iter()
                    .for_each(|(status, count)| tell("training", status.as_str(), *count));
                generations
                    .iter()
                    .for_each(|(status, count)| tell("generation", status.as_str(), *count));
            }
            Err(error) => tracing::debug!(%error, "jobs cannot be counted"),
        }
    }
}

/// Serves until `stop`: the listener answers at once, requests are served when `load` has brought the engine.
///
/// Stop, in order: new requests are refused, running ones finish, trainings hand out a last checkpoint and give their
/// lease back, the engine ends.
///
/// # Errors
/// When the data folder is in use or unusable, the model cannot be loaded, or the listener fails.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    load: impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let lock = DataLock::take(&config.data)?;
    let registry = Registry::open(&config.data).await?;
    let released = registry.release_all().await?;
    if released > 0 {
        tracing::info!(
            trainings = released,
            "a previous server left trainings behind; they go on from their checkpoints"
        );
    }
    let freed = registry.release_keys().await?;
    if freed > 0 {
        tracing::info!(
            keys = freed,
            "requests with an idempotency key ended with the previous server; they may be sent again"
        );
    }
    let keys = Keys::new(registry.clone());
    if keys.required().await? {
        tracing::info!("callers need a key");
    } else {
        let address = listener.local_addr()?;
        anyhow::ensure!(
            address.ip().is_loopback(),
            "there are no keys, so that everybody who reaches {address} could do everything: make one with \
             `coar keys create --tenant NAME --data {}`, or listen on 127.0.0.1",
            config.data.display()
        );
        tracing::warn!("there are no keys: whoever reaches {address} is tenant `default` and may do everything");
    }
    let orphans = registry.collect_garbage().await?;
    if orphans > 0 {
        tracing::info!(blobs = orphans, "removed what an interrupted registration left");
    }
    // Tests and scripts that ask for port 0 read the address from this line.
    println!("listening on http://{}", listener.local_addr()?);
    // Web-hooks name pictures by it: nobody's Host header is at hand.
    let own_address = match &config.public_url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => format!("http://{}", listener.local_addr()?),
    };
    let state = AppState::new(config.clone());
    let tracker = TaskTracker::new();
    let closing = CancellationToken::new();
    let http = {
        let (router, closing) = (router(state.clone()), closing.clone());
        let limits = config.limits;
        tokio::spawn(async move { api::listen(listener, router, &limits, closing).await })
    };
    let engine = tokio::task::spawn_blocking(load).await??;
    let wake = Wake::default();
    let links = Arc::new(Links::new(&registry.server_secret().await?, config.keep_images()));
    let policy = AddressPolicy {
        allow_private: config.webhook_allow_private.is_on(),
    };
    let webhooks = Webhooks::new(registry.clone(), api::describe(links.clone(), &own_address), policy);
    let drawings = Drawings::new(
        registry.clone(),
        engine.clone(),
        webhooks.clone(),
        (config.engine.queue / 4).min(BACKGROUND_LIMIT),
        config.provenance.is_on(),
    );
    drawings.recover().await?;
    let service = Service {
        keys,
        registry: registry.clone(),
        engine: engine.clone(),
        wake: wake.clone(),
        limits: Limits::of(&config).into(),
        tallies: Tallies::default(),
        drawings: drawings.clone(),
        links,
    };
    service.readmit_queued().await?;
    state.ready(service);
    tracker.spawn(sweep(registry.clone(), config.keep_images(), stop.clone()));
    tracker.spawn(deliver(webhooks, wake.clone(), stop.clone()));
    tracker.spawn(drawings.work(stop.clone()));
    tracker.spawn(count_jobs(registry.clone(), stop.clone()));
    let worker = Worker {
        registry,
        engine: engine.clone(),
        wake,
        stop: stop.clone(),
        previews: config.engine.training_previews,
    };
    for _ in 0..config.engine.training_slots {
        tracker.spawn(worker.clone().work());
    }
    // The last handle of the engine has to be the one that is waited for.
    drop(worker);
    tracker.close();
    tracing::info!(model = engine.info().id, "ready");
    stop.cancelled().await;
    tracing::info!("stopping");
    state.drain();
    closing.cancel();
    if tokio::time::timeout(GRACE, http).await.is_err() {
        tracing::warn!("some requests did not finish in time");
    }
    if tokio::time::timeout(GRACE, state.finish()).await.is_err() {
        tracing::warn!("some requests whose callers are gone did not finish in time");
    }
    if !engine.drain(GRACE).await {
        tracing::error!("the device does not answer; trainings go on from their last checkpoint");
    }
    if tokio::time::timeout(GRACE, tracker.wait()).await.is_err() {
        tracing::error!("background work does not end; its leases run out by themselves");
    }
    // Waits for the device thread, which must not hold up the runtime's own.
    tokio::task::spawn_blocking(move || drop(engine)).await?;
    drop(lock);
    Ok(())
}
