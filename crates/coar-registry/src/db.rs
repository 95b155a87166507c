//! The differences between the two databases: SQLite in the data folder of one process, PostgreSQL for several. The SQL
//! text is the same for both if possible; otherwise the difference is here or beside a `match` on [`Backend`].

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::migrate::Migrator;
use sqlx::{AnyConnection, Connection as _, Executor, Row};

use super::pool::{Pool, answers};
use super::{RegistryError, now};

/// The database in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Sqlite,
    Postgres,
}

/// How long a SQLite statement waits for a writer in another process, such as a command that runs beside the server.
const BUSY: Duration = Duration::from_secs(20);
/// How long a caller waits for a PostgreSQL connection, and for the result of a statement.
const CONNECT: Duration = Duration::from_secs(10);
const STATEMENT: Duration = Duration::from_secs(10);
/// Pause between connection attempts at startup.
const RECONNECT: Duration = Duration::from_millis(500);
/// PostgreSQL's own timeouts for a statement, a lock and an idle transaction. They end the work on the server, which
/// the client-side limits cannot; each is below [`STATEMENT`], so the server's error, which names the reason,
/// arrives first.
const SERVER_STATEMENT: Duration = Duration::from_secs(9);
const SERVER_LOCK: Duration = Duration::from_secs(5);
const SERVER_IDLE: Duration = Duration::from_secs(9);
/// A connection that does not respond within this time is dropped.
const PING: Duration = Duration::from_secs(1);
/// PostgreSQL connections per process.
pub(super) const CONNECTIONS: u32 = 16;
/// SQLite connections that only read. There is one more for writes: SQLite has one writer at a time, and waiting
/// writers queue in the pool, in order, instead of polling the file lock.
const READERS: u32 = 8;

/// Adds row locks to a statement on PostgreSQL; a writing transaction of SQLite excludes all others anyway.
macro_rules! locking {
    ($backend:expr, $sql:expr, $clause:literal) => {
        match $backend {
            $crate::db::Backend::Sqlite => $sql,
            $crate::db::Backend::Postgres => concat!($sql, $clause),
        }
    };
}
pub(super) use locking;

/// Whether no row can contain that text: PostgreSQL rejects U+0000 even in query parameters. For SQLite the result is
/// the same.
pub(super) fn is_unstorable(text: &str) -> bool {
    text.contains('\0')
}

/// A column of a row as a typed identifier.
pub(super) fn identifier<I: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<I, RegistryError> {
    let text: String = row.try_get(column)?;
    text.parse()
        .map_err(|_| RegistryError::Row(format!("{column} `{text}`")))
}

/// A column that holds a number >= 0.
pub(super) fn number<N: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<N, RegistryError> {
    let number: i64 = row.try_get(column)?;
    N::try_from(number).map_err(|_| RegistryError::Row(format!("{column} {number}")))
}

/// Like [`number`], for a nullable column.
pub(super) fn optional_number<N: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<Option<N>, RegistryError> {
    match row.try_get::<Option<i64>, _>(column)? {
        None => Ok(None),
        Some(number) => N::try_from(number)
            .map(Some)
            .map_err(|_| RegistryError::Row(format!("{column} {number}"))),
    }
}

/// A column made by `string_agg(…, ',')`; NULL if there was nothing to aggregate.
pub(super) fn list<T: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<Vec<T>, RegistryError> {
    let text: Option<String> = row.try_get(column)?;
    let read = |part: &str| {
        part.parse()
            .map_err(|_| RegistryError::Row(format!("{column} `{part}`")))
    };
    text.iter().flat_map(|text| text.split(',')).map(read).collect()
}

