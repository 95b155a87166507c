//! `coar serve`

use std::sync::mpsc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::local::keep_files_private;
use super::model::start_engine;
use crate::config::{Config, Role};
use crate::priority::Priority;
use coar_core::engine::EngineHandle;

/// Serve the HTTP API.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    config: Config,
}

impl ServeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        keep_files_private();
        let config = self.config;
        anyhow::ensure!(
            cfg!(feature = "device") || config.role == Role::Api,
            "this build of coar has no device: start it with --role api, or build it with the feature `device`"
        );
        config.validate()?;
        // What differs from the defaults; `coar config show` prints everything.
        for line in config.changed() {
            tracing::info!(target: "coar::config", "{line}");
        }
        let load = loader(&config);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .on_thread_start(|| Priority::Api.apply())
            .build()?;
        runtime.block_on(async move {
            let (address, flag) = match config.role {
                Role::Worker => (config.worker_listen.into(), "--worker-listen"),
                Role::All | Role::Api => (config.listen.clone(), "--listen"),
            };
            let listener = crate::app::Listener::bind(&address).await.map_err(|error| {
                anyhow::anyhow!("cannot listen on {address}: {error}; choose another address with {flag} (`make serve LISTEN=HOST:PORT`)")
            })?;
            let stop = CancellationToken::new();
            tokio::spawn(crate::app::signalled(stop.clone()));
            crate::app::serve(config, listener, load, stop).await
        })
    }
}

/// Starts the engine when it is called, on a thread of its own: the device's threads inherit the priority of the thread
/// that starts them, which must not be that of the API's.
fn loader(config: &Config) -> impl FnOnce() -> anyhow::Result<EngineHandle> + Send + 'static {
    let (model, engine) = (config.model.clone(), config.engine.clone());
    let (start, started) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || match started.recv() {
        Ok(()) => start_engine(&model, Some(&engine)).map(Some),
        // The server ends before it needs an engine, or needs none.
        Err(_) => Ok(None),
    });
    move || {
        start.send(())?;
        let engine = thread
            .join()
            .map_err(|_| anyhow::anyhow!("loading the model panicked"))??;
        engine.ok_or_else(|| anyhow::anyhow!("no engine was started"))
    }
}
