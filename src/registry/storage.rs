//! Where a registry lies, and how one is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use super::db::{self, Backend, Clock, lock_number};
use super::pool::{Pool, Transaction};
use super::{Blobs, Registry, RegistryError};
use crate::ids::ProcessId;

/// This program's schema: the number of the last migration.
const SCHEMA: i64 = 3;

/// Where everything that must survive is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Folder of what has no address of its own below.
    pub data: PathBuf,
    /// `postgres://…`; `None`: SQLite in the folder.
    pub database: Option<String>,
    /// `s3://bucket/prefix`; `None`: files in the folder.
    pub blobs: Option<String>,
}

impl Storage {
    /// All of it in one folder.
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

/// What keeps bytes from being removed between their being stored and the row that refers to them: in one process a lock
/// of its own, in many one of the database's.
#[derive(Debug, Clone)]
pub(super) enum Gate {
    Process(Arc<RwLock<()>>),
    /// Connections that hold nothing but locks.
    Database(Pool),
}

/// Bytes that stay while this is held, whether a row refers to them or not.
#[derive(Debug)]
#[must_use]
pub struct Stored {
    hashes: Vec<String>,
    _held: Held,
}

/// Released when dropped.
#[derive(Debug)]
enum Held {
    Process {
        _guard: OwnedRwLockReadGuard<()>,
    },
    /// Its end releases the locks.
    Database {
        _transaction: Transaction,
    },
}

impl Stored {
    /// Of all of them, as they were given.
    pub fn hashes(&self) -> &[String] {
        &self.hashes
    }

    /// Of the first; empty where nothing was stored.
    pub fn first(&self) -> &str {
        self.hashes.first().map_or("", String::as_str)
    }

    /// Lets go of them; whoever wants them removed may ask then.
    pub fn release(self) -> Vec<String> {
        self.hashes
    }
}

/// A name that nobody else holds, in any process.
#[derive(Debug)]
#[must_use]
pub struct NameLock {
    /// `None`: one process, which has its own ways.
    _transaction: Option<Transaction>,
}

impl Registry {
    /// Opens a data folder, creating what is missing, and brings its database to this version's schema.
    ///
    /// # Errors
    /// When the folder cannot be written or its database is of a newer version.
    pub async fn open(dir: &Path) -> Result<Self, RegistryError> {
        Self::connect(&Storage::folder(dir)).await
    }

    /// Opens database and blob store, creating what is missing, and brings the database to this version's schema.
    ///
    /// # Errors
    /// When one cannot be reached or written, or the database is of a version that this program cannot use.
    pub async fn connect(storage: &Storage) -> Result<Self, RegistryError> {
        let file = |error| RegistryError::File(storage.data.display().to_string(), error);
        let (backend, pool, gate) = match &storage.database {
            None => {
                super::create_private_dir(&storage.data).map_err(file)?;
                let pool = db::open_sqlite(&storage.data.join("coar.sqlite")).await?;
                sqlx::migrate!("migrations/sqlite").run(&pool).await?;
                (Backend::Sqlite, pool, Gate::Process(Arc::default()))
            }
            Some(url) => {
                let (pool, locks) = db::open_postgres(url).await?;
                let mut migrations = sqlx::migrate!("migrations/postgres");
                // A program of the version before goes on beside one of the next: see `check_schema`.
                migrations.set_ignore_missing(true).run(&pool).await?;
                (Backend::Postgres, pool, Gate::Database(db::bounded_locks(locks)))
            }
        };
        let blobs = match &storage.blobs {
            None => Blobs::open(&storage.data.join("blobs"))?,
            Some(url) => Blobs::connect(url)?,
        };
        let registry = Self {
            pool: db::bounded(backend, pool),
            backend,
            gate,
            clock: Clock::default(),
            presence: super::processes::Presence::default(),
            process: ProcessId::new(),
            database: storage.database.as_deref().map(Into::into),
            blobs,
        };
        registry.check_schema().await?;
        registry.complete_tenants().await?;
        Ok(registry)
    }

    /// Which database it is.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The name of this process among those that share the database.
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

