//! Errors of registry operations, and their conversion to the errors that callers get.

use std::time::Duration;

use coar_core::error::{Error, ErrorKind};

use crate::{BlobError, Queue};

/// The error code for work that another process has taken over.
pub const LEASE_LOST: &str = "lease_lost";
/// `Retry-After` when the quota of trainings is used up.
const NEXT_TRAINING: Duration = Duration::from_secs(30);
/// `Retry-After` when the quota of concepts is used up: one has to be deleted first.
const NEXT_CONCEPT: Duration = Duration::from_secs(120);

/// Why a registry operation failed.
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
    /// The key of the request is no longer valid.
    #[error("the key is not valid any more")]
    KeyInvalid,
    /// The tenant owns the key in use.
    #[error("the tenant is that of the key in use")]
    OwnTenant,
    /// The tenant owns the last valid key with the scope `admin`.
    #[error("the tenant has the last valid admin key")]
    LastAdminKey,
    /// The lease is no longer held: another process has taken over the training, or it was cancelled or deleted.
    #[error("the lease of the training is lost")]
    LeaseLost,
    #[error("the data folder {0} is in use by another server")]
    InUse(String),
    #[error(
        "the database at {0} cannot be reached: {1}; check the address in `database`, and that the server is running"
    )]
    Unreachable(String, String),
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("database migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("blob store: {0}")]
    Blob(#[from] BlobError),
    /// A later version has migrated the database in a way that this one does not support.
    #[error("the database has been changed by a newer coar (schema {0}); use that version")]
    Newer(String),
    /// Session settings, LISTEN and prepared statements do not work.
    #[error(
        "the database is behind a pooler in transaction mode (PgBouncer's pool_mode = transaction), which cannot work: \
         connect to PostgreSQL itself, or set pool_mode = session for this database"
    )]
    Pooler,
    /// The same bytes are being removed, which takes too long.
    #[error("the blob store is still removing the same bytes")]
    BlobBusy,
    /// A quota of the tenant is used up.
    #[error("the tenant has {used} {quota}; the limit is {limit}")]
    QuotaExceeded { quota: &'static str, used: u64, limit: u64 },
    /// Too many jobs of all tenants are waiting, and the tenant has the most of them.
    #[error("too many {} wait; the limit is {limit}", .queue.as_str())]
    QueueFull { queue: Queue, limit: u32 },
    #[error("a row of the database cannot be read: {0}")]
    Row(String),
    #[error("{0}: {1}")]
    File(String, std::io::Error),
}

impl RegistryError {
    /// Whether the error is transient: the database or the store cannot be reached, is full, or is busy.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Database(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default();
                // SQLite: busy, I/O, full. PostgreSQL: connection, idle transaction timeout, rollback, resources,
                // locks, operator intervention and timeouts, system.
                let passing = ["08", "25P03", "40", "53", "55", "57", "58"];
                matches!(code.as_ref(), "5" | "10" | "13" | "261" | "517")
                    || passing.iter().any(|class| code.len() == 5 && code.starts_with(class))
            }
            Self::Database(error) => matches!(
                error,
                sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed
                    | sqlx::Error::Protocol(_)
            ),
            Self::Blob(BlobError::Store(_)) | Self::File(..) | Self::BlobBusy => true,
            _ => false,
        }
    }
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::NameTaken(name) => Self::field(
                "name_taken",
                "name",
                format!("is `{name}`, which another concept has; choose another name or delete that concept"),
            )
            .of_kind(ErrorKind::Conflict),
            RegistryError::ConceptBusy(name) => Self::new(
                ErrorKind::Conflict,
                "training_in_progress",
                format!("A training of the concept `{name}` is queued or running; wait for it, or cancel it."),
            ),
            RegistryError::NoVersion(number) => Self::field(
                "version_not_found",
                "version",
                format!("is {number}, which the concept does not have"),
            )
            .of_kind(ErrorKind::NotFound),
            RegistryError::TenantTaken(name) => {
                Self::field("name_taken", "name", format!("is `{name}`, which another tenant has"))
                    .of_kind(ErrorKind::Conflict)
            }
            RegistryError::KeyInvalid => Self::new(
                ErrorKind::Unauthorized,
                "invalid_api_key",
                "The key of this request is not valid any more.",
            ),
            RegistryError::OwnTenant => Self::new(
                ErrorKind::Conflict,
                "tenant_in_use",
                "The tenant cannot be deleted: it is that of the key in use.",
            ),
            RegistryError::LastAdminKey => Self::new(
                ErrorKind::Conflict,
                "last_admin_key",
                "The tenant has the last valid key with the scope `admin`; make one for another tenant first.",
            ),
            RegistryError::QuotaExceeded { quota, used, limit } => no_room(quota, used, limit),
            RegistryError::QueueFull { queue, limit } => {
                let message = format!("Too many {} are waiting; try again later.", queue.as_str());
                Self::new(ErrorKind::Overloaded, "overloaded", message).limit(u64::from(limit))
            }
            RegistryError::BlobBusy => Self::new(
                ErrorKind::Unavailable,
                "storage_busy",
                "The same bytes are being removed from the blob store; retry shortly.",
            )
            .retry_after(Duration::from_secs(5)),
            RegistryError::LeaseLost => {
                Self::new(ErrorKind::Conflict, LEASE_LOST, "Another process has taken this over.")
            }
            other => Self::internal(other),
        }
    }
}

impl From<BlobError> for Error {
    fn from(error: BlobError) -> Self {
        Self::internal(error)
    }
}

/// The error for a concept or training that exceeds a quota.
fn no_room(quota: &'static str, used: u64, limit: u64) -> Error {
    let (wait, what) = match quota {
        "bytes" => (
            NEXT_CONCEPT,
            format!("{used} bytes are kept; delete a concept or images"),
        ),
        "concepts" => (NEXT_CONCEPT, format!("there are {used} concepts; delete one")),
        _ => (NEXT_TRAINING, format!("{used} trainings are queued or running")),
    };
    Error::quota_exceeded(quota, limit, wait, &what)
}
