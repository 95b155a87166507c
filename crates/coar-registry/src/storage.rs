//! Location of a registry, and how one is opened.

use std::path::{Path, PathBuf};

use super::db::{self, Backend, Clock, lock_number};
use super::pool::Transaction;
use super::{Blobs, Registry, RegistryError};
use coar_core::ids::ProcessId;

/// This program's schema: the number of the last migration.
const SCHEMA: i64 = 8;

/// Where persistent state is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Folder for everything that has no address below.
    pub data: PathBuf,
    /// `postgres://…`; `None`: SQLite in the folder.
    pub database: Option<String>,
    /// `s3://bucket/prefix`; `None`: files in the folder.
    pub blobs: Option<String>,
}

impl Storage {
    /// Everything in one folder.
    pub fn folder(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            database: None,
            blobs: None,
        }
    }

    /// Whether several processes may use it at once.
    pub fn is_shared(&self) -> bool {
        self.database.is_some()
    }
}

impl Registry {
    /// Opens a data folder, creating what is missing, and migrates its database to this version's schema.
    ///
    /// # Errors
    /// When the folder cannot be written or its database is of a newer version.
    pub async fn open(dir: &Path) -> Result<Self, RegistryError> {
        Self::connect(&Storage::folder(dir)).await
    }

    /// Opens database and blob store, creating what is missing, and migrates the database to this version's schema.
    ///
    /// # Errors
    /// When one cannot be reached or written, or the database is of a version that this program cannot use.
    pub async fn connect(storage: &Storage) -> Result<Self, RegistryError> {
        Self::connect_with(storage, db::CONNECTIONS).await
    }

    /// Like [`Self::connect`], with a given number of PostgreSQL connections.
    pub(super) async fn connect_with(storage: &Storage, connections: u32) -> Result<Self, RegistryError> {
        let file = |error| RegistryError::File(storage.data.display().to_string(), error);
        let (backend, pools) = match &storage.database {
            None => {
                super::create_private_dir(&storage.data).map_err(file)?;
                let database = storage.data.join("coar.sqlite");
                let pools = db::open_sqlite(&database, &sqlx::migrate!("../../migrations/sqlite")).await?;
                (Backend::Sqlite, pools)
            }
            Some(url) => {
                let mut migrations = sqlx::migrate!("../../migrations/postgres");
                // The previous version continues to run beside the next one: see `check_schema`.
                migrations.set_ignore_missing(true);
                let pools = db::open_postgres(url, &migrations, connections).await?;
                (Backend::Postgres, pools)
            }
        };
        let blobs = match &storage.blobs {
            None => Blobs::open(&storage.data.join("blobs"))?,
            Some(url) => Blobs::connect(url)?,
        };
        let registry = Self {
            pools: pools.into(),
            backend,
            clock: Clock::default(),
            presence: super::processes::Presence::default(),
            process: ProcessId::new(),
            queues: super::QueueLimits::default(),
            database: storage.database.as_deref().map(Into::into),
            blobs,
        };
        registry.check_schema().await?;
        registry.complete_tenants().await?;
        Ok(registry)
    }

    /// The database in use.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The identifier of this process among those that share the database.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    async fn check_schema(&self) -> Result<(), RegistryError> {
        let required = self.setting("schema_requires", "3").await?;
        match required.parse::<i64>() {
            Ok(required) if required <= SCHEMA => Ok(()),
            _ => Err(RegistryError::Newer(required)),
        }
    }

    /// Takes an exclusive lock on a name until the transaction ends.
    pub(super) async fn hold_name(
        &self,
        transaction: &mut Transaction,
        kind: &str,
        name: &str,
    ) -> Result<(), RegistryError> {
        if self.backend == Backend::Postgres {
            sqlx::query("SELECT pg_advisory_xact_lock($1)")
                .bind(lock_number(kind, name))
                .execute(&mut **transaction)
                .await?;
        }
        Ok(())
    }

    /// The lease clock, in milliseconds since 1970: all processes agree on it, and setting a machine's clock does
    /// not affect it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn lease_time(&self) -> Result<i64, RegistryError> {
        self.clock.now(self.backend, &self.pools.reads).await
    }
}
