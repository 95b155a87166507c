//! Trainings: settings, status and progress. Their queue is in `queue`.

use sqlx::Row;
use sqlx::any::AnyRow;

use super::concepts::Concept;
use super::db::{identifier, list, number, optional_number, places};
use super::pool::Transaction;
use super::{Listed, Made, Page, Queue, Quotas, Registry, RegistryError, TrainingStatus, Usage, now};
use coar_core::ids::{ConceptId, TenantId, TrainingId};
use coar_core::training::{StepLosses, TrainingSpec};

/// One training.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    pub id: TrainingId,
    pub tenant: TenantId,
    pub concept_id: ConceptId,
    /// The concept's current name.
    pub concept: String,
    pub status: TrainingStatus,
    pub spec: TrainingSpec,
    /// Hash over images and settings; `None` if it was stored by an older version.
    pub input_fingerprint: Option<String>,
    /// Number of the version that it created.
    pub version: Option<u32>,
    pub webhook_url: Option<String>,
    pub step: u32,
    pub total_steps: u32,
    pub loss: Option<f64>,
    pub steps_per_second: Option<f64>,
    /// JSON: code, message, field.
    pub error: Option<serde_json::Value>,
    /// JSON: seconds of the last attempt; from older versions the loss curve too.
    pub report: Option<serde_json::Value>,
    /// Steps with a preview image.
    pub previews: Vec<u32>,
    /// Blob of the newest checkpoint.
    pub checkpoint: Option<String>,
    /// The step of that checkpoint.
    pub checkpoint_step: Option<u32>,
    pub resumed_from_step: u32,
    pub attempt: u32,
    /// Priority among the tenant's own; higher runs first.
    pub priority: i32,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// A training and the lease that permits writing to it.
#[derive(Debug, Clone)]
pub struct Claimed {
    pub training: Training,
    pub lease: String,
}

/// Progress of a training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    pub step: u32,
    pub loss: f64,
    /// Average of the last steps; `None` if there are too few.
    pub steps_per_second: Option<f64>,
}

/// Filter for trainings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainingFilter {
    pub concept: Option<ConceptId>,
    pub status: Option<TrainingStatus>,
}

/// Maximum number of attempts of a training that fails.
pub const ATTEMPTS: u32 = 3;
/// A training whose lease expires more often than this without a checkpoint in between fails: it crashes its
/// workers. Counted at most once in [`TAKEOVER_MS`].
pub const TAKEOVERS: u32 = 5;
/// A series of external kills counts as one event: within this time a training had no chance to run and cannot be the
/// cause. One that does crash its workers still fails some minutes later.
pub(super) const TAKEOVER_MS: i64 = 60_000;

/// Adds a training to a tenant's usage.
const ANOTHER: Usage = Usage {
    concepts: 0,
    trainings: 1,
    bytes: 0,
};

/// Every column of a [`Training`]; the loss curve is large and read separately.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT t.id, t.tenant_id, t.concept_id, t.status, t.spec, t.input_fingerprint, t.version, t.webhook_url,
             t.step, t.total_steps, t.loss, t.steps_per_second, t.error, t.report, t.checkpoint, t.checkpoint_step,
             t.resumed_from_step, t.attempt, t.priority, t.created_at, t.started_at, t.finished_at,
             (SELECT name FROM concepts c WHERE c.id = t.concept_id) AS concept,
             (SELECT string_agg(CAST(p.step AS TEXT), ',' ORDER BY p.step) FROM training_previews p WHERE p.training_id = t.id)
             AS previews FROM trainings t ",
            $rest
        )
    };
}

/// Input of a new training.
#[derive(Debug, Clone, Copy)]
pub struct NewTraining<'a> {
    pub spec: &'a TrainingSpec,
    /// See [`super::input_fingerprint`].
    pub input: &'a str,
    pub webhook_url: Option<&'a str>,
    pub priority: i32,
    /// The tenant's quotas.
    pub quotas: Quotas,
}

