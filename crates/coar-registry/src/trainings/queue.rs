//! The queue of trainings. Only the holder of a training's lease may write to it.

use sqlx::Row;
use uuid::Uuid;

use super::super::db::locking;
use super::super::pool::Transaction;
use super::super::{Registry, RegistryError, TrainingStatus};
use super::{ATTEMPTS, Claimed, Progress, TAKEOVER_MS, TAKEOVERS, training};
use coar_core::engine::ConceptTokens;
use coar_core::ids::{ConceptId, TrainingId};
use coar_core::training::StepLosses;

/// Back-off after the first failed attempt; each further one waits four times as long.
const BACK_OFF_MS: i64 = 2_000;

/// Requeues trainings whose worker is dead. $1 is the time, $2 is [`TAKEOVER_MS`].
macro_rules! take_over {
    ($where:literal) => {
        concat!(
            "UPDATE trainings SET status = 'queued', lease_token = NULL, lease_until = NULL,
             takeovers = takeovers + CASE WHEN takeover_at <= $1 - $2 THEN 1 ELSE 0 END,
             takeover_at = CASE WHEN takeover_at <= $1 - $2 THEN $1 ELSE takeover_at END ",
            $where
        )
    };
}

/// A fenced write changed no row: the lease was lost.
fn fenced(changed: u64) -> Result<(), RegistryError> {
    if changed == 1 {
        Ok(())
    } else {
        Err(RegistryError::LeaseLost)
    }
}

impl Registry {
    /// Locks a concept, its versions and trainings until the transaction ends. False if it was deleted.
    pub(in super::super) async fn hold_concept(
        &self,
        transaction: &mut Transaction,
        id: ConceptId,
    ) -> Result<bool, RegistryError> {
        let statement = locking!(self.backend, "SELECT id FROM concepts WHERE id = $1", " FOR UPDATE");
        let found = sqlx::query(statement)
            .bind(id.to_string())
            .fetch_optional(&mut **transaction)
            .await?;
        Ok(found.is_some())
    }

    /// The blob of a training's checkpoint, if it has one; the row is locked until the transaction ends.
    pub(super) async fn checkpoint_of(
        &self,
        transaction: &mut Transaction,
        id: TrainingId,
    ) -> Result<Vec<String>, RegistryError> {
        let statement = locking!(
            self.backend,
            "SELECT checkpoint FROM trainings WHERE id = $1",
            " FOR UPDATE"
        );
        let row: Option<(Option<String>,)> = sqlx::query_as(statement)
            .bind(id.to_string())
            .fetch_optional(&mut **transaction)
            .await?;
        Ok(row.and_then(|(blob,)| blob).into_iter().collect())
    }

