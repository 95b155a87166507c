//! Connection pools with a timeout on every statement. Neither PostgreSQL's protocol nor the driver has one, so a
//! statement on a connection whose peer has vanished would wait forever.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use sqlx::any::{Any, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo};
use sqlx::{AnyPool, Connection as _, Either, Error, Execute, Executor, SqlStr};

type Answers<'e> = BoxStream<'e, Result<Either<AnyQueryResult, AnyRow>, Error>>;

/// A timeout is reported as a broken connection, which callers retry.
async fn in_time<T>(within: Duration, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(within, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer within {} s", within.as_secs()),
        ))),
    }
}

/// All results of a statement, once they have arrived. The registry reads no result that is too large for that.
fn collected<'e, T: Send + 'e>(
    all: impl Future<Output = Result<Vec<T>, Error>> + Send + 'e,
) -> BoxStream<'e, Result<T, Error>> {
    stream::once(all)
        .map_ok(|all| stream::iter(all.into_iter().map(Ok)))
        .try_flatten()
        .boxed()
}

/// Whether a connection responds; checked when it is acquired and released.
pub(super) async fn answers(connection: &mut sqlx::AnyConnection, within: Duration) -> bool {
    matches!(tokio::time::timeout(within, connection.ping()).await, Ok(Ok(())))
}

/// A pool of connections.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    inner: AnyPool,
    within: Duration,
    /// Number of statements outside of transactions.
    #[cfg(test)]
    pub statements: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Pool {
    /// Statements on it fail after `within`.
    pub(super) fn new(inner: AnyPool, within: Duration) -> Self {
        Self {
            inner,
            within,
            #[cfg(test)]
            statements: Default::default(),
        }
    }

    /// The pool and the timeout for one statement.
    fn line(&self) -> (AnyPool, Duration) {
        #[cfg(test)]
        self.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (self.inner.clone(), self.within)
    }

    /// Begins a transaction; dropping it rolls it back.
    pub(super) async fn begin(&self) -> Result<Transaction, Error> {
        self.begun(self.inner.begin()).await
    }

    /// The same with a custom BEGIN statement.
    pub(super) async fn begin_with(&self, statement: &'static str) -> Result<Transaction, Error> {
        self.begun(self.inner.begin_with(statement)).await
    }

    async fn begun(
        &self,
        begun: impl Future<Output = Result<sqlx::Transaction<'static, Any>, Error>>,
    ) -> Result<Transaction, Error> {
        Ok(Transaction(TimedConnection {
            inner: in_time(self.within, begun).await?,
            within: self.within,
        }))
    }
}

impl<'p> Executor<'p> for &'_ Pool {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> Answers<'e>
    where
        'p: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let (inner, within) = self.line();
        collected(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.fetch_many(query).try_collect()).await
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<AnyRow>, Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let (inner, within) = self.line();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.fetch_optional(query)).await
        })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [AnyTypeInfo]) -> BoxFuture<'e, Result<AnyStatement, Error>>
    where
        'p: 'e,
    {
        let (inner, within) = self.line();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.prepare_with(sql, parameters)).await
        })
    }

    // Used by the driver's own macros only.
    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Any>, Error>>
    where
        'p: 'e,
    {
        let (inner, within) = self.line();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.describe(sql)).await
        })
    }
}

/// A transaction.
#[derive(Debug)]
pub(super) struct Transaction(TimedConnection);

impl Transaction {
    /// If this fails, the outcome of the transaction is unknown.
    pub(super) async fn commit(self) -> Result<(), Error> {
        let TimedConnection { inner, within } = self.0;
        in_time(within, inner.commit()).await
    }
}

impl std::ops::Deref for Transaction {
    type Target = TimedConnection;

    fn deref(&self) -> &TimedConnection {
        &self.0
    }
}

impl std::ops::DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut TimedConnection {
        &mut self.0
    }
}

/// A transaction's connection.
#[derive(Debug)]
pub(super) struct TimedConnection {
    inner: sqlx::Transaction<'static, Any>,
    within: Duration,
}

impl<'c> Executor<'c> for &'c mut TimedConnection {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> Answers<'e>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        collected(async move { in_time(self.within, (*self.inner).fetch_many(query).try_collect()).await })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<AnyRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        Box::pin(async move { in_time(self.within, (*self.inner).fetch_optional(query)).await })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [AnyTypeInfo]) -> BoxFuture<'e, Result<AnyStatement, Error>>
    where
        'c: 'e,
    {
        Box::pin(async move { in_time(self.within, (*self.inner).prepare_with(sql, parameters)).await })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Any>, Error>>
    where
        'c: 'e,
    {
        Box::pin(async move { in_time(self.within, (*self.inner).describe(sql)).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that accepts connections and never responds.
    async fn silent() -> (tokio::net::TcpListener, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("postgres://coar@{}/postgres", listener.local_addr().unwrap());
        (listener, address)
    }

    #[tokio::test]
    async fn unanswered_statement_times_out() {
        let never = std::future::pending::<Result<(), Error>>();
        let error = in_time(Duration::from_millis(10), never).await.unwrap_err();
        assert!(crate::RegistryError::from(error).is_transient());
        assert_eq!(in_time(Duration::from_secs(9), async { Ok(7) }).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn half_open_connection_is_dropped() {
        sqlx::any::install_default_drivers();
        let (_listener, address) = silent().await;
        let within = Duration::from_millis(50);
        let inner = sqlx::any::AnyPoolOptions::new()
            .acquire_timeout(within)
            .connect_lazy(&address)
            .unwrap();
        let error = sqlx::query("SELECT 1")
            .execute(&Pool::new(inner, within))
            .await
            .unwrap_err();
        assert!(crate::RegistryError::from(error).is_transient());
    }

    #[tokio::test]
    async fn pool_behaves_like_the_driver() {
        sqlx::any::install_default_drivers();
        let inner = sqlx::any::AnyPoolOptions::new()
            .max_connections(1)
            .connect("sqlite::memory:")
            .await
            .unwrap();
        let pool = Pool::new(inner, Duration::from_secs(9));
        sqlx::query("CREATE TABLE t (a INTEGER)").execute(&pool).await.unwrap();
        for kept in [true, false] {
            let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
            let added = sqlx::query("INSERT INTO t VALUES (1), (2)")
                .execute(&mut *transaction)
                .await
                .unwrap();
            assert_eq!(added.rows_affected(), 2);
            if kept {
                transaction.commit().await.unwrap();
            }
        }
        let all: Vec<(i64,)> = sqlx::query_as("SELECT a FROM t ORDER BY a")
            .fetch_all(&pool)
            .await
            .unwrap();
        assert_eq!(all, [(1,), (2,)]);
        let (first,): (i64,) = sqlx::query_as("SELECT a FROM t LIMIT 1")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(first, 1);
    }
}
