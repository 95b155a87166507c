//! Signals between the processes of one database: PostgreSQL's NOTIFY. They only hasten what polling would find too.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::timeout;

use super::{Registry, RegistryError};

const CHANNEL: &str = "coar";
/// After so long without a signal the server is asked whether it is there, and has so long to answer.
const QUIET: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(2);

/// Signals as they arrive.
#[derive(Debug)]
pub struct Signals(PgListener);

impl Signals {
    /// The next one. After a lost connection it is connected anew, and what was said in between is lost.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn next(&mut self) -> Result<String, RegistryError> {
        loop {
            if let Ok(heard) = timeout(QUIET, self.0.recv()).await {
                return Ok(heard?.payload().to_owned());
            }
            // Nobody has said anything for a while: or is the other end gone?
            let asked = timeout(ANSWER, sqlx::query("SELECT 1").execute(&mut self.0)).await;
            let late = |_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
            asked.map_err(late)??;
        }
    }
}

impl Registry {
    /// Signals of other processes and of this one; `None` where there are no others.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn signals(&self) -> Result<Option<Signals>, RegistryError> {
        let Some(url) = &self.database else { return Ok(None) };
        let mut listener = PgListener::connect(url).await?;
        listener.listen(CHANNEL).await?;
        Ok(Some(Signals(listener)))
    }

    /// Tells every process; without effect where there is only one.
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