pub(super) async fn insert_training(
    transaction: &mut Transaction,
    concept: &Concept,
    new: NewTraining<'_>,
) -> Result<Training, RegistryError> {
    let NewTraining {
        spec,
        input,
        webhook_url,
        priority,
        quotas: _,
    } = new;
    let (id, created_at) = (TrainingId::new(), now());
    sqlx::query(
        "INSERT INTO trainings (id, tenant_id, concept_id, status, spec, input_fingerprint, total_steps, created_at,
         webhook_url, priority) VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7, $8, $9)",
    )
    .bind(id.to_string())
    .bind(concept.tenant.to_string())
    .bind(concept.id.to_string())
    .bind(serde_json::to_string(spec).map_err(|error| RegistryError::Row(error.to_string()))?)
    .bind(input)
    .bind(i64::from(spec.steps))
    .bind(created_at)
    .bind(webhook_url)
    .bind(i64::from(priority))
    .execute(&mut **transaction)
    .await?;
    Ok(Training {
        id,
        tenant: concept.tenant,
        concept_id: concept.id,
        concept: concept.name.clone(),
        status: TrainingStatus::Queued,
        spec: spec.clone(),
        input_fingerprint: Some(input.to_owned()),
        version: None,
        webhook_url: webhook_url.map(str::to_owned),
        step: 0,
        total_steps: spec.steps,
        loss: None,
        steps_per_second: None,
        error: None,
        report: None,
        previews: vec![],
        checkpoint: None,
        checkpoint_step: None,
        resumed_from_step: 0,
        attempt: 0,
        priority,
        created_at,
        started_at: None,
        finished_at: None,
    })
}

fn json_column(row: &AnyRow, column: &str) -> Result<Option<serde_json::Value>, RegistryError> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| RegistryError::Row(error.to_string())))
        .transpose()
}

