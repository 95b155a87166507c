//! Signals between the processes of one database, by PostgreSQL's NOTIFY. They only speed up what polling would find
//! too.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::timeout;

use super::{Registry, RegistryError};

const CHANNEL: &str = "coar";
/// After this long without a signal the connection is probed, and the server has this long to answer.
const QUIET: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(2);

/// A stream of signals.
#[derive(Debug)]
pub struct Signals(PgListener);

impl Signals {
    /// The next signal. A lost connection is re-established; signals sent in between are lost.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn next(&mut self) -> Result<String, RegistryError> {
        loop {
            if let Ok(received) = timeout(QUIET, self.0.recv()).await {
                return Ok(received?.payload().to_owned());
            }
            // No signal for a while: check that the connection is alive.
            let asked = timeout(ANSWER, sqlx::query("SELECT 1").execute(&mut self.0)).await;
            let late = |_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
            asked.map_err(late)??;
        }
    }
}

impl Registry {
    /// Subscribes to the signals of all processes, this one included; `None` on SQLite, where there are no others.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn signals(&self) -> Result<Option<Signals>, RegistryError> {
        let Some(url) = &self.database else { return Ok(None) };
        let mut listener = PgListener::connect(url).await?;
        listener.listen(CHANNEL).await?;
        Ok(Some(Signals(listener)))
    }

    /// Notifies every process; no effect if there is only one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn signal(&self, what: &str) -> Result<(), RegistryError> {
        if self.database.is_some() {
            sqlx::query("SELECT pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(what)
                .execute(&self.pools.writes)
                .await?;
        }
        Ok(())
    }
}
