//! Claiming, starting and ending generations, and recovery after lost processes.

use super::super::db::locking;
use super::super::webhooks::{NewDelivery, insert_delivery};
use super::super::{GenerationStatus, Made, Registry, RegistryError};
use super::{GENERATION_ATTEMPTS, Generation, generation, text};
use coar_core::ids::GenerationId;

impl Registry {
    /// Claims a queued background generation. Order: the tenant with the least running work, then the tenant that
    /// has waited longest; within the tenant the highest priority, then the oldest.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_generation(&self) -> Result<Option<Generation>, RegistryError> {
        let at = self.lease_time().await?;
        // Read first, so that a poll of an empty queue does not take the write lock.
        let any = sqlx::query(
            "SELECT id FROM generations WHERE status = 'queued' AND background = 1 AND owner IS NULL AND not_before <= $1
             LIMIT 1",
        )
        .bind(at)
        .fetch_optional(&self.pools.reads)
        .await?;
        if any.is_none() {
            return Ok(None);
        }
        let mut transaction = self.write().await?;
        let statement = locking!(
            self.backend,
            "WITH busy AS (SELECT tenant_id, count(*) AS n FROM generations
                           WHERE status IN ('queued', 'running') AND owner IS NOT NULL GROUP BY tenant_id),
                  oldest AS (SELECT tenant_id, min(id) AS id FROM generations
                             WHERE status = 'queued' AND owner IS NULL AND not_before <= $1 GROUP BY tenant_id)
             SELECT g.* FROM generations g JOIN oldest ON oldest.tenant_id = g.tenant_id
             LEFT JOIN busy ON busy.tenant_id = g.tenant_id
             WHERE g.status = 'queued' AND g.background = 1 AND g.owner IS NULL AND g.not_before <= $1
             ORDER BY coalesce(busy.n, 0), oldest.id, g.priority DESC, g.id LIMIT 1",
            " FOR UPDATE OF g SKIP LOCKED"
        );
        let row = sqlx::query(statement)
            .bind(at)
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let mut taken = generation(&row)?;
        taken.owner = Some(self.process);
        sqlx::query("UPDATE generations SET owner = $1 WHERE id = $2")
            .bind(self.process.to_string())
            .bind(taken.id.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some(taken))
    }

    /// Generations owned by this process that have not ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn own_generations(&self) -> Result<Vec<Generation>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM generations WHERE owner = $1 AND status IN ('queued', 'running')")
            .bind(self.process.to_string())
            .fetch_all(&self.pools.reads)
            .await?;
        rows.iter().map(generation).collect()
    }

    /// Requeues a generation that was claimed but not started; it can be claimed again after `wait_ms`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn return_generation(&self, id: GenerationId, wait_ms: i64) -> Result<(), RegistryError> {
        sqlx::query(
            "UPDATE generations SET owner = NULL, not_before = $1 WHERE id = $2 AND owner = $3 AND status = 'queued'",
        )
        .bind(self.lease_time().await? + wait_ms)
        .bind(id.to_string())
        .bind(self.process.to_string())
        .execute(&self.pools.writes)
        .await?;
        Ok(())
    }

    /// Stores the progress of the generations that this process runs. Returns those that it no longer owns: ended by
    /// others, deleted, or reclaimed.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn report_drawn(&self, drawn: &[(GenerationId, u32)]) -> Result<Vec<GenerationId>, RegistryError> {
        let mut gone = Vec::new();
        for (id, done) in drawn {
            let changed = sqlx::query(
                "UPDATE generations SET done = $1 WHERE id = $2 AND owner = $3 AND status IN ('queued', 'running')",
            )
            .bind(i64::from(*done))
            .bind(id.to_string())
            .bind(self.process.to_string())
            .execute(&self.pools.writes)
            .await?;
            if changed.rows_affected() == 0 {
                gone.push(*id);
            }
        }
        Ok(gone)
    }

    /// Turns a foreground generation into a background one; false if it has ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keep_generation(&self, id: GenerationId) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        let kept =
            sqlx::query("UPDATE generations SET background = 1 WHERE id = $1 AND status IN ('queued', 'running')")
                .bind(id.to_string())
                .execute(&mut *transaction)
                .await?;
        let kept = kept.rows_affected() > 0;
        if kept {
            self.bind_key(&mut transaction, Made::Generation(id)).await?;
        }
        transaction.commit().await?;
        Ok(kept)
    }

    /// Marks a generation as running, after `attempt` earlier attempts; false if it has ended or another process
    /// owns it. Idempotent: repeating it after a lost answer has no effect.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn begin_generation(&self, id: GenerationId, attempt: u32, at: i64) -> Result<bool, RegistryError> {
        let begun = sqlx::query(
            "UPDATE generations SET status = 'running', attempt = $4 + 1, started_at = $1
             WHERE id = $2 AND owner = $3
             AND ((status = 'queued' AND attempt = $4) OR (status = 'running' AND attempt = $4 + 1))",
        )
        .bind(at)
        .bind(id.to_string())
        .bind(self.process.to_string())
        .bind(i64::from(attempt))
        .execute(&self.pools.writes)
        .await?;
        Ok(begun.rows_affected() > 0)
    }

    /// Stores the end of a generation and its webhook delivery atomically. If `ended` has an owner, only that
    /// owner's attempt may end it. False if it had already ended, was deleted, or has another owner: then nothing is
    /// written.
    ///
    /// # Errors
    /// `LeaseLost` if it succeeds under an idempotency key that another request has claimed since; when the database
    /// fails.
    pub async fn end_generation(
        &self,
        ended: &Generation,
        delivery: Option<&NewDelivery>,
    ) -> Result<bool, RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        let changed = sqlx::query(
            "UPDATE generations SET status = $1, done = $2, usage = $3, error = $4, finished_at = $5
             WHERE id = $6 AND status IN ('queued', 'running') AND ($7 IS NULL OR (owner = $7 AND attempt = $8))",
        )
        .bind(ended.status.as_str())
        .bind(i64::from(ended.done))
        .bind(ended.usage.as_ref().map(text).transpose()?)
        .bind(ended.error.as_ref().map(text).transpose()?)
        .bind(ended.finished_at)
        .bind(ended.id.to_string())
        .bind(ended.owner.map(|id| id.to_string()))
        .bind(i64::from(ended.attempt))
        .execute(&mut *transaction)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(false);
        }
        if ended.status == GenerationStatus::Succeeded {
            self.bind_key_if_open(&mut transaction, Made::Generation(ended.id))
                .await?;
        }
        if let Some(delivery) = delivery {
            insert_delivery(&mut transaction, delivery, at).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// Requeues a running generation as if it had not been started; its images are removed. No effect if the owner's
    /// attempt is no longer current.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn requeue_generation(&self, left: &Generation) -> Result<(), RegistryError> {
        let mut transaction = self.write().await?;
        let changed = sqlx::query(
            "UPDATE generations SET status = 'queued', started_at = NULL, owner = NULL
             WHERE id = $1 AND status IN ('queued', 'running') AND attempt = $2 AND ($3 IS NULL OR owner = $3)",
        )
        .bind(left.id.to_string())
        .bind(i64::from(left.attempt))
        .bind(left.owner.map(|id| id.to_string()))
        .execute(&mut *transaction)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(());
        }
        let blobs: Vec<(String,)> = sqlx::query_as("DELETE FROM images WHERE generation_id = $1 RETURNING blob")
            .bind(left.id.to_string())
            .fetch_all(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await
    }

    /// Recovers generations of dead processes: background ones are requeued unless they have used up their attempts;
    /// the others are returned, to be ended. Does nothing while this process [cannot declare others
    /// dead](Registry::can_declare_dead).
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn left_generations(&self) -> Result<Vec<Generation>, RegistryError> {
        if !self.can_declare_dead() {
            return Ok(vec![]);
        }
        // Running rows without an owner were written by a version that did not record it.
        let rows = sqlx::query(
            "SELECT * FROM generations WHERE status IN ('queued', 'running')
             AND (owner IS NOT NULL OR status = 'running' OR background = 0)
             AND coalesce(owner, '') NOT IN (SELECT id FROM processes WHERE seen_at >= $1) ORDER BY id",
        )
        .bind(self.lost_before().await?)
        .fetch_all(&self.pools.reads)
        .await?;
        let left = rows.iter().map(generation).collect::<Result<_, _>>()?;
        self.queue_again(left).await
    }

    /// Requeues background generations unless they have used up their attempts; returns the others.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn queue_again(&self, all: Vec<Generation>) -> Result<Vec<Generation>, RegistryError> {
        let mut lost = Vec::new();
        for left in all {
            if left.new.background && left.attempt < GENERATION_ATTEMPTS {
                self.requeue_generation(&left).await?;
            } else {
                lost.push(left);
            }
        }
        Ok(lost)
    }
}