    /// Number of trainings per status.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn training_counts(&self) -> Result<Vec<(TrainingStatus, i64)>, RegistryError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT status, count(*) FROM trainings GROUP BY status")
            .fetch_all(&self.pools.reads)
            .await?;
        let counts = |status: TrainingStatus| {
            let row = rows.iter().find(|(word, _)| word == status.as_str());
            (status, row.map_or(0, |(_, count)| *count))
        };
        Ok(TrainingStatus::ALL.map(counts).to_vec())
    }

    /// Requeues every running training of an earlier process. Only the owner of the data folder's lock may call it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_all(&self) -> Result<u64, RegistryError> {
        let released = sqlx::query(take_over!("WHERE status = 'running'"))
            .bind(self.lease_time().await?)
            .bind(TAKEOVER_MS)
            .execute(&self.pools.writes)
            .await?;
        Ok(released.rows_affected())
    }

    /// Requeues trainings whose leases have expired. Does nothing while this process [cannot declare others
    /// dead](Registry::can_declare_dead).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_lost(&self) -> Result<u64, RegistryError> {
        if !self.can_declare_dead() {
            return Ok(0);
        }
        let released = sqlx::query(take_over!("WHERE status = 'running' AND lease_until < $1"))
            .bind(self.lease_time().await?)
            .bind(TAKEOVER_MS)
            .execute(&self.pools.writes)
            .await?;
        Ok(released.rows_affected())
    }

    /// Claims a queued training, or one whose lease has expired. Order: the tenant with the fewest running, then the
    /// tenant served longest ago; within the tenant the highest priority, then the oldest; interrupted trainings
    /// come first. A training that has lost too many leases fails instead: see [`TAKEOVERS`]. Expired leases are
    /// skipped while this process [cannot declare others dead](Registry::can_declare_dead).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_training(&self, lease_ms: i64) -> Result<Option<Claimed>, RegistryError> {
        loop {
            let (lease, at) = (Uuid::new_v4().to_string(), self.lease_time().await?);
            let lost_before = if self.can_declare_dead() { at } else { i64::MIN };
            // Read first, so that an idle poll does not take the write lock.
            let any = sqlx::query(
                "SELECT id FROM trainings WHERE (status = 'queued' AND not_before <= $1)
                 OR (status = 'running' AND lease_until < $2) LIMIT 1",
            )
            .bind(at)
            .bind(lost_before)
            .fetch_optional(&self.pools.reads)
            .await?;
            if any.is_none() {
                return Ok(None);
            }
            let mut transaction = self.write().await?;
            let statement = locking!(
                self.backend,
                "SELECT t.id, CASE WHEN t.status = 'running' AND t.takeover_at <= $3 THEN 1 ELSE 0 END AS lost, t.takeovers
                 FROM trainings t
                 WHERE (t.status = 'queued' AND t.not_before <= $1) OR (t.status = 'running' AND t.lease_until < $2)
                 ORDER BY (SELECT count(*) FROM trainings r
                           WHERE r.tenant_id = t.tenant_id AND r.status = 'running' AND r.lease_until >= $1),
                          t.started_at IS NULL,
                          (SELECT coalesce(max(r.started_at), 0) FROM trainings r WHERE r.tenant_id = t.tenant_id),
                          t.priority DESC, t.created_at, t.id LIMIT 1",
                " FOR UPDATE OF t SKIP LOCKED"
            );
            let found = sqlx::query(statement)
                .bind(at)
                .bind(lost_before)
                .bind(at - TAKEOVER_MS)
                .fetch_optional(&mut *transaction)
                .await?;
            let Some(found) = found else { return Ok(None) };
            let id: String = found.try_get("id")?;
            let lost: i64 = found.try_get("lost")?;
            let takeovers = found.try_get::<i64, _>("takeovers")? + lost;
            if takeovers > i64::from(TAKEOVERS) {
                let error = serde_json::json!({
                    "code": "interrupted",
                    "message": format!("The worker was lost {TAKEOVERS} times in a row during this training."),
                    "field": null,
                });
                sqlx::query(
                    "UPDATE trainings SET status = 'failed', error = $1, finished_at = $2, takeovers = $3,
                     lease_token = NULL, lease_until = NULL WHERE id = $4",
                )
                .bind(error.to_string())
                .bind(at)
                .bind(takeovers)
                .bind(&id)
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                continue;
            }
            sqlx::query(
                "UPDATE trainings SET status = 'running', lease_token = $1, lease_until = $2, attempt = attempt + 1,
                 resumed_from_step = coalesce(checkpoint_step, 0), step = coalesce(checkpoint_step, 0),
                 steps_per_second = NULL, started_at = coalesce(started_at, $3), takeovers = $4, worker = $5,
                 takeover_at = CASE WHEN $6 = 1 THEN $3 ELSE takeover_at END WHERE id = $7",
            )
            .bind(&lease)
            .bind(at + lease_ms)
            .bind(at)
            .bind(takeovers)
            .bind(self.process.to_string())
            .bind(lost)
            .bind(&id)
            .execute(&mut *transaction)
            .await?;
            let row = sqlx::query(select!("WHERE t.id = $1"))
                .bind(&id)
                .fetch_one(&mut *transaction)
                .await?;
            let training = training(&row)?;
            transaction.commit().await?;
            return Ok(Some(Claimed { training, lease }));
        }
    }

    /// Renews the lease and stores the progress.
    ///
    /// # Errors
    /// `LeaseLost` when the training was cancelled, deleted or taken over.
    pub async fn report_progress(
        &self,
        claimed: &Claimed,
        lease_ms: i64,
        progress: Option<Progress>,
    ) -> Result<(), RegistryError> {
        let changed = sqlx::query(
            "UPDATE trainings SET lease_until = $1, step = CASE WHEN $2 < 0 THEN step ELSE $2 END,
             loss = CASE WHEN $2 < 0 THEN loss ELSE $3 END,
             steps_per_second = CASE WHEN $4 < 0.0 THEN steps_per_second ELSE $4 END
             WHERE id = $5 AND lease_token = $6 AND status = 'running'",
        )
        .bind(self.lease_time().await? + lease_ms)
        // None of the parameters is NULL: the driver declares a NULL double with half its size, and the server keeps
        // the declaration of a connection's first call.
        .bind(progress.map_or(-1, |p| i64::from(p.step)))
        .bind(progress.map_or(0.0, |p| p.loss))
        .bind(progress.and_then(|p| p.steps_per_second).unwrap_or(-1.0))
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pools.writes)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Stores the loss curve.
    ///
    /// # Errors
    /// `LeaseLost` when the lease is no longer held.
    pub async fn record_losses(&self, claimed: &Claimed, losses: &[StepLosses]) -> Result<(), RegistryError> {
        let text = serde_json::to_string(losses).map_err(|error| RegistryError::Row(error.to_string()))?;
        let changed =
            sqlx::query("UPDATE trainings SET losses = $1 WHERE id = $2 AND lease_token = $3 AND status = 'running'")
                .bind(text)
                .bind(claimed.training.id.to_string())
                .bind(&claimed.lease)
                .execute(&self.pools.writes)
                .await?;
        fenced(changed.rows_affected())
    }

    /// Stores a checkpoint and removes the previous one.
    ///
    /// # Errors
    /// `LeaseLost` when the lease is no longer held; the new blob is removed then.
    pub async fn record_checkpoint(
        &self,
        claimed: &Claimed,
        step: u32,
        checkpoint: bytes::Bytes,
    ) -> Result<(), RegistryError> {
        let stored = self.store(vec![checkpoint]).await?;
        let recorded = self.replace_checkpoint(claimed, step, stored.first()).await;
        self.settle(stored, recorded.is_ok()).await;
        self.remove_unreferenced(&recorded?).await
    }

    /// The blobs that are no longer needed.
    async fn replace_checkpoint(&self, claimed: &Claimed, step: u32, blob: &str) -> Result<Vec<String>, RegistryError> {
        let mut transaction = self.write().await?;
        let before = self.checkpoint_of(&mut transaction, claimed.training.id).await?;
        let changed = sqlx::query(
            "UPDATE trainings SET checkpoint = $1, checkpoint_step = $2, takeovers = 0
             WHERE id = $3 AND lease_token = $4 AND status = 'running'",
        )
        .bind(blob)
        .bind(i64::from(step))
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&mut *transaction)
        .await?;
        fenced(changed.rows_affected())?;
        transaction.commit().await?;
        Ok(before.into_iter().filter(|hash| hash != blob).collect())
    }

    /// Publishes a concept file as the concept's next version, activates it, and ends the training, atomically. Returns
    /// the version's number.
    ///
    /// # Errors
    /// `LeaseLost` when the lease is no longer held; the file is removed then.
    pub async fn succeed(
        &self,
        claimed: &Claimed,
        (file, tokens): (bytes::Bytes, ConceptTokens),
        report: &serde_json::Value,
    ) -> Result<i64, RegistryError> {
        let stored = self.store(vec![file]).await?;
        let published = self.publish(claimed, (stored.first(), tokens), report).await;
        self.settle(stored, published.is_ok()).await;
        let (unneeded, version) = published?;
        self.remove_unreferenced(&unneeded).await?;
        Ok(version)
    }

    /// The blobs that are no longer needed, and the version's number.
    async fn publish(
        &self,
        claimed: &Claimed,
        (version, tokens): (&str, ConceptTokens),
        report: &serde_json::Value,
    ) -> Result<(Vec<String>, i64), RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        if !self.hold_concept(&mut transaction, claimed.training.concept_id).await? {
            return Err(RegistryError::LeaseLost);
        }
        let before = self.checkpoint_of(&mut transaction, claimed.training.id).await?;
        let (number,): (i64,) =
            sqlx::query_as("SELECT coalesce(max(number), 0) + 1 FROM concept_versions WHERE concept_id = $1")
                .bind(claimed.training.concept_id.to_string())
                .fetch_one(&mut *transaction)
                .await?;
        let changed = sqlx::query(
            "UPDATE trainings SET status = 'succeeded', step = total_steps, report = $1, finished_at = $2, version = $3,
             checkpoint = NULL, checkpoint_step = NULL, lease_token = NULL, lease_until = NULL, error = NULL
             WHERE id = $4 AND lease_token = $5 AND status = 'running'",
        )
        .bind(report.to_string())
        .bind(at)
        .bind(number)
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&mut *transaction)
        .await?;
        fenced(changed.rows_affected())?;
        sqlx::query(
            "INSERT INTO concept_versions (concept_id, number, hash, training_id, input_fingerprint, created_at,
             text_tokens, image_tokens) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(claimed.training.concept_id.to_string())
        .bind(number)
        .bind(version)
        .bind(claimed.training.id.to_string())
        .bind(&claimed.training.input_fingerprint)
        .bind(at)
        .bind(i64::from(tokens.text))
        .bind(i64::from(tokens.image))
        .execute(&mut *transaction)
        .await?;
        sqlx::query("UPDATE concepts SET version = $1, version_number = $2, updated_at = $3 WHERE id = $4")
            .bind(version)
            .bind(number)
            .bind(at)
            .bind(claimed.training.concept_id.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok((before, number))
    }

    /// Ends the training with an error, or requeues it with a delay if a retry may help.
    ///
    /// # Errors
    /// `LeaseLost` when the lease is no longer held.
    pub async fn fail(&self, claimed: &Claimed, error: &serde_json::Value, retry: bool) -> Result<(), RegistryError> {
        let wait = BACK_OFF_MS << (2 * claimed.training.attempt.saturating_sub(1)).min(10);
        // One less than the maximum: the next attempt is the last.
        let retryable = if retry { i64::from(ATTEMPTS) - 1 } else { 0 };
        let changed = sqlx::query(
            "UPDATE trainings SET failures = failures + 1, error = $1, not_before = $2, lease_token = NULL,
             lease_until = NULL, status = CASE WHEN failures < $3 THEN 'queued' ELSE 'failed' END,
             finished_at = CASE WHEN failures < $3 THEN NULL ELSE $4 END
             WHERE id = $5 AND lease_token = $6 AND status = 'running'",
        )
        .bind(error.to_string())
        .bind(self.lease_time().await? + wait)
        .bind(retryable)
        .bind(self.lease_time().await?)
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pools.writes)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Requeues an unfinished training without counting a failure: its worker is stopping.
    ///
    /// # Errors
    /// `LeaseLost` when the lease is no longer held.
    pub async fn release(&self, claimed: &Claimed) -> Result<(), RegistryError> {
        let changed = sqlx::query(
            "UPDATE trainings SET status = 'queued', attempt = attempt - 1, lease_token = NULL, lease_until = NULL
             WHERE id = $1 AND lease_token = $2 AND status = 'running'",
        )
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pools.writes)
        .await?;
        fenced(changed.rows_affected())
    }
}
