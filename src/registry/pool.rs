//! Connections on which every statement has its time. A connection whose other end is gone without a word would be waited
//! for for ever: neither PostgreSQL's protocol nor the driver has a limit of its own.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use sqlx::any::{Any, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo};
use sqlx::{AnyPool, Connection as _, Either, Error, Execute, Executor, SqlStr};

type Answers<'e> = BoxStream<'e, Result<Either<AnyQueryResult, AnyRow>, Error>>;

/// What does not come in time has failed as a broken connection does; whoever has patience tries again.
async fn in_time<T>(within: Duration, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(within, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer within {} s", within.as_secs()),
        ))),
    }
}

/// All answers of a statement, once they are there. Nothing that the registry reads is too long for that.
fn collected<'e, T: Send + 'e>(
    all: impl Future<Output = Result<Vec<T>, Error>> + Send + 'e,
) -> BoxStream<'e, Result<T, Error>> {
    stream::once(all)
        .map_ok(|all| stream::iter(all.into_iter().map(Ok)))
        .try_flatten()
        .boxed()
}

/// Whether a connection still answers; asked when it is taken and when it is given back.
pub(super) async fn answers(connection: &mut sqlx::AnyConnection, within: Duration) -> bool {
    matches!(tokio::time::timeout(within, connection.ping()).await, Ok(Ok(())))
}

/// A pool of connections.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    inner: AnyPool,
    within: Duration,
}

impl Pool {
    /// Statements on it fail after `within`.
    pub(super) fn new(inner: AnyPool, within: Duration) -> Self {
        Self { inner, within }
    }

    /// Begins a transaction; dropping it rolls it back.
    pub(super) async fn begin(&self) -> Result<Transaction, Error> {
        self.begun(self.inner.begin()).await
    }

    /// The same with a statement of the caller's choice.
    pub(super) async fn begin_with(&self, statement: &'static str) -> Result<Transaction, Error> {
        self.begun(self.inner.begin_with(statement)).await
    }

    async fn begun(
        &self,
        begun: impl Future<Output = Result<sqlx::Transaction<'static, Any>, Error>>,
    ) -> Result<Transaction, Error> {
        Ok(Transaction(Line {
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
        let Pool { inner, within } = self.clone();
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
        let Pool { inner, within } = self.clone();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.fetch_optional(query)).await
        })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [AnyTypeInfo]) -> BoxFuture<'e, Result<AnyStatement, Error>>
    where
        'p: 'e,
    {
        let Pool { inner, within } = self.clone();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.prepare_with(sql, parameters)).await
        })
    }

    // Only the driver's own macros ask.
    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Any>, Error>>
    where
        'p: 'e,
    {
        let Pool { inner, within } = self.clone();
        Box::pin(async move {
            let mut connection = inner.acquire().await?;
            in_time(within, connection.describe(sql)).await
        })
    }
}

/// A transaction.
#[derive(Debug)]
pub(super) struct Transaction(Line);

impl Transaction {
    /// Whether it took place is unknown where this fails.
    pub(super) async fn commit(self) -> Result<(), Error> {
        let Line { inner, within } = self.0;
        in_time(within, inner.commit()).await
    }
}

impl std::ops::Deref for Transaction {
    type Target = Line;

    fn deref(&self) -> &Line {
        &self.0
    }
}

impl std::ops::DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut Line {
        &mut self.0
    }
}

/// A transaction's connection.
#[derive(Debug)]
pub(super) struct Line {
    inner: sqlx::Transaction<'static, Any>,
    within: Duration,
}

impl<'c> Executor<'c> for &'c mut Line {
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
