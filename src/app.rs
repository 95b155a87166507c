//! Connects the modules, starts and stops them in order.

mod notify;
mod parts;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, AppState, router};
use crate::cluster::{Executor, Fleet, Streams};
use crate::config::{Config, Role};
use crate::jobs::Wakes;
use crate::registry::{Backend, Registry};
use crate::service::{Keys, Limits, Links, Service, Shares, Tallies};
use coar_core::engine::EngineHandle;
use parts::{Device, Opened};

pub use crate::api::Listener;

/// Running generations get this long to finish when the server stops.
const GRACE: Duration = Duration::from_secs(20);
/// Trainings get this long to store a last checkpoint: one slice, and the upload to the store.
const HAND_BACK: Duration = Duration::from_secs(10);

/// Serves until `stop`. The listener responds at once; generations are served when `load` has returned the engine, or
/// when there are workers.
///
/// On `stop`, in order: new requests are refused, trainings store a last checkpoint and release their leases, running
/// requests finish, the engine ends.
///
/// # Errors
/// When the data folder is in use or unusable, the database cannot be reached, the model cannot be loaded, or the
/// listener fails.
pub async fn serve(
    config: Config,
    listener: Listener,
    load: impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let opened = parts::open(&config).await?;
    match config.role {
        Role::Worker => match listener {
            Listener::Tcp(listener) => worker::serve(config, opened, listener, load, stop).await,
            Listener::Unix(..) => anyhow::bail!("a worker cannot listen on a Unix socket"),
        },
        Role::All | Role::Api => serve_api(config, opened, listener, load, stop).await,
    }
}

/// How often an API process checks whether there is a key.
const LOOK: Duration = Duration::from_secs(2);

/// Without keys only loopback is served. An API process waits for the first key; until then only health routes respond.
async fn check_keys(registry: &Registry, role: Role, (address, local): (&str, bool)) -> anyhow::Result<()> {
    let mut logged = false;
    while role == Role::Api && !local && !registry.keys_required().await? {
        if !std::mem::replace(&mut logged, true) {
            tracing::warn!("waiting for the first key: `coar keys create --tenant NAME` with this --database");
        }
        tokio::time::sleep(LOOK).await;
    }
    if registry.keys_required().await? {
        tracing::info!("callers need a key");
        return Ok(());
    }
    anyhow::ensure!(
        local,
        "no API keys are configured, so anyone who can reach {address} would have full access: create one with \
         `coar keys create --tenant NAME` and this server's --data or --database, or listen on 127.0.0.1"
    );
    tracing::warn!("no API keys configured: unauthenticated access as tenant `default` on {address}");
    Ok(())
}

async fn serve_api(
    config: Arc<Config>,
    opened: Opened,
    listener: Listener,
    load: impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Opened { registry, lock } = opened;
    let keys = Keys::new(registry.clone());
    let (address, local) = (listener.url()?, listener.is_local()?);
    // Other machines can reach it: a key is required even if the database has none.
    if !local {
        keys.require();
    }
    if config.role == Role::All {
        check_keys(&registry, config.role, (&address, local)).await?;
    }
    // Tests and scripts that ask for port 0 read the address from this line.
    println!("listening on {address}");
    // Webhooks contain URLs of images that begin with it: there is no request whose Host header could be used.
    let own_address = match &config.public_url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None if address.starts_with("unix:") => String::new(),
        None => address.clone(),
    };
    let state = AppState::new(config.clone(), keys.clone(), listener.address()?);
    let (tracker, closing) = (TaskTracker::new(), CancellationToken::new());
    let http = {
        let (router, closing) = (router(state.clone()), closing.clone());
        let limits = config.limits;
        tokio::spawn(async move { api::listen(listener, router, &limits, closing).await })
    };
    let (secrets, streams) = (parts::secrets(&registry).await?, Streams::default());
    let (executor, engine) = match config.role {
        Role::Api => {
            let found = async {
                check_keys(&registry, config.role, (&address, local)).await?;
                Fleet::find(registry.clone(), secrets.clone(), streams.clone()).await
            };
            let fleet = tokio::select! {
                fleet = found => fleet?,
                () = stop.cancelled() => {
                    closing.cancel();
                    return Ok(());
                }
            };
            tracker.spawn(fleet.clone().follow(stop.clone()));
            (Executor::Remote(fleet), None)
        }
        _ => {
            let engine = tokio::task::spawn_blocking(load).await??;
            (
                Executor::local(engine.clone(), &registry, config.engine.concept_memory << 20),
                Some(engine),
            )
        }
    };
    let wakes = Wakes::shared(&registry, &stop, &tracker);
    let links = Arc::new(Links::new(secrets.clone(), config.keep_images()));
    let webhooks = parts::webhooks(&config, &registry, &links, &own_address);
    let drawings = parts::drawings(&config, &registry, &executor, &webhooks, &wakes);
    if registry.backend() == Backend::Sqlite {
        drawings.recover().await?;
    }
    let shares = Arc::new(Shares::of(&config)?);
    let decoders = shares.decoders.clone();
    let service = Service {
        keys,
        registry: registry.clone(),
        executor: executor.clone(),
        wake: wakes.trainings.clone(),
        limits: Limits::of(&config).into(),
        tallies: Tallies::new(tracker.clone()),
        shares,
        drawings: drawings.clone(),
        links,
    };
    let member = parts::member(&config, None, engine.as_ref());
    let ended = CancellationToken::new();
    parts::announce(&registry, &member, &ended, &tracker).await?;
    if registry.backend() == Backend::Sqlite {
        service.readmit_queued().await?;
    }
    state.ready(service);
    parts::upkeep(&config, &registry, &secrets, (&tracker, &stop));
    tracker.spawn(crate::jobs::deliver(webhooks, wakes.trainings.clone(), stop.clone()));
    parts::draw(drawings, engine.is_some(), &tracker, &stop);
    if let Some(engine) = &engine {
        parts::train(&config, &registry, engine, (&wakes, decoders), (&tracker, &stop));
    }
    tracker.spawn(notify::watchdog(engine.clone(), ended.clone()));
    tracker.close();
    tracing::info!(model = executor.info().id, role = config.role.as_str(), "ready");
    notify::notify(notify::READY);
    drop(executor);
    stop.cancelled().await;
    tracing::info!("stopping");
    notify::notify(notify::STOPPING);
    state.drain();
    member.draining.store(true, Ordering::Relaxed);
    closing.cancel();
    if let Some(engine) = &engine
        && tokio::time::timeout(HAND_BACK, engine.end_trainings()).await.is_err()
    {
        tracing::error!("the device does not respond; trainings resume from their last checkpoint");
    }
    if tokio::time::timeout(GRACE, http).await.is_err() {
        tracing::warn!("some requests did not finish in time");
    }
    if tokio::time::timeout(GRACE, state.finish()).await.is_err() {
        tracing::warn!("some requests whose callers are gone did not finish in time");
    }
    let device = Device {
        engine,
        member,
        ended,
        streams,
    };
    device.end(&registry, &tracker).await?;
    drop(lock);
    Ok(())
}

/// Cancels `stop` when the process receives a signal to end.
pub async fn signalled(stop: CancellationToken) {
    let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(signal) => signal,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM cannot be handled; it will end the server at once");
            return;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    stop.cancel();
}