/// Placeholders for a list of `count` values, from `$first` on: the databases have no common way to bind a list.
pub(super) fn places(first: usize, count: usize) -> String {
    let places: Vec<String> = (first..first + count).map(|place| format!("${place}")).collect();
    places.join(", ")
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

/// The connections of a registry.
#[derive(Debug, Clone)]
pub(super) struct Pools {
    /// For statements that read, outside of transactions.
    pub reads: Pool,
    /// For statements that write, and for transactions. On PostgreSQL the same as `reads`.
    pub writes: Pool,
}

/// Opens the SQLite file, which is created if absent, and migrates it to this version's schema.
pub(super) async fn open_sqlite(file: &Path, migrations: &Migrator) -> Result<Pools, RegistryError> {
    sqlx::any::install_default_drivers();
    let pool = |connections: u32, pragmas: &'static str| {
        AnyPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(BUSY * 2)
            // SQLite rolls a transaction back on its own when the disk is full. The driver's rollback then finds
            // none, and the driver would refuse every later transaction on the connection.
            .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    let busy = format!("PRAGMA busy_timeout = {}", BUSY.as_millis());
                    // Before the other settings, which may have to wait for a writer themselves.
                    connection.execute(sqlx::AssertSqlSafe(busy)).await?;
                    connection.execute(pragmas).await?;
                    Ok(())
                })
            })
    };
    let options: AnyConnectOptions = format!("{}?mode=rwc", percent_encoded(file)).parse()?;
    // FULL: acknowledged writes survive a power failure too.
    let writes = pool(
        1,
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
    )
    .connect_with(options.clone())
    .await?;
    migrations.run(&writes).await?;
    // Statements that write fail on these connections.
    let reads = pool(READERS, "PRAGMA query_only = ON;").connect_with(options).await?;
    Ok(Pools {
        reads: Pool::new(reads, BUSY * 3),
        writes: Pool::new(writes, BUSY * 3),
    })
}

/// The server's host and port, without the credentials of its URL.
fn server_name(options: &AnyConnectOptions) -> String {
    let url = &options.database_url;
    let socket = url.query_pairs().find(|(name, _)| name == "host");
    match (socket, url.host_str()) {
        (Some((_, socket)), _) => socket.into_owned(),
        (None, host) => format!("{}:{}", host.unwrap_or("localhost"), url.port().unwrap_or(5432)),
    }
}

