//! Checks of the connection to a PostgreSQL server, for problems that would show only later.

use sqlx::any::AnyConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AnyConnection, ConnectOptions as _, Connection as _, Executor, Row};

use super::RegistryError;

/// The host of a database URL if it is remote and its certificate is not verified.
pub(super) fn unverified_host(url: &str) -> Option<String> {
    let options: PgConnectOptions = url.parse().ok()?;
    let host = options.get_host();
    let local = options.get_socket().is_some()
        || host.starts_with('/')
        || host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    let verified = matches!(options.get_ssl_mode(), PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    (!local && !verified).then(|| host.to_owned())
}

/// The number of attempts to detect a pooler that serves both connections by the same server process.
const TRIES: usize = 3;

/// Rejects a pooler that shares the server's connections among transactions (PgBouncer's transaction mode): session
/// settings, LISTEN and prepared statements do not work with it. With such a pooler, one server process serves two
/// connections of this process.
///
/// # Errors
/// `Pooler`; when the database cannot be reached.
pub(super) async fn check_direct(options: &AnyConnectOptions) -> Result<(), RegistryError> {
    let (mut first, mut second) = (options.connect().await?, options.connect().await?);
    let mut shared = false;
    for _ in 0..TRIES {
        let known = server_process(&mut first).await?;
        shared |= server_process(&mut second).await? == known;
    }
    // The result does not depend on how they are closed.
    let _ = tokio::join!(first.close(), second.close());
    if shared { Err(RegistryError::Pooler) } else { Ok(()) }
}

/// The server process of a connection, without a prepared statement, which a pooler may not support.
async fn server_process(connection: &mut AnyConnection) -> Result<i64, RegistryError> {
    let row = connection
        .fetch_one(sqlx::raw_sql("SELECT CAST(pg_backend_pid() AS BIGINT) AS process"))
        .await?;
    Ok(row.try_get("process")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_remote_servers_without_verification_are_named() {
        for (url, host) in [
            ("postgres://u:p@db.example/coar", Some("db.example")),
            ("postgres://u:p@db.example/coar?sslmode=require", Some("db.example")),
            ("postgres://u:p@10.0.0.7:5432/coar?sslmode=prefer", Some("10.0.0.7")),
            ("postgres://u:p@db.example/coar?sslmode=verify-full", None),
            ("postgres://u:p@db.example/coar?sslmode=verify-ca", None),
            ("postgres://u:p@localhost/coar", None),
            ("postgres://u:p@127.0.0.1:5433/coar", None),
            ("postgres://u:p@[::1]/coar", None),
            ("postgres:///coar?host=/var/run/postgresql", None),
        ] {
            assert_eq!(unverified_host(url).as_deref(), host, "{url}");
        }
    }

    #[tokio::test]
    async fn a_direct_connection_passes() {
        let Ok(server) = std::env::var("COAR_TEST_DATABASE") else {
            return;
        };
        sqlx::any::install_default_drivers();
        check_direct(&server.parse().unwrap()).await.unwrap();
    }

    /// Runs with the pooler of `tests/pgbouncer/run.sh`.
    #[tokio::test]
    async fn a_pooler_in_transaction_mode_is_refused() {
        let Ok(pooler) = std::env::var("COAR_TEST_POOLER") else {
            return;
        };
        sqlx::any::install_default_drivers();
        let refused = check_direct(&pooler.parse().unwrap()).await;
        assert!(matches!(refused, Err(RegistryError::Pooler)), "{refused:?}");
    }
}
