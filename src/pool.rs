//! Memory, disk space and connections that all tenants of a process share, with a limit for each tenant.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use coar_core::ids::TenantId;

/// Why no share could be taken in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The tenant's limit is reached.
    Tenant,
    /// The process's limit is reached.
    Process,
}

/// An amount of a resource, limited for the process and for each tenant. Requests are served in order.
#[derive(Debug)]
pub struct Pool {
    all: Arc<Semaphore>,
    tenants: Mutex<HashMap<TenantId, Arc<Semaphore>>>,
    total: u64,
    each: u64,
    /// Bytes per permit: a semaphore counts in 32 bits.
    unit: u64,
}

/// A part of a [`Pool`], held until dropped.
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

    /// The limit of a tenant; of bytes, in pages of 4096.
    pub fn each(&self) -> u64 {
        self.each
    }

    /// Takes `amount`, waiting for at most `within`. An amount above the tenant's or the process's limit is reduced to that
    /// limit: such a request succeeds when nothing else is held.
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

    /// The tenant's semaphore. Those that are not in use are removed.
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
