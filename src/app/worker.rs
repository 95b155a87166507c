//! The worker role: a device without an API. It runs generations for API processes, and generations and trainings from
//! the queue.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::parts::{self, Device, Opened};
use super::{GRACE, HAND_BACK, notify};
use crate::cluster::{Executor, Local, Streams, WorkerState, worker_router};
use crate::config::Config;
use crate::jobs::Wakes;
use crate::service::{Links, Shares};
use coar_core::engine::EngineHandle;

/// The address at which other processes reach this machine, without `--advertise`.
fn own_address(listens: SocketAddr) -> String {
    if !listens.ip().is_unspecified() {
        return format!("http://{listens}");
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = match name.trim() {
        "" => "127.0.0.1",
        name => name,
    };
    format!("http://{name}:{}", listens.port())
}

pub(super) async fn serve(
    config: Arc<Config>,
    opened: Opened,
    listener: TcpListener,
    load: impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Opened { registry, lock } = opened;
    let listens = listener.local_addr()?;
    let address = config.advertise.clone().unwrap_or_else(|| own_address(listens));
    // Tests and scripts that ask for port 0 read the address from this line.
    println!("worker listening on http://{listens}");
    let (secrets, streams) = (parts::secrets(&registry).await?, Streams::default());
    let state = WorkerState::new(secrets.clone(), config.metrics_open.is_on(), streams.clone());
    let (tracker, closing) = (TaskTracker::new(), CancellationToken::new());
    let http = {
        let router = worker_router(state.clone()).into_make_service_with_connect_info::<SocketAddr>();
        let closing = closing.clone();
        tokio::spawn(async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(closing.cancelled_owned())
                .await
        })
    };
    let engine = tokio::task::spawn_blocking(load).await??;
    let local = Local::new(engine.clone(), &registry, config.engine.concept_memory << 20);
    let executor = Executor::Local(local.clone());
    let wakes = Wakes::shared(&registry, &stop, &tracker);
    let links = Arc::new(Links::new(secrets.clone(), config.keep_images()));
    // Webhooks of this worker's generations contain the API's URL, which only the operator knows.
    let public = config.public_url.as_deref().unwrap_or("").trim_end_matches('/');
    if public.is_empty() {
        tracing::warn!("without --public-url webhooks name images by their paths alone");
    }
    let webhooks = parts::webhooks(&config, &registry, &links, public);
    let drawings = parts::drawings(&config, &registry, &executor, &webhooks, &wakes);
    let member = parts::member(&config, Some(address.clone()), Some(&engine));
    state.ready(local, &member);
    let ended = CancellationToken::new();
    parts::announce(&registry, &member, &ended, &tracker).await?;
    parts::upkeep(&config, &registry, &secrets, (&tracker, &stop));
    tracker.spawn(crate::jobs::deliver(webhooks, wakes.trainings.clone(), stop.clone()));
    parts::draw(drawings, true, &tracker, &stop);
    let decoders = Shares::decoders_of(&config)?;
    parts::train(&config, &registry, &engine, (&wakes, decoders), (&tracker, &stop));
    tracker.spawn(notify::watchdog(Some(engine.clone()), ended.clone()));
    tracker.close();
    tracing::info!(model = engine.info().id, address, "ready");
    notify::notify(notify::READY);
    stop.cancelled().await;
    tracing::info!("stopping");
    notify::notify(notify::STOPPING);
    member.draining.store(true, Ordering::Relaxed);
    if let Err(error) = member.announce(&registry).await {
        tracing::warn!(%error, "the draining state cannot be announced");
    }
    if tokio::time::timeout(HAND_BACK, engine.end_trainings()).await.is_err() {
        tracing::error!("the device does not respond; trainings resume from their last checkpoint");
    }
    closing.cancel();
    if tokio::time::timeout(GRACE, http).await.is_err() {
        tracing::warn!("some images were not finished in time; other workers draw them");
    }
    // The router holds a handle of the engine.
    drop(state);
    let device = Device {
        engine: Some(engine),
        member,
        ended,
        streams,
    };
    device.end(&registry, &tracker).await?;
    drop(lock);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_reached_where_it_listens() {
        assert_eq!(own_address("10.0.0.7:9".parse().unwrap()), "http://10.0.0.7:9");
        let anywhere = own_address("0.0.0.0:9".parse().unwrap());
        assert!(anywhere.starts_with("http://") && anywhere.ends_with(":9") && !anywhere.contains("0.0.0.0"));
    }
}
