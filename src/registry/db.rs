//! What the two databases do differently: SQLite in the data folder of one process, PostgreSQL for many. Statements are
//! the same text on both where that is possible; where it is not, the difference is here or beside a `match` on
//! [`Backend`].

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::{AnyPool, Connection as _, Executor, Row};

use super::pool::{Pool, answers};
use super::{RegistryError, now};

/// Which database it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Sqlite,
    Postgres,
}

/// How long a statement of SQLite waits for another writer.
const BUSY: Duration = Duration::from_secs(20);
/// How long whoever asks for a connection to PostgreSQL waits, a statement may take, and one that waits for a lock.
const CONNECT: Duration = Duration::from_secs(10);
const STATEMENT: Duration = Duration::from_secs(10);
const LOCK: Duration = Duration::from_secs(60);
/// A connection that does not answer for so long is given up.
const PING: Duration = Duration::from_secs(1);
/// Connections of one process to PostgreSQL, and of those that only hold locks.
const CONNECTIONS: u32 = 16;
const LOCKS: u32 = 8;

/// A statement with what PostgreSQL needs at its end to keep others from the rows that it reads; a writing transaction of
/// SQLite keeps everybody out.
macro_rules! locking {
    ($backend:expr, $sql:expr, $clause:literal) => {
        match $backend {
            $crate::registry::db::Backend::Sqlite => $sql,
            $crate::registry::db::Backend::Postgres => concat!($sql, $clause),
        }
    };
}
pub(super) use locking;

/// A column of a row as a typed identifier.
pub(super) fn identifier<I: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<I, RegistryError> {
    let text: String = row.try_get(column)?;
    text.parse()
        .map_err(|_| RegistryError::Row(format!("{column} `{text}`")))
}

/// A column that holds a number from 0 on.
pub(super) fn number<N: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<N, RegistryError> {
    let number: i64 = row.try_get(column)?;
    N::try_from(number).map_err(|_| RegistryError::Row(format!("{column} {number}")))
}

/// The same, where it may be NULL.
pub(super) fn optional_number<N: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<Option<N>, RegistryError> {
    match row.try_get::<Option<i64>, _>(column)? {
        None => Ok(None),
        Some(number) => N::try_from(number)
            .map(Some)
            .map_err(|_| RegistryError::Row(format!("{column} {number}"))),
    }
}

/// A column that `string_agg(…, ',')` made; NULL where there was nothing.
pub(super) fn list<T: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<Vec<T>, RegistryError> {
    let text: Option<String> = row.try_get(column)?;
    let read = |part: &str| {
        part.parse()
            .map_err(|_| RegistryError::Row(format!("{column} `{part}`")))
    };
    text.iter().flat_map(|text| text.split(',')).map(read).collect()
}

fn percent_encoded(path: &Path) -> String {
    use std::fmt::Write as _;
    let mut url = String::from("sqlite://");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => url.push(char::from(*byte)),
            // Writing to a string cannot fail.
            other => drop(write!(url, "%{other:02X}")),
        }
    }
    url
}

/// Opens SQLite's file, which is created.
pub(super) async fn open_sqlite(file: &Path) -> Result<AnyPool, RegistryError> {
    sqlx::any::install_default_drivers();
    let options: AnyConnectOptions = format!("{}?mode=rwc", percent_encoded(file)).parse()?;
    let pool = AnyPoolOptions::new()
        .max_connections(8)
        .acquire_timeout(BUSY * 2)
        // SQLite ends a transaction by itself where the disk is full; the driver, whose rollback finds none then, would refuse
        // to begin another for ever.
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
        .after_connect(|connection, _| {
            Box::pin(async move {
                // FULL: what was acknowledged survives a power cut too.
                connection
                    .execute(
                        "PRAGMA busy_timeout = 20000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
                         PRAGMA foreign_keys = ON;",
                    )
                    .await?;
                Ok(())
            })
        })
        .connect_with(options)
        .await?;
    Ok(pool)
}

