//! What all tenants share in one process, and how much of it each may hold at once: memory, disk, turns.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Caller, Service};
use crate::config::Config;
use crate::decoders::Decoders;
pub use crate::pool::{Full, Pool, Share};
use coar_core::error::{Error, ErrorKind};

/// Requests of a tenant that are checked at the same time.
const PREPARATIONS: u64 = 4;
/// When a stream that was refused may come again.
const NEXT_STREAM: Duration = Duration::from_secs(5);

/// Everything of one process that tenants share.
#[derive(Debug)]
pub struct Shares {
    /// Requests for images that are checked.
    pub preparations: Pool,
    /// Images that are decoded: one at a time of each tenant.
    pub decodings: Pool,
    /// Memory for what is uploaded and decoded, also by trainings, and threads to decode it.
    pub decoders: Arc<Decoders>,
    /// Bytes on disk of forms.
    pub space: Pool,
    /// Event streams, and requests that wait for a generation's end.
    pub streams: Pool,
    folder: PathBuf,
}

impl Shares {
    /// The decoders of a process that receives no uploads, for its trainings.
    ///
    /// # Errors
    /// When their threads cannot be started.
    pub fn decoders_of(config: &Config) -> std::io::Result<Arc<Decoders>> {
        Ok(Arc::new(Decoders::new(u64::from(config.limits.upload_memory) << 20)?))
    }

    /// Those of a command that works without a server.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn local() -> std::io::Result<Self> {
        let decoders = Arc::new(Decoders::new(256 << 20)?);
        Ok(Self::new(decoders, 1 << 30, 64, std::env::temp_dir()))
    }

    /// As the operator decided. The folder for what is uploaded is made.
    ///
    /// # Errors
    /// When it cannot be made, or threads cannot be started.
    pub fn of(config: &Config) -> std::io::Result<Self> {
        // A process that keeps its files elsewhere may have no data folder that it can write to.
        let folder = match config.storage.database.is_some() && config.storage.blobs.is_some() {
            true => std::env::temp_dir(),
            false => config.storage.data.join("uploads"),
        };
        if !folder.exists() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        }
        let mebibytes = |number: u32| u64::from(number) << 20;
        let limits = &config.limits;
        Ok(Self::new(
            Self::decoders_of(config)?,
            mebibytes(limits.upload_space),
            u64::from(limits.tenant_streams),
            folder,
        ))
    }

    fn new(decoders: Arc<Decoders>, space: u64, streams: u64, folder: PathBuf) -> Self {
        Self {
            preparations: Pool::places(u64::MAX, PREPARATIONS),
            decodings: Pool::places(u64::MAX, 1),
            decoders,
            space: Pool::bytes(space, space / 2),
            streams: Pool::places(u64::MAX, streams),
            folder,
        }
    }

    /// Where uploads are received.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Service {
    /// A place for an event stream or for a wait, held until that ends.
    ///
    /// # Errors
    /// `too_many_streams`
    pub async fn stream_place(&self, caller: &Caller) -> Result<Share, Error> {
        let place = self.shares.streams.take(caller.tenant, 1, Duration::ZERO).await;
        place.map_err(|_| {
            let limit = self.shares.streams.each();
            let message = format!("{limit} event streams and waiting requests of yours are open, the limit.");
            Error::new(ErrorKind::Overloaded, "too_many_streams", message)
                .limit(limit)
                .retry_after(NEXT_STREAM)
        })
    }
}
