//! A data folder used without a server.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::model::start_engine;
use crate::cluster::Executor;
use crate::config::ModelArgs;
use crate::jobs::{AddressPolicy, Drawings, Wake, Webhooks, Worker};
use crate::registry::{DataLock, Registry, SharedSecrets, Storage};
use crate::service::{Keys, Limits, Links, Service, Shares, Tallies};
use coar_core::engine::EngineHandle;

/// Where concepts are kept: the same that `coar serve` uses.
pub(super) type DataArgs = crate::config::StorageArgs;

/// The same for the registry.
pub(super) fn storage(data: &DataArgs) -> Storage {
    Storage {
        data: data.data.clone(),
        database: data.database.clone(),
        blobs: data.blobs.clone(),
    }
}

/// Runs async work on its own runtime.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// Opens a registry that must already exist.
pub(super) async fn existing_registry(data: &DataArgs) -> anyhow::Result<Registry> {
    anyhow::ensure!(
        data.database.is_some() || data.data.join("coar.sqlite").exists(),
        "there is no database in {}: name its folder with --data, or train a first concept with `coar train`",
        data.data.display()
    );
    Ok(Registry::connect(&storage(data)).await?)
}

/// Lifetime of image URLs, of which the command line creates none.
const KEEP: Duration = Duration::from_secs(3600);

/// Memory for concepts that one command uses, in bytes.
const CONCEPT_BYTES: usize = 64 << 20;

/// The service of a data folder in this process, without HTTP.
pub(super) async fn service(data: &DataArgs, model: &ModelArgs) -> anyhow::Result<(Service, EngineHandle)> {
    let registry = Registry::connect(&storage(data)).await?;
    let model = model.clone();
    let engine = tokio::task::spawn_blocking(move || start_engine(&model, None)).await??;
    let links = Arc::new(Links::new(SharedSecrets::new(registry.server_secrets().await?), KEEP));
    // Without a server nothing is stored and no webhook is sent.
    let webhooks = Webhooks::new(
        registry.clone(),
        crate::api::describe(links.clone(), ""),
        AddressPolicy { allow_private: false },
    );
    let executor = Executor::local(engine.clone(), &registry, CONCEPT_BYTES);
    let service = Service {
        drawings: Drawings::new(registry.clone(), executor.clone(), webhooks, 1, true),
        links,
        keys: Keys::new(registry.clone()),
        registry,
        executor,
        wake: Wake::default(),
        limits: Limits::default().into(),
        tallies: Tallies::default(),
        shares: Arc::new(Shares::local()?),
    };
    Ok((service, engine))
}

/// Makes all files of the process private to its user: database, images and concepts are personal data.
pub(super) fn keep_files_private() {
    // SAFETY: umask only sets the file mode creation mask of the process.
    unsafe { libc::umask(0o077) };
}

/// A service with a worker that runs queued trainings until this is dropped.
pub(super) struct Workshop {
    pub service: Service,
    engine: EngineHandle,
    stop: CancellationToken,
    worker: tokio::task::JoinHandle<()>,
    _lock: DataLock,
}

impl Workshop {
    pub(super) async fn open(data: &DataArgs, model: &ModelArgs) -> anyhow::Result<Self> {
        anyhow::ensure!(
            data.database.is_none(),
            "concepts of many processes are trained by their workers; register it with a server, or leave out --database"
        );
        let lock = DataLock::take(&data.data).map_err(|error| {
            anyhow::anyhow!("{error}; register the concept with that server, or use another --data")
        })?;
        let (service, engine) = service(data, model).await?;
        service.registry.release_all().await?;
        let stop = CancellationToken::new();
        let worker = Worker {
            registry: service.registry.clone(),
            engine: engine.clone(),
            wake: service.wake.clone(),
            stop: stop.clone(),
            previews: 0,
            decoders: service.shares.decoders.clone(),
        };
        let worker = tokio::spawn(worker.work());
        Ok(Self {
            service,
            engine,
            stop,
            worker,
            _lock: lock,
        })
    }

    /// Ends the worker; a running training keeps its last checkpoint.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.stop.cancel();
        // A device that does not respond is abandoned.
        let _ = tokio::time::timeout(Duration::from_secs(20), self.engine.drain()).await;
        Ok(self.worker.await?)
    }
}
