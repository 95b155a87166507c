//! What all tenants share in one process, and how much of it each may hold at once: memory, disk, turns.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Caller, Service};
use crate::config::Config;
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::TenantId;

/// Requests of a tenant that are checked at the same time.
const PREPARATIONS: u64 = 4;
/// When a stream that was refused may come again.
const NEXT_STREAM: Duration = Duration::from_secs(5);

/// Why there was no share in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The tenant holds all that it may.
    Tenant,
    /// All tenants together hold everything.
    Process,
}

/// Units of something, bounded for the process and for each tenant. Requests for it are served in their order.
#[derive(Debug)]
pub struct Pool {
    all: Arc<Semaphore>,
    tenants: Mutex<HashMap<TenantId, Arc<Semaphore>>>,
    total: u64,
    each: u64,
    /// So many bytes are one permit: a semaphore counts in 32 bits.
    unit: u64,
}

/// Held until dropped.
#[derive(Debug)]
pub struct Share {
    _tenant: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Pool {
    /// Single places.
    pub fn places(total: u64, each: u64) -> Self {
        Self::new(total, each, 1)
    }

    /// Bytes, in pages.
    pub fn bytes(total: u64, each: u64) -> Self {
        Self::new(total, each, 4096)
    }

    fn new(total: u64, each: u64, unit: u64) -> Self {
        let (total, each) = ((total / unit).max(1), (each / unit).max(1));
        let total = total.min(u64::from(u32::MAX)).min(Semaphore::MAX_PERMITS as u64);
        Self {
            all: Arc::new(Semaphore::new(total as usize)),
            tenants: Mutex::default(),
            total,
            each: each.min(total),
            unit,
        }
    }

    /// Takes so much of it, waiting for at most `within`. More than a tenant may hold counts as all that it may hold, and
    /// more than there is as all there is: whatever is allowed at all is allowed alone.
    ///
    /// # Errors
    /// [`Full`]
    pub async fn take(&self, tenant: TenantId, amount: u64, within: Duration) -> Result<Share, Full> {
        let amount = amount.div_ceil(self.unit);
        let permits = |most: u64| u32::try_from(amount.clamp(1, most)).unwrap_or(u32::MAX);
        let until = tokio::time::Instant::now() + within;
        let own = self.of(tenant).acquire_many_owned(permits(self.each));
        // Neither semaphore is ever closed.
        let Ok(Ok(own)) = tokio::time::timeout_at(until, own).await else {
            return Err(Full::Tenant);
        };
        let all = self.all.clone().acquire_many_owned(permits(self.total));
        let Ok(Ok(all)) = tokio::time::timeout_at(until, all).await else {
            return Err(Full::Process);
        };
        Ok(Share {
            _tenant: own,
            _all: all,
        })
    }

    /// The tenant's part; parts that are not in use are forgotten.
    fn of(&self, tenant: TenantId) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let each = self.each as usize;
        // A permit and a request for one both keep their semaphore.
        tenants.retain(|_, part| Arc::strong_count(part) > 1);
        tenants
            .entry(tenant)
            .or_insert_with(|| Arc::new(Semaphore::new(each)))
            .clone()
    }
}

/// Everything of one process that tenants share.
#[derive(Debug)]
pub struct Shares {
    /// Requests for images that are checked.
    pub preparations: Pool,
    /// Images that are decoded: one at a time of each tenant.
    pub decodings: Pool,
    /// Bytes in memory of what is uploaded and decoded.
    pub memory: Pool,
    /// Bytes on disk of forms.
    pub space: Pool,
    /// Event streams, and requests that wait for a generation's end.
    pub streams: Pool,
    folder: PathBuf,
}

impl Shares {
    /// As the operator decided. The folder for what is uploaded is made.
    ///
    /// # Errors
    /// When it cannot be made.
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
            mebibytes(limits.upload_memory),
            mebibytes(limits.upload_space),
            u64::from(limits.tenant_streams),
            folder,
        ))
    }

    fn new(memory: u64, space: u64, streams: u64, folder: PathBuf) -> Self {
        Self {
            preparations: Pool::places(u64::MAX, PREPARATIONS),
            decodings: Pool::places(u64::MAX, 1),
            memory: Pool::bytes(memory, memory / 2),
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

impl Default for Shares {
    fn default() -> Self {
        Self::new(256 << 20, 1 << 30, 64, std::env::temp_dir())
    }
}

impl Service {
    /// A place for an event stream or for a wait, held as long as that goes on.
    ///
    /// # Errors
    /// `too_many_streams`
    pub async fn stream_place(&self, caller: &Caller) -> Result<Share, Error> {
        let place = self.shares.streams.take(caller.tenant, 1, Duration::ZERO).await;
        place.map_err(|_| {
            let limit = self.shares.streams.each;
            let message = format!("{limit} event streams and waiting requests of yours are open, the limit.");
            Error::new(ErrorKind::Overloaded, "too_many_streams", message)
                .limit(limit)
                .retry_after(NEXT_STREAM)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: TenantId = TenantId::DEFAULT;
    const NOW: Duration = Duration::ZERO;

    #[tokio::test]
    async fn a_tenant_holds_no_more_than_its_part_and_all_no_more_than_there_is() {
        let pool = Pool::places(3, 2);
        let (two, three) = (TenantId::new(), TenantId::new());
        let first = pool.take(ONE, 1, NOW).await.unwrap();
        let _second = pool.take(ONE, 1, NOW).await.unwrap();
        assert_eq!(pool.take(ONE, 1, NOW).await.unwrap_err(), Full::Tenant);
        let _third = pool.take(two, 1, NOW).await.unwrap();
        assert_eq!(pool.take(three, 1, NOW).await.unwrap_err(), Full::Process);
        drop(first);
        pool.take(three, 1, NOW).await.unwrap();
        // More than a tenant may hold is all that it may hold.
        let (large, four) = (Pool::bytes(100 << 20, 50 << 20), TenantId::new());
        let _whole = large.take(four, 1 << 40, NOW).await.unwrap();
        assert_eq!(large.take(four, 1, NOW).await.unwrap_err(), Full::Tenant);
    }

    #[tokio::test]
    async fn a_share_is_waited_for() {
        let pool = Arc::new(Pool::places(1, 1));
        let held = pool.take(ONE, 1, NOW).await.unwrap();
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.take(ONE, 1, Duration::from_secs(60)).await.is_ok() }
        });
        tokio::task::yield_now().await;
        drop(held);
        assert!(waiting.await.unwrap());
        // What is not held is forgotten.
        let _other = pool.take(TenantId::new(), 1, NOW).await.unwrap();
        assert_eq!(pool.tenants.lock().unwrap().len(), 1);
    }
}
