//! The processes that share the database. Each says now and then that it lives; one that has not said so for a while is
//! lost, and what it had taken is free.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, number};
use super::{Backend, Registry, RegistryError};
use coar_core::ids::ProcessId;

/// A process that has not been seen for this long is lost.
pub const LOST_AFTER_MS: i64 = 6_000;

/// Since when, and when last, this process has said that it lives.
#[derive(Debug, Clone, Default)]
pub(super) struct Presence(Arc<Mutex<Option<(Instant, Instant)>>>);

/// Who has been silent for longer was away: a beat before that, and others would seem lost.
const AWAY: Duration = Duration::from_millis(LOST_AFTER_MS as u64 * 3 / 4);

impl Presence {
    fn said(&self) {
        let (mut spoken, at) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let since = match *spoken {
            Some((since, last)) if last.elapsed() < AWAY => since,
            _ => at,
        };
        *spoken = Some((since, at));
    }

    fn settled(&self) -> bool {
        match *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // Not one of the processes that tell: a test, a command.
            None => true,
            Some((since, last)) => {
                last.elapsed() < AWAY && since.elapsed() >= Duration::from_millis(LOST_AFTER_MS as u64)
            }
        }
    }
}

/// What a process tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Announcement {
    /// `all`, `api` or `worker`.
    pub role: &'static str,
    /// Where API processes reach it.
    pub address: Option<String>,
    /// JSON: the base model that it has loaded.
    pub model: Option<String>,
    /// JSON: what it has to do.
    pub load: String,
    /// It takes no new work.
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
    /// Says that this process lives, and how it is.
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
        self.presence.said();
        Ok(())
    }

    /// Whether this process can tell who is lost. Where the database was away nobody has said for a while that they live,
    /// so that whoever comes back first would take everything from the others; it waits until they have had their time.
    pub fn may_judge(&self) -> bool {
        self.backend == Backend::Sqlite || self.presence.settled()
    }

    /// Processes that live, oldest first.
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

    /// A process last seen before that time is lost.
    pub(super) async fn lost_before(&self) -> Result<i64, RegistryError> {
        Ok(self.lease_time().await? - LOST_AFTER_MS)
    }

    /// This process ends, in order: whatever it still had is free at once.
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

    /// Forgets every other process. Only the holder of the data folder's lock may ask: there are none.
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

    /// Forgets processes that were lost long ago; returns how many.
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
    fn whoever_was_away_judges_nobody_for_a_while() {
        let ago = |millis| Instant::now().checked_sub(Duration::from_millis(millis)).unwrap();
        let presence = |since, last| Presence(Arc::new(Mutex::new(Some((ago(since), ago(last))))));
        assert!(Presence::default().settled());
        assert!(presence(7_000, 1_000).settled());
        assert!(!presence(5_000, 1_000).settled(), "it has just come");
        let away = presence(60_000, 5_000);
        assert!(!away.settled(), "it has not spoken for a while");
        away.said();
        assert!(!away.settled(), "it is back, the others may not be");
        let steady = presence(60_000, 1_000);
        steady.said();
        assert!(steady.settled());
    }
}
