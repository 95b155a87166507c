//! The processes that share the database. Each sends heartbeats; one without a heartbeat for a while is declared
//! dead, and what it owned can be claimed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, number};
use super::{Backend, Registry, RegistryError};
use coar_core::ids::ProcessId;

/// A process without a heartbeat for this long is declared dead.
pub const LOST_AFTER_MS: i64 = 6_000;

/// Time of this process's first and last heartbeat.
#[derive(Debug, Clone, Default)]
pub(super) struct Presence(Arc<Mutex<Option<(Instant, Instant)>>>);

/// A longer gap between heartbeats means that this process or the database was unavailable. It is less than
/// [`LOST_AFTER_MS`], since the heartbeats of the others are as old by then.
const AWAY: Duration = Duration::from_millis(LOST_AFTER_MS as u64 * 3 / 4);

impl Presence {
    fn heartbeat_sent(&self) {
        let (mut sent, at) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let since = match *sent {
            Some((since, last)) if last.elapsed() < AWAY => since,
            _ => at,
        };
        *sent = Some((since, at));
    }

    fn settled(&self) -> bool {
        match *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // Not a process that sends heartbeats, but a test or a command.
            None => true,
            Some((since, last)) => {
                last.elapsed() < AWAY && since.elapsed() >= Duration::from_millis(LOST_AFTER_MS as u64)
            }
        }
    }
}

/// The content of a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Announcement {
    /// `all`, `api` or `worker`.
    pub role: &'static str,
    /// The address at which API processes reach it.
    pub address: Option<String>,
    /// JSON: the base model that it has loaded.
    pub model: Option<String>,
    /// JSON: its load.
    pub load: String,
    /// It accepts no new work.
    pub draining: bool,
}

/// A process as the others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub id: ProcessId,
    pub role: String,
    pub version: String,
    pub address: Option<String>,
    pub model: Option<String>,
    pub load: String,
    pub draining: bool,
    pub started_at: i64,
    pub seen_at: i64,
}

fn process(row: &AnyRow) -> Result<Process, RegistryError> {
    Ok(Process {
        id: identifier(row, "id")?,
        role: row.try_get("role")?,
        version: row.try_get("version")?,
        address: row.try_get("address")?,
        model: row.try_get("model")?,
        load: row.try_get("load")?,
        draining: number::<i64>(row, "draining")? != 0,
        started_at: row.try_get("started_at")?,
        seen_at: row.try_get("seen_at")?,
    })
}

impl Registry {
    /// Stores this process's heartbeat.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn announce(&self, how: &Announcement) -> Result<(), RegistryError> {
        sqlx::query(
            "INSERT INTO processes (id, role, version, address, model, load, draining, started_at, seen_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
             ON CONFLICT (id) DO UPDATE SET address = excluded.address, model = excluded.model, load = excluded.load,
             draining = excluded.draining, seen_at = excluded.seen_at",
        )
        .bind(self.process.to_string())
        .bind(how.role)
        .bind(env!("CARGO_PKG_VERSION"))
        .bind(&how.address)
        .bind(&how.model)
        .bind(&how.load)
        .bind(i64::from(how.draining))
        .bind(self.lease_time().await?)
        .execute(&self.pools.writes)
        .await?;
        self.presence.heartbeat_sent();
        Ok(())
    }

    /// Whether this process may declare others dead. After an outage of the database no process has a recent
    /// heartbeat, and the first one back would take over everything; it waits until the others could have sent one.
    pub fn can_declare_dead(&self) -> bool {
        self.backend == Backend::Sqlite || self.presence.settled()
    }

    /// Live processes, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn processes(&self) -> Result<Vec<Process>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM processes WHERE seen_at >= $1 ORDER BY id")
            .bind(self.lost_before().await?)
            .fetch_all(&self.pools.reads)
            .await?;
        rows.iter().map(process).collect()
    }

    /// The time before which a process's last heartbeat means that it is dead.
    pub(super) async fn lost_before(&self) -> Result<i64, RegistryError> {
        Ok(self.lease_time().await? - LOST_AFTER_MS)
    }

    /// Deregisters this process: everything it still owned can be claimed at once.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn leave(&self) -> Result<(), RegistryError> {
        sqlx::query("DELETE FROM processes WHERE id = $1")
            .bind(self.process.to_string())
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Removes all other processes. Only the owner of the data folder's lock may call it: no other process is alive.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_processes(&self) -> Result<(), RegistryError> {
        sqlx::query("DELETE FROM processes WHERE id <> $1")
            .bind(self.process.to_string())
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Removes processes that died long ago; returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn expire_processes(&self, age: std::time::Duration) -> Result<u64, RegistryError> {
        let before = self.lease_time().await? - i64::try_from(age.as_millis()).unwrap_or(i64::MAX / 2);
        let gone = sqlx::query("DELETE FROM processes WHERE seen_at < $1")
            .bind(before)
            .execute(&self.pools.writes)
            .await?;
        Ok(gone.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_process_is_declared_dead_after_an_outage() {
        let ago = |millis| Instant::now().checked_sub(Duration::from_millis(millis)).unwrap();
        let presence = |since, last| Presence(Arc::new(Mutex::new(Some((ago(since), ago(last))))));
        assert!(Presence::default().settled());
        assert!(presence(7_000, 1_000).settled());
        assert!(!presence(5_000, 1_000).settled(), "it has just started");
        let away = presence(60_000, 5_000);
        assert!(!away.settled(), "it has sent no heartbeat for a while");
        away.heartbeat_sent();
        assert!(!away.settled(), "it is back, the others may not be");
        let steady = presence(60_000, 1_000);
        steady.heartbeat_sent();
        assert!(steady.settled());
    }
}
