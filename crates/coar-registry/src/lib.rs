//! Persistent state: a database for records, a content-addressed store for bytes.
//!
//! This module uses no tensors and no engine. The database is SQLite in one process's folder, or PostgreSQL for
//! several processes; every statement runs on both. On SQLite one connection writes and the others read;
//! transactions begin IMMEDIATE, since a command beside the server may write too. On PostgreSQL, transactions that
//! decide by what they read lock the rows that they read.
//!
//! Inside a transaction every read goes through that transaction: if it took a second connection from the pool,
//! concurrent callers could exhaust the pool and deadlock. No transaction is open during calls to the blob store.

/// The blob store: bytes by their hash.
pub mod blobs;
mod concepts;
mod db;
mod error;
mod filesystem;
mod generations;
mod holds;
mod idempotency;
mod images;
mod keys;
mod overview;
mod pool;
mod postgres;
mod processes;
mod secrets;
mod signals;
mod status;
mod storage;
mod tenants;
mod trainings;
mod versions;
mod waiting;
mod webhooks;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub use blobs::{BlobError, Blobs};
pub use concepts::{Concept, ConceptChange, ConceptFilter, ConceptStatus, Metadata, NewConcept, input_fingerprint};
pub use db::Backend;
use db::{Clock, Pools};
pub use error::{LEASE_LOST, RegistryError};
pub use filesystem::network_filesystem;
pub use generations::{
    GENERATION_ATTEMPTS, Generation, GenerationConcept, GenerationSettings, NewGeneration, TokenUsage,
};
pub use holds::Stored;
pub use idempotency::{Claim, KeyClaim, Made, StoredAnswer};
pub use images::StoredImage;
pub use keys::{ApiKey, Deletion, NewKey, Scope, Scopes};
pub use overview::{BlobUse, Job, JobId, QueueCount};
use pool::Transaction;
pub use processes::{Announcement, LOST_AFTER_MS, Process};
pub use secrets::{SECRETS_REFRESH, ServerSecrets, SharedSecrets};
pub use signals::Signals;
pub use status::{GenerationStatus, JobStatus, TrainingStatus};
pub use storage::Storage;
pub use tenants::{MinuteFull, Quotas, Tenant, Usage};
pub use trainings::{ATTEMPTS, Claimed, NewTraining, Progress, TAKEOVERS, Training, TrainingFilter};
pub use versions::Version;
pub use waiting::{Queue, QueueLimits};
pub use webhooks::{Attempt, DELIVERIES_AT_ONCE, Delivery, NewDelivery, Receiver};

/// Database and blob store.
#[derive(Debug, Clone)]
pub struct Registry {
    pools: std::sync::Arc<Pools>,
    backend: Backend,
    clock: Clock,
    presence: processes::Presence,
    process: coar_core::ids::ProcessId,
    queues: QueueLimits,
    /// PostgreSQL's URL.
    database: Option<std::sync::Arc<str>>,
    pub blobs: Blobs,
}

/// A page of a list, newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page<I> {
    /// Maximum number of rows.
    pub limit: u32,
    /// The last identifier of the previous page.
    pub after: Option<I>,
}

/// Rows of a page, and whether more follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    pub rows: Vec<T>,
    pub has_more: bool,
}

impl<I: std::fmt::Display> Page<I> {
    /// Identifiers begin with their time, so lists are paged by `id < after`. The first page starts at the newest;
    /// `~` sorts after every identifier.
    fn after(&self) -> String {
        self.after.as_ref().map_or_else(|| "~".to_owned(), ToString::to_string)
    }

    /// One more row than requested shows whether there is another page.
    fn fetched(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    fn cut<T>(&self, mut rows: Vec<T>) -> Listed<T> {
        let has_more = rows.len() > self.limit as usize;
        rows.truncate(self.limit as usize);
        Listed { rows, has_more }
    }
}

/// Milliseconds since 1970, UTC.
pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

impl Registry {
    /// Returns a value stored in the database; the first one stored is kept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn setting(&self, key: &str, first: &str) -> Result<String, RegistryError> {
        sqlx::query("INSERT INTO settings (key, value) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(key)
            .bind(first)
            .execute(&self.pools.writes)
            .await?;
        let (value,) = sqlx::query_as("SELECT value FROM settings WHERE key = $1")
            .bind(key)
            .fetch_one(&self.pools.reads)
            .await?;
        Ok(value)
    }

    async fn write(&self) -> Result<Transaction, RegistryError> {
        Ok(match self.backend {
            Backend::Sqlite => self.pools.writes.begin_with("BEGIN IMMEDIATE").await?,
            Backend::Postgres => self.pools.writes.begin().await?,
        })
    }
}

/// Creates a folder and its parents, accessible to the owner only. The permissions of existing folders are kept.
///
/// # Errors
/// When it cannot be created.
pub(crate) fn create_private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Locks a data folder for this process, until the lock is dropped or the process ends for any reason.
#[derive(Debug)]
pub struct DataLock {
    _file: std::fs::File,
}

impl DataLock {
    /// # Errors
    /// When another server holds it.
    pub fn take(dir: &Path) -> Result<Self, RegistryError> {
        let fault = |error| RegistryError::File(dir.display().to_string(), error);
        create_private_dir(dir).map_err(fault)?;
        let file = std::fs::File::create(dir.join("server.lock")).map_err(fault)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(std::fs::TryLockError::WouldBlock) => Err(RegistryError::InUse(dir.display().to_string())),
            Err(std::fs::TryLockError::Error(error)) => Err(fault(error)),
        }
    }
}

#[cfg(test)]
mod tests;