/// Opens the first connection. It waits for a server that is starting, but not for one that refuses the user or the
/// database.
async fn first_connection(options: &AnyConnectOptions, within: Duration) -> Result<AnyConnection, RegistryError> {
    let give_up = tokio::time::Instant::now() + within;
    let mut warned = false;
    loop {
        let tried = tokio::time::timeout_at(give_up, AnyConnection::connect_with(options)).await;
        let cause = match tried {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error @ sqlx::Error::Io(_))) => error.to_string(),
            // The server is starting or recovering, or has no free connection.
            Ok(Err(sqlx::Error::Database(error))) if matches!(error.code().as_deref(), Some("57P03" | "53300")) => {
                error.to_string()
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => "no answer".to_owned(),
        };
        let server = server_name(options);
        if tokio::time::Instant::now() + RECONNECT >= give_up {
            return Err(RegistryError::Unreachable(server, cause));
        }
        if !std::mem::replace(&mut warned, true) {
            tracing::warn!(%server, cause, "the database cannot be reached; trying again for {} s", within.as_secs());
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

/// Connects to PostgreSQL and migrates the database to this version's schema.
pub(super) async fn open_postgres(url: &str, migrations: &Migrator, connections: u32) -> Result<Pools, RegistryError> {
    sqlx::any::install_default_drivers();
    let options: AnyConnectOptions = url.parse()?;
    if let Some(host) = super::postgres::unverified_host(url) {
        tracing::warn!(
            host,
            "the database's certificate is not verified, and without TLS on the server the connection is not encrypted: \
             add sslmode=verify-full to the database's address"
        );
    }
    // First of all, because this waits for a server that is starting.
    first_connection(&options, CONNECT).await?.close().await?;
    super::postgres::check_direct(&options).await?;
    // Without the limits below: a migration may take longer, and waits while another process migrates.
    let unlimited = AnyPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(CONNECT)
        .connect_with(options.clone())
        .await?;
    migrations.run(&unlimited).await?;
    unlimited.close().await;
    let pool = AnyPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(CONNECT)
        .after_connect(|connection, _| {
            Box::pin(async move {
                let limits = format!(
                    "SET statement_timeout = {}; SET lock_timeout = {}; SET idle_in_transaction_session_timeout = {}",
                    SERVER_STATEMENT.as_millis(),
                    SERVER_LOCK.as_millis(),
                    SERVER_IDLE.as_millis()
                );
                connection.execute(sqlx::AssertSqlSafe(limits)).await?;
                Ok(())
            })
        })
        // Instead of the pool's own check, which has no timeout.
        .test_before_acquire(false)
        .before_acquire(|connection, _| Box::pin(async move { Ok(answers(connection, PING).await) }))
        .after_release(|connection, _| Box::pin(async move { Ok(answers(connection, PING).await) }))
        .connect_with(options)
        .await?;
    let pool = Pool::new(pool, STATEMENT);
    Ok(Pools {
        reads: pool.clone(),
        writes: pool,
    })
}

/// The advisory lock number for a kind and a name.
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

/// The clock of leases: the database's time, carried forward by a monotonic clock. All processes agree on it, and
/// setting a machine's clock expires no lease.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(Arc<Mutex<Option<Reading>>>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    millis: i64,
    at: Instant,
}

/// How often the database's time is read again: clocks drift.
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
    fn lock_numbers_separate_kind_and_name() {
        assert_eq!(lock_number("blob", "ab"), lock_number("blob", "ab"));
        assert_ne!(lock_number("blob", "ab"), lock_number("blo", "bab"));
    }

    async fn pools(dir: &Path) -> Pools {
        open_sqlite(&dir.join("coar.sqlite"), &sqlx::migrate!("../../migrations/sqlite"))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn an_unreachable_server_is_named_with_the_cause_and_without_the_password() {
        sqlx::any::install_default_drivers();
        // A port that was free a moment ago: nothing listens.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let url = format!("postgres://coar:secret@127.0.0.1:{port}/coar");
        let refused = first_connection(&url.parse().unwrap(), RECONNECT).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
        assert!(error.contains("refused") && !error.contains("secret"), "{error}");
        let socket: AnyConnectOptions = "postgres:///coar?host=/run/postgresql".parse().unwrap();
        assert_eq!(server_name(&socket), "/run/postgresql");
    }

    #[tokio::test]
    async fn opening_a_database_names_a_server_that_cannot_be_reached() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let url = format!("postgres://coar:secret@127.0.0.1:{port}/coar");
        let opened = open_postgres(&url, &sqlx::migrate!("../../migrations/postgres"), 1).await;
        assert!(
            matches!(opened, Err(RegistryError::Unreachable(..))),
            "{:?}",
            opened.err()
        );
    }

    #[tokio::test]
    async fn connection_survives_a_full_disk() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pools(dir.path()).await.writes;
        sqlx::query("CREATE TABLE t (a BLOB)").execute(&pool).await.unwrap();
        let write = async |limit: &'static str| {
            let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
            sqlx::query(limit).execute(&mut *transaction).await?;
            sqlx::query("INSERT INTO t VALUES (zeroblob(100000))")
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        };
        let full = write("PRAGMA max_page_count = 1").await.unwrap_err();
        assert!(RegistryError::from(full).is_transient());
        for _ in 0..3 {
            write("PRAGMA max_page_count = 100000").await.unwrap();
        }
    }

    #[tokio::test]
    async fn data_folder_may_have_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a b?#%&ü");
        std::fs::create_dir(&odd).unwrap();
        let pools = pools(&odd).await;
        let (mode,): (String,) = sqlx::query_as("PRAGMA journal_mode")
            .fetch_one(&pools.reads)
            .await
            .unwrap();
        assert_eq!(mode, "wal");
        assert!(odd.join("coar.sqlite").exists());
    }

    #[tokio::test]
    async fn sqlite_has_one_writer_and_read_only_readers() {
        let dir = tempfile::tempdir().unwrap();
        let pools = pools(dir.path()).await;
        let insert = "INSERT INTO settings (key, value) VALUES ('a', 'b')";
        assert!(sqlx::query(insert).execute(&pools.reads).await.is_err());
        let open = pools.writes.begin_with("BEGIN IMMEDIATE").await.unwrap();
        // Reads proceed during a write.
        let read = sqlx::query("SELECT * FROM settings").fetch_all(&pools.reads);
        assert!(tokio::time::timeout(PING, read).await.unwrap().is_ok());
        // The second writer waits for the first one to finish.
        let second = tokio::spawn({
            let writes = pools.writes.clone();
            async move { sqlx::query(insert).execute(&writes).await }
        });
        drop(open);
        assert_eq!(second.await.unwrap().unwrap().rows_affected(), 1);
        for pool in [&pools.reads, &pools.writes] {
            let (busy,): (i64,) = sqlx::query_as("PRAGMA busy_timeout").fetch_one(pool).await.unwrap();
            assert_eq!(busy, BUSY.as_millis() as i64);
        }
    }
}
