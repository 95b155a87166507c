//! Everything that must survive: a database for facts, a content-addressed store for bytes.
//!
//! No tensors and no engine in this room. Writing transactions begin IMMEDIATE: a reader that turns writer would not
//! wait for the busy timeout.

/// Bytes by their hash.
pub mod blobs;
mod concepts;
mod generations;
mod idempotency;
mod images;
mod keys;
mod tenants;
mod trainings;
mod versions;
mod webhooks;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

pub use blobs::{BlobError, Blobs};
pub use concepts::{Concept, ConceptChange, ConceptFilter, ConceptStatus, Metadata, NewConcept, input_fingerprint};
pub use generations::{
    GENERATION_ATTEMPTS, Generation, GenerationConcept, GenerationSettings, GenerationStatus, NewGeneration, TokenUsage,
};
pub use idempotency::{FirstOrAgain, KeyClaim, StoredAnswer};
pub use images::StoredImage;
pub use keys::{ApiKey, NewKey, Scope, Scopes};
pub use tenants::{Quotas, Tenant, Usage};
pub use trainings::{ATTEMPTS, Claimed, NewTraining, Progress, Training, TrainingFilter, TrainingStatus};
pub use versions::Version;
pub use webhooks::{Attempt, Delivery, NewDelivery};

/// Why the registry could not answer.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Another concept has the name.
    #[error("the name `{0}` is taken")]
    NameTaken(String),
    /// A training of the concept is queued or running.
    #[error("the concept `{0}` is in training")]
    ConceptBusy(String),
    /// The concept has no version with that number.
    #[error("there is no version {0}")]
    NoVersion(u32),
    /// Another tenant has the name.
    #[error("the tenant `{0}` exists already")]
    TenantTaken(String),
    /// The lease is no longer held: somebody else works on the training, or it was cancelled or deleted.
    #[error("the lease of the training is lost")]
    LeaseLost,
    #[error("the data folder {0} is in use by another server")]
    InUse(String),
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("database migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("blob store: {0}")]
    Blob(#[from] BlobError),
    #[error("a row of the database cannot be read: {0}")]
    Row(String),
    #[error("{0}: {1}")]
    File(String, std::io::Error),
}

/// Database and blob store of one data folder.
#[derive(Debug, Clone)]
pub struct Registry {
    pool: SqlitePool,
    pub blobs: Blobs,
}

/// How long a statement waits for another writer.
const BUSY: Duration = Duration::from_secs(20);

/// A part of a list, newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page<I> {
    /// At most this many rows.
    pub limit: u32,
    /// The last identifier of the part before.
    pub after: Option<I>,
}

/// Rows of a list, and whether more follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    pub rows: Vec<T>,
    pub has_more: bool,
}

impl<I: std::fmt::Display> Page<I> {
    /// Identifiers begin with their time, so that a list goes by them: `id < after`. Without one, from the newest;
    /// `~` is beyond every identifier.
    fn after(&self) -> String {
        self.after.as_ref().map_or_else(|| "~".to_owned(), ToString::to_string)
    }

    /// One row more than wanted: it tells whether there is more.
    fn fetched(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    fn cut<T>(&self, mut rows: Vec<T>) -> Listed<T> {
        let has_more = rows.len() > self.limit as usize;
        rows.truncate(self.limit as usize);
        Listed { rows, has_more }
    }
}

/// A typed identifier out of a row.
fn identifier<I: std::str::FromStr>(row: &sqlx::sqlite::SqliteRow, column: &str) -> Result<I, RegistryError> {
    let text: String = sqlx::Row::try_get(row, column)?;
    text.parse()
        .map_err(|_| RegistryError::Row(format!("{column} `{text}`")))
}

/// Milliseconds since 1970, UTC.
pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

impl Registry {
    /// Opens the data folder, creating what is missing, and brings its database to this version's schema.
    ///
    /// # Errors
    /// When the folder cannot be written or its database is of a newer version.
    pub async fn open(dir: &Path) -> Result<Self, RegistryError> {
        std::fs::create_dir_all(dir).map_err(|error| RegistryError::File(dir.display().to_string(), error))?;
        let options = SqliteConnectOptions::new()
            .filename(dir.join("coar.sqlite"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What was acknowledged survives a power cut too.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY);
        let pool = SqlitePoolOptions::new()
            .max_connections(8)
            .connect_with(options)
            .await?;
        sqlx::migrate!("migrations/sqlite").run(&pool).await?;
        let registry = Self {
            pool,
            blobs: Blobs::open(&dir.join("blobs"))?,
        };
        registry.complete_tenants().await?;
        Ok(registry)
    }

    /// A value that the database keeps; the first one stays.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn setting(&self, key: &str, first: &str) -> Result<String, RegistryError> {
        sqlx::query("INSERT INTO settings (key, value) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(key)
            .bind(first)
            .execute(&self.pool)
            .await?;
        let (value,) = sqlx::query_as("SELECT value FROM settings WHERE key = $1")
            .bind(key)
            .fetch_one(&self.pool)
            .await?;
        Ok(value)
    }

    /// 32 random bytes in hex that never leave the server: they sign the addresses of pictures.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn server_secret(&self) -> Result<String, RegistryError> {
        self.setting("server_secret", &hex::encode(rand::random::<[u8; 32]>()))
            .await
    }

    async fn write(&self) -> Result<sqlx::Transaction<'static, sqlx::Sqlite>, RegistryError> {
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Removes what a crash between storing bytes and writing their row has left. Only the holder of the data folder's
    /// lock may ask, before it serves anybody.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn collect_garbage(&self) -> Result<usize, RegistryError> {
        let rows: Vec<(Option<String>,)> = sqlx::query_as(
            "SELECT blob FROM concept_pictures UNION SELECT hash FROM concept_versions UNION SELECT checkpoint FROM trainings
             UNION SELECT blob FROM training_previews UNION SELECT blob FROM images",
        )
        .fetch_all(&self.pool)
        .await?;
        let wanted: std::collections::HashSet<String> = rows.into_iter().filter_map(|(blob,)| blob).collect();
        let mut removed = 0;
        for hash in self.blobs.all().await? {
            if !wanted.contains(&hash) {
                self.blobs.remove(&hash).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Removes blobs that no row refers to any more.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn remove_unreferenced(&self, hashes: &[String]) -> Result<(), RegistryError> {
        if hashes.is_empty() {
            return Ok(());
        }
        let _nobody_stores = self.blobs.removing().await;
        for hash in hashes {
            let (count,): (i64,) = sqlx::query_as(
                "SELECT EXISTS (SELECT 1 FROM concept_pictures WHERE blob = $1)
                 + EXISTS (SELECT 1 FROM concept_versions WHERE hash = $1)
                 + EXISTS (SELECT 1 FROM trainings WHERE checkpoint = $1)
                 + EXISTS (SELECT 1 FROM training_previews WHERE blob = $1)
                 + EXISTS (SELECT 1 FROM images WHERE blob = $1)",
            )
            .bind(hash)
            .fetch_one(&self.pool)
            .await?;
            if count == 0 {
                self.blobs.remove(hash).await?;
            }
        }
        Ok(())
    }
}

/// Marks a data folder as in use by this process, until dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct DataLock {
    _file: std::fs::File,
}

impl DataLock {
    /// # Errors
    /// When another server holds it.
    pub fn take(dir: &Path) -> Result<Self, RegistryError> {
        let fault = |error| RegistryError::File(dir.display().to_string(), error);
        std::fs::create_dir_all(dir).map_err(fault)?;
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