    /// Stores bytes; they stay at least until the answer is dropped, so that a row can be written that refers to them.
    ///
    /// # Errors
    /// When the store or the database fails.
    pub async fn store(&self, all: Vec<bytes::Bytes>) -> Result<Stored, RegistryError> {
        let hashes: Vec<String> = all.iter().map(|bytes| super::blobs::content_hash(bytes)).collect();
        let held = match &self.gate {
            Gate::Process(gate) => Held::Process {
                _guard: gate.clone().read_owned().await,
            },
            Gate::Database(locks) => {
                let mut transaction = locks.begin().await?;
                for hash in &hashes {
                    sqlx::query("SELECT pg_advisory_xact_lock_shared($1)")
                        .bind(lock_number("blob", hash))
                        .execute(&mut *transaction)
                        .await?;
                }
                Held::Database {
                    _transaction: transaction,
                }
            }
        };
        for bytes in all {
            self.blobs.put(bytes).await?;
        }
        Ok(Stored { hashes, _held: held })
    }

    /// Removes blobs that no row refers to any more.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn remove_unreferenced(&self, hashes: &[String]) -> Result<(), RegistryError> {
        for hash in hashes {
            self.remove_if_unreferenced(hash).await?;
        }
        Ok(())
    }

    /// Removes a blob, unless a row refers to it or somebody stores it right now. True where it is gone.
    async fn remove_if_unreferenced(&self, hash: &str) -> Result<bool, RegistryError> {
        let (_alone, _transaction) = match &self.gate {
            Gate::Process(gate) => (Some(gate.write().await), None),
            Gate::Database(locks) => {
                let mut transaction = locks.begin().await?;
                sqlx::query("SELECT pg_advisory_xact_lock($1)")
                    .bind(lock_number("blob", hash))
                    .execute(&mut *transaction)
                    .await?;
                (None, Some(transaction))
            }
        };
        let (count,): (i64,) = sqlx::query_as(
            "SELECT count(*) FROM (
                 SELECT 1 AS found FROM concept_pictures WHERE blob = $1
                 UNION ALL SELECT 1 FROM concept_versions WHERE hash = $1
                 UNION ALL SELECT 1 FROM trainings WHERE checkpoint = $1
                 UNION ALL SELECT 1 FROM training_previews WHERE blob = $1
                 UNION ALL SELECT 1 FROM images WHERE blob = $1) AS uses",
        )
        .bind(hash)
        .fetch_one(&self.pool)
        .await?;
        if count == 0 {
            self.blobs.remove(hash).await?;
        }
        Ok(count == 0)
    }

    /// Removes every blob that no row refers to: what crashes between storing bytes and writing their row have left.
    /// Safe beside others that store.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn collect_garbage(&self) -> Result<usize, RegistryError> {
        let wanted = self.referenced_blobs().await?;
        let mut removed = 0;
        for hash in self.blobs.all().await? {
            if !wanted.contains(&hash) && self.remove_if_unreferenced(&hash).await? {
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Hashes of every blob that a row refers to.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn referenced_blobs(&self) -> Result<std::collections::HashSet<String>, RegistryError> {
        let rows: Vec<(String,)> = sqlx::query_as(
            "SELECT blob FROM concept_pictures UNION SELECT hash FROM concept_versions
             UNION SELECT checkpoint FROM trainings WHERE checkpoint IS NOT NULL
             UNION SELECT blob FROM training_previews UNION SELECT blob FROM images",
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|(blob,)| blob).collect())
    }

    /// Waits until nobody else holds the name, in any process; in one process there is nothing to wait for here.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn lock_name(&self, kind: &str, name: &str) -> Result<NameLock, RegistryError> {
        let Gate::Database(locks) = &self.gate else {
            return Ok(NameLock { _transaction: None });
        };
        let mut transaction = locks.begin().await?;
        self.hold_name(&mut transaction, kind, name).await?;
        Ok(NameLock {
            _transaction: Some(transaction),
        })
    }

    /// Waits until no other transaction holds the name, and holds it until this one ends.
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

    /// The time that leases go by, in milliseconds since 1970: all processes agree on it, and no clock's jump changes it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn lease_time(&self) -> Result<i64, RegistryError> {
        self.clock.now(self.backend, &self.pool).await
    }
}
