//! Signals between the processes of one database: PostgreSQL's NOTIFY. They only hasten what polling would find too.

use sqlx::postgres::PgListener;

use super::{Registry, RegistryError};

const CHANNEL: &str = "coar";

/// Signals as they arrive.
#[derive(Debug)]
pub struct Signals(PgListener);

impl Signals {
    /// The next one. After a lost connection it is connected anew, and what was said in between is lost.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn next(&mut self) -> Result<String, RegistryError> {
        Ok(self.0.recv().await?.payload().to_owned())
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
                .execute(&self.pool)
                .await?;
        }
        Ok(())
    }
}
