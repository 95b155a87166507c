//! Decodes untrusted images: in memory that all tenants share, on threads with a low priority.

use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinError;

use crate::pool::{Full, Pool, Share};
use crate::priority::Priority;
use coar_core::ids::TenantId;

/// Memory and threads for decoding uploads and reference images.
#[derive(Debug)]
pub struct Decoders {
    memory: Pool,
    handle: Handle,
    /// Only its threads for blocking work are used. `None` while it is dropped.
    runtime: Option<Runtime>,
}

impl Decoders {
    /// Decoders of a process that may take `memory` bytes, half of it for one tenant.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(memory: u64) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let runtime = Builder::new_current_thread()
            .max_blocking_threads(cores)
            .thread_name("coar-decoder")
            .on_thread_start(|| Priority::Decoding.apply())
            .build()?;
        Ok(Self {
            memory: Pool::bytes(memory, memory / 2),
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }

    /// Takes memory for a tenant's image, waiting for at most `within`: [`Pool::take`].
    ///
    /// # Errors
    /// [`Full`]
    pub async fn memory(&self, tenant: TenantId, bytes: u64, within: Duration) -> Result<Share, Full> {
        self.memory.take(tenant, bytes, within).await
    }

    /// Runs blocking work on a decoding thread. It continues if the returned future is dropped.
    ///
    /// # Errors
    /// When the work panics.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        self.handle.spawn_blocking(work).await
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which an asynchronous task must not do.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_only_its_own_work() {
        let decoders = Decoders::new(1 << 20).unwrap();
        assert!(
            decoders
                .run(|| panic!("a decoder's fault"))
                .await
                .unwrap_err()
                .is_panic()
        );
        assert_eq!(decoders.run(|| 7).await.unwrap(), 7);
    }
}
