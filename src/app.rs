//! Wires the rooms together, starts and stops them in order.

use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{AppState, router};
use crate::engine::EngineHandle;
use crate::jobs::{Wake, work};
use crate::registry::{DataLock, Registry};
use crate::service::{Limits, Service};

/// Running generations get this long to finish when the server stops.
const GRACE: Duration = Duration::from_secs(20);

/// How often expired pictures are looked for.
const EXPIRY_CHECK: Duration = Duration::from_secs(600);

/// Removes generated pictures that are older than `age`, now and then.
async fn expire_images(registry: Registry, age: Duration, stop: CancellationToken) {
    loop {
        match registry.expire_images(age).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(pictures = count, "removed expired pictures"),
            Err(error) => tracing::warn!(%error, "expired pictures could not be removed"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EXPIRY_CHECK) => {}
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
    data: PathBuf,
    keep_images: Duration,
    listener: TcpListener,
    load: impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let lock = DataLock::take(&data)?;
    let registry = Registry::open(&data).await?;
    let released = registry.release_all().await?;
    if released > 0 {
        tracing::info!(
            trainings = released,
            "a previous server left trainings behind; they go on from their checkpoints"
        );
    }
    let orphans = registry.collect_garbage().await?;
    if orphans > 0 {
        tracing::info!(blobs = orphans, "removed what an interrupted registration left");
    }
    let state = AppState::default();
    let tracker = TaskTracker::new();
    let closing = CancellationToken::new();
    let http = {
        let (router, closing) = (router(state.clone()), closing.clone());
        tokio::spawn(async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(closing.cancelled_owned())
                .await
        })
    };
    let engine = tokio::task::spawn_blocking(load).await??;
    let wake = Wake::default();
    let service = Service {
        registry: registry.clone(),
        engine: engine.clone(),
        wake: wake.clone(),
        limits: Limits::default().into(),
    };
    state.ready(service);
    tracker.spawn(expire_images(registry.clone(), keep_images, stop.clone()));
    tracker.spawn(work(registry, engine.clone(), wake, stop.clone()));
    tracker.close();
    tracing::info!(model = engine.info().id, "ready");
    stop.cancelled().await;
    tracing::info!("stopping");
    state.drain();
    closing.cancel();
    if tokio::time::timeout(GRACE, http).await.is_err() {
        tracing::warn!("some requests did not finish in time");
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