fn training(row: &AnyRow) -> Result<Training, RegistryError> {
    let text = |column: &str| row.try_get::<String, _>(column).map_err(RegistryError::from);
    Ok(Training {
        id: identifier(row, "id")?,
        tenant: identifier(row, "tenant_id")?,
        concept_id: identifier(row, "concept_id")?,
        concept: text("concept")?,
        status: text("status")?.parse().map_err(RegistryError::Row)?,
        spec: serde_json::from_str(&text("spec")?).map_err(|error| RegistryError::Row(error.to_string()))?,
        input_fingerprint: row.try_get("input_fingerprint")?,
        version: optional_number(row, "version")?,
        webhook_url: row.try_get("webhook_url")?,
        step: number(row, "step")?,
        total_steps: number(row, "total_steps")?,
        loss: row.try_get("loss")?,
        steps_per_second: row.try_get("steps_per_second")?,
        error: json_column(row, "error")?,
        report: json_column(row, "report")?,
        previews: list(row, "previews")?,
        checkpoint: row.try_get("checkpoint")?,
        checkpoint_step: optional_number(row, "checkpoint_step")?,
        resumed_from_step: number(row, "resumed_from_step")?,
        attempt: number(row, "attempt")?,
        priority: number(row, "priority")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

impl Registry {
    /// Trainings that have ended within the last `age` and whose webhook has not been queued.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn undelivered_trainings(&self, age: std::time::Duration) -> Result<Vec<Training>, RegistryError> {
        let since = self
            .lease_time()
            .await?
            .saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let rows = sqlx::query(select!(
            "WHERE t.webhook_url IS NOT NULL AND t.finished_at >= $1 AND t.status IN ('succeeded', 'failed', 'cancelled')
             AND NOT EXISTS (SELECT 1 FROM webhook_deliveries d WHERE d.subject = t.id AND d.event = 'training.' || t.status
                             AND d.created_at >= t.finished_at) ORDER BY t.finished_at LIMIT 100"
        ))
        .bind(since)
        .fetch_all(&self.pools.reads)
        .await?;
        rows.iter().map(training).collect()
    }

    /// A tenant's training by its identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn training(&self, tenant: TenantId, id: TrainingId) -> Result<Option<Training>, RegistryError> {
        let row = sqlx::query(select!("WHERE t.tenant_id = $1 AND t.id = $2"))
            .bind(tenant.to_string())
            .bind(id.to_string())
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(training).transpose()
    }

    /// A tenant's trainings, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn trainings(
        &self,
        tenant: TenantId,
        filter: TrainingFilter,
        page: Page<TrainingId>,
    ) -> Result<Listed<Training>, RegistryError> {
        let rows = sqlx::query(select!(
            "WHERE t.tenant_id = $1 AND t.id < $2 AND ($3 IS NULL OR t.concept_id = $3) AND ($4 IS NULL OR t.status = $4)
             ORDER BY t.id DESC LIMIT $5"
        ))
        .bind(tenant.to_string())
        .bind(page.after())
        .bind(filter.concept.map(|id| id.to_string()))
        .bind(filter.status.map(TrainingStatus::as_str))
        .bind(page.fetched())
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(page.cut(rows.iter().map(training).collect::<Result<_, _>>()?))
    }

    /// The newest training of each of a tenant's concepts that has one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn latest_trainings(
        &self,
        tenant: TenantId,
        concepts: &[ConceptId],
    ) -> Result<Vec<Training>, RegistryError> {
        if concepts.is_empty() {
            return Ok(vec![]);
        }
        let statement = format!(
            "{} (SELECT max(id) FROM trainings WHERE concept_id IN ({}) GROUP BY concept_id)",
            select!("WHERE t.tenant_id = $1 AND t.id IN"),
            places(2, concepts.len())
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(tenant.to_string());
        for concept in concepts {
            query = query.bind(concept.to_string());
        }
        let rows = query.fetch_all(&self.pools.reads).await?;
        rows.iter().map(training).collect()
    }

    /// The stored loss curve of a tenant's training, in the order of steps.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn losses(&self, tenant: TenantId, id: TrainingId) -> Result<Vec<StepLosses>, RegistryError> {
        let row: Option<(Option<String>, Option<String>)> =
            sqlx::query_as("SELECT losses, report FROM trainings WHERE tenant_id = $1 AND id = $2")
                .bind(tenant.to_string())
                .bind(id.to_string())
                .fetch_optional(&self.pools.reads)
                .await?;
        let unreadable = |error: serde_json::Error| RegistryError::Row(error.to_string());
        match row {
            Some((Some(losses), _)) => serde_json::from_str(&losses).map_err(unreadable),
            // Older versions stored it in the report.
            Some((None, Some(report))) => {
                let mut report: serde_json::Value = serde_json::from_str(&report).map_err(unreadable)?;
                match report.get_mut("losses") {
                    Some(losses) => serde_json::from_value(losses.take()).map_err(unreadable),
                    None => Ok(vec![]),
                }
            }
            _ => Ok(vec![]),
        }
    }

    /// Queues another training of a concept; `None` if the concept was deleted.
    ///
    /// # Errors
    /// `ConceptBusy` while one is queued or running; `QuotaExceeded`; when the database fails.
    pub async fn add_training(
        &self,
        concept: &Concept,
        new: NewTraining<'_>,
    ) -> Result<Option<Training>, RegistryError> {
        let mut transaction = self.write().await?;
        self.check_quota(&mut transaction, concept.tenant, new.quotas, ANOTHER)
            .await?;
        self.check_queue_in(&mut *transaction, Queue::Trainings, concept.tenant)
            .await?;
        if !self.hold_concept(&mut transaction, concept.id).await? {
            return Ok(None);
        }
        let (busy,): (i64,) =
            sqlx::query_as("SELECT count(*) FROM trainings WHERE concept_id = $1 AND status IN ('queued', 'running')")
                .bind(concept.id.to_string())
                .fetch_one(&mut *transaction)
                .await?;
        if busy > 0 {
            return Err(RegistryError::ConceptBusy(concept.name.clone()));
        }
        let training = insert_training(&mut transaction, concept, new).await?;
        self.bind_key(&mut transaction, Made::Training(training.id)).await?;
        transaction.commit().await?;
        Ok(Some(training))
    }

    /// Requeues a failed or cancelled training, from its checkpoint if it has one. Previews after the checkpoint are
    /// removed. Returns the resulting training, `None` if there is none; one in another status is left unchanged.
    ///
    /// # Errors
    /// `ConceptBusy` while another training of the concept is queued or running; `QuotaExceeded`; when the database
    /// fails.
    pub async fn retry_training(
        &self,
        tenant: TenantId,
        id: TrainingId,
        quotas: Quotas,
    ) -> Result<Option<Training>, RegistryError> {
        let mut transaction = self.write().await?;
        let before = sqlx::query("SELECT concept_id, status FROM trainings WHERE tenant_id = $1 AND id = $2")
            .bind(tenant.to_string())
            .bind(id.to_string())
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(before) = before else { return Ok(None) };
        let status: String = before.try_get("status")?;
        if matches!(status.parse(), Ok(TrainingStatus::Failed | TrainingStatus::Cancelled)) {
            self.check_quota(&mut transaction, tenant, quotas, ANOTHER).await?;
            self.check_queue_in(&mut *transaction, Queue::Trainings, tenant).await?;
        }
        self.hold_concept(&mut transaction, identifier(&before, "concept_id")?)
            .await?;
        let busy: Option<(String,)> = sqlx::query_as(
            "SELECT c.name FROM trainings t JOIN trainings o ON o.concept_id = t.concept_id AND o.id != t.id
             JOIN concepts c ON c.id = t.concept_id
             WHERE t.tenant_id = $1 AND t.id = $2 AND o.status IN ('queued', 'running') LIMIT 1",
        )
        .bind(tenant.to_string())
        .bind(id.to_string())
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some((name,)) = busy {
            return Err(RegistryError::ConceptBusy(name));
        }
        let changed = sqlx::query(
            "UPDATE trainings SET status = 'queued', attempt = 0, error = NULL, loss = NULL, steps_per_second = NULL,
             losses = CASE WHEN checkpoint IS NULL THEN NULL ELSE losses END, takeovers = 0, failures = 0,
             not_before = 0, step = coalesce(checkpoint_step, 0), started_at = NULL,
             finished_at = NULL WHERE tenant_id = $1 AND id = $2 AND status IN ('failed', 'cancelled')",
        )
        .bind(tenant.to_string())
        .bind(id.to_string())
        .execute(&mut *transaction)
        .await?;
        let mut gone: Vec<(String,)> = vec![];
        if changed.rows_affected() > 0 {
            self.bind_key(&mut transaction, Made::Training(id)).await?;
            gone = sqlx::query_as(
                "DELETE FROM training_previews WHERE training_id = $1
                 AND step > (SELECT coalesce(checkpoint_step, 0) FROM trainings WHERE id = $1) RETURNING blob",
            )
            .bind(id.to_string())
            .fetch_all(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        let gone: Vec<String> = gone.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&gone).await?;
        self.training(tenant, id).await
    }

    /// Cancels an unfinished training and removes its checkpoint; returns the resulting training.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel_training(&self, tenant: TenantId, id: TrainingId) -> Result<Option<Training>, RegistryError> {
        if self.training(tenant, id).await?.is_none() {
            return Ok(None);
        }
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        let before = self.checkpoint_of(&mut transaction, id).await?;
        sqlx::query(
            "UPDATE trainings SET status = 'cancelled', finished_at = $1, checkpoint = NULL, checkpoint_step = NULL,
             lease_token = NULL, lease_until = NULL
             WHERE tenant_id = $2 AND id = $3 AND status IN ('queued', 'running')",
        )
        .bind(at)
        .bind(tenant.to_string())
        .bind(id.to_string())
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.remove_unreferenced(&before).await?;
        self.training(tenant, id).await
    }
}

mod queue;

#[cfg(test)]
mod tests;