/// Connects to PostgreSQL: a pool for statements, and one for locks that are held while others wait for statements.
pub(super) async fn open_postgres(url: &str) -> Result<(AnyPool, AnyPool), RegistryError> {
    sqlx::any::install_default_drivers();
    let options: AnyConnectOptions = url.parse()?;
    let pool = |connections| {
        AnyPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(CONNECT)
            // Instead of the pool's own question, which has no limit.
            .test_before_acquire(false)
            .before_acquire(|connection, _| Box::pin(async move { Ok(answers(connection, PING).await) }))
            .after_release(|connection, _| Box::pin(async move { Ok(answers(connection, PING).await) }))
            .connect_with(options.clone())
    };
    Ok((pool(CONNECTIONS).await?, pool(LOCKS).await?))
}

/// With the time that statements have.
pub(super) fn bounded(backend: Backend, pool: AnyPool) -> Pool {
    Pool::new(
        pool,
        match backend {
            Backend::Sqlite => BUSY * 3,
            Backend::Postgres => STATEMENT,
        },
    )
}

/// The same for connections that wait for locks.
pub(super) fn bounded_locks(pool: AnyPool) -> Pool {
    Pool::new(pool, LOCK)
}

/// The number of an advisory lock for something with a name.
pub(super) fn lock_number(kind: &str, name: &str) -> i64 {
    let digest = Sha256::new()
        .chain_update(kind)
        .chain_update([0])
        .chain_update(name)
        .finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    i64::from_be_bytes(first)
}

/// The time that leases go by: the database's own, carried on by a clock that nobody can set. So processes agree, and a
/// jump of a machine's clock ends no lease.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(Arc<Mutex<Option<Reading>>>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    millis: i64,
    at: Instant,
}

/// The database is asked again after this: clocks drift.
const READING: Duration = Duration::from_secs(10);

impl Clock {
    /// Milliseconds since 1970.
    pub(super) async fn now(&self, backend: Backend, pool: &Pool) -> Result<i64, RegistryError> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = |reading: Reading| reading.millis + reading.at.elapsed().as_millis() as i64;
        match last {
            Some(reading) if backend == Backend::Sqlite || reading.at.elapsed() < READING => Ok(carried(reading)),
            _ => {
                let millis = match backend {
                    Backend::Sqlite => now(),
                    Backend::Postgres => {
                        let (millis,) =
                            sqlx::query_as("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)")
                                .fetch_one(pool)
                                .await?;
                        millis
                    }
                };
                let reading = Reading {
                    millis,
                    at: Instant::now(),
                };
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading);
                Ok(millis)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_locks_do_not_run_into_each_other() {
        assert_eq!(lock_number("blob", "ab"), lock_number("blob", "ab"));
        assert_ne!(lock_number("blob", "ab"), lock_number("blo", "bab"));
    }

    #[tokio::test]
    async fn a_connection_is_not_spoilt_by_a_disk_that_was_full() {
        let dir = tempfile::tempdir().unwrap();
        let pool = bounded(
            Backend::Sqlite,
            open_sqlite(&dir.path().join("coar.sqlite")).await.unwrap(),
        );
        sqlx::query("CREATE TABLE t (a BLOB)").execute(&pool).await.unwrap();
        let write = async |limit: &'static str| {
            let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
            sqlx::query(limit).execute(&mut *transaction).await?;
            sqlx::query("INSERT INTO t VALUES (zeroblob(100000))")
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        };
        let full = write("PRAGMA max_page_count = 4").await.unwrap_err();
        assert!(RegistryError::from(full).may_pass());
        // More than once: it may have been another connection.
        for _ in 0..9 {
            write("PRAGMA max_page_count = 100000").await.unwrap();
        }
    }

    #[tokio::test]
    async fn any_path_can_be_a_data_folder() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a b?#%&ü");
        std::fs::create_dir(&odd).unwrap();
        let pool = open_sqlite(&odd.join("coar.sqlite")).await.unwrap();
        let (mode,): (String,) = sqlx::query_as("PRAGMA journal_mode").fetch_one(&pool).await.unwrap();
        assert_eq!(mode, "wal");
        assert!(odd.join("coar.sqlite").exists());
    }
}
