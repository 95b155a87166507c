//! A data folder used without a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::model::ModelArgs;
use crate::engine::EngineOptions;
use crate::jobs::{AddressPolicy, Drawings, Wake, Webhooks, Worker};
use crate::registry::{DataLock, Registry};
use crate::service::{Keys, Limits, Links, Service, Tallies};

/// Where concepts are kept.
#[derive(Debug, Clone, Args)]
pub(super) struct DataArgs {
    /// Folder of the database, pictures and concepts; the same that `coar serve` uses.
    #[arg(long, env = "COAR_DATA", default_value = "data", value_name = "DIR")]
    pub data: PathBuf,
}

/// Runs async work on a runtime of its own.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// Opens a folder that must be there already.
pub(super) async fn existing_registry(dir: &Path) -> anyhow::Result<Registry> {
    anyhow::ensure!(
        dir.join("coar.sqlite").exists(),
        "there are no concepts in {}: train one with `coar train`, or name another folder with --data",
        dir.display()
    );
    Ok(Registry::open(dir).await?)
}

/// How long addresses of pictures last, of which the command line makes none.
const KEEP: Duration = Duration::from_secs(3600);

/// The service of a data folder in this process, without HTTP.
pub(super) async fn service(data: &DataArgs, model: &ModelArgs) -> anyhow::Result<Service> {
    let registry = Registry::open(&data.data).await?;
    let model = model.clone();
    let engine = tokio::task::spawn_blocking(move || model.start_engine(EngineOptions::default())).await??;
    let links = Arc::new(Links::new(&registry.server_secret().await?, KEEP));
    // Nothing is kept and nobody told where there is no server.
    let webhooks = Webhooks::new(
        registry.clone(),
        crate::api::describe(links.clone(), ""),
        AddressPolicy { allow_private: false },
    );
    Ok(Service {
        drawings: Drawings::new(registry.clone(), engine.clone(), webhooks, 1, true),
        links,
        keys: Keys::new(registry.clone()),
        registry,
        engine,
        wake: Wake::default(),
        limits: Limits::default().into(),
        tallies: Tallies::default(),
    })
}

/// A service with a worker that trains what is queued, while this is held.
pub(super) struct Workshop {
    pub service: Service,
    stop: CancellationToken,
    worker: tokio::task::JoinHandle<()>,
    _lock: DataLock,
}

impl Workshop {
    pub(super) async fn open(data: &DataArgs, model: &ModelArgs) -> anyhow::Result<Self> {
        let lock = DataLock::take(&data.data).map_err(|error| {
            anyhow::anyhow!("{error}; register the concept with that server, or use another --data")
        })?;
        let service = service(data, model).await?;
        service.registry.release_all().await?;
        let stop = CancellationToken::new();
        let worker = Worker {
            registry: service.registry.clone(),
            engine: service.engine.clone(),
            wake: service.wake.clone(),
            stop: stop.clone(),
            previews: 0,
        };
        let worker = tokio::spawn(worker.work());
        Ok(Self {
            service,
            stop,
            worker,
            _lock: lock,
        })
    }

    /// Ends the worker; a running training keeps its last checkpoint.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.service.engine.drain(std::time::Duration::from_secs(20)).await;
        Ok(self.worker.await?)
    }
}
