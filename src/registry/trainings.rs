//! Trainings, and the queue that they form: whoever holds a training's lease may write to it, nobody else.

use serde::{Deserialize, Serialize};
use sqlx::Row;
use uuid::Uuid;

use super::concepts::Concept;
use super::{Listed, Page, Registry, RegistryError, identifier, now};
use crate::ids::{ConceptId, TenantId, TrainingId};
use crate::training::{StepLosses, TrainingSpec};

/// The words of the fine-tuning APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainingStatus {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl TrainingStatus {
    /// In the order of a training's life.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

impl std::str::FromStr for TrainingStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|status| status.as_str() == text);
        known.ok_or_else(|| format!("is `{text}`; expected `queued`, `running`, `succeeded`, `failed` or `cancelled`"))
    }
}

/// One training.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    pub id: TrainingId,
    pub tenant: TenantId,
    pub concept_id: ConceptId,
    /// The concept's name at present.
    pub concept: String,
    pub status: TrainingStatus,
    pub spec: TrainingSpec,
    /// Over pictures and settings; `None` where an older version stored it.
    pub input_fingerprint: Option<String>,
    /// Number of the version that it made.
    pub version: Option<u32>,
    pub webhook_url: Option<String>,
    pub step: u32,
    pub total_steps: u32,
    pub loss: Option<f64>,
    pub steps_per_second: Option<f64>,
    /// JSON: code, message, field.
    pub error: Option<serde_json::Value>,
    /// JSON: seconds of the last attempt; of older versions the loss curve too.
    pub report: Option<serde_json::Value>,
    /// Steps of which there is a picture.
    pub previews: Vec<u32>,
    /// Blob of the newest checkpoint.
    pub checkpoint: Option<String>,
    /// The step that it stands at.
    pub checkpoint_step: Option<u32>,
    pub resumed_from_step: u32,
    pub attempt: u32,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// A training and the lease under which it may be written.
#[derive(Debug, Clone)]
pub struct Claimed {
    pub training: Training,
    pub lease: String,
}

/// How far a training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    pub step: u32,
    pub loss: f64,
    /// Over the last steps; `None`: too few yet.
    pub steps_per_second: Option<f64>,
}

/// Which trainings are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainingFilter {
    pub concept: Option<ConceptId>,
    pub status: Option<TrainingStatus>,
}

/// A training is begun at most this often.
pub const ATTEMPTS: u32 = 3;

/// Every column of a [`Training`]; the loss curve is long and read apart.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT t.id, t.tenant_id, t.concept_id, t.status, t.spec, t.input_fingerprint, t.version, t.webhook_url,
             t.step, t.total_steps, t.loss, t.steps_per_second, t.error, t.report, t.checkpoint, t.checkpoint_step,
             t.resumed_from_step, t.attempt, t.created_at, t.started_at, t.finished_at,
             (SELECT name FROM concepts c WHERE c.id = t.concept_id) AS concept,
             (SELECT json_group_array(p.step ORDER BY p.step) FROM training_previews p WHERE p.training_id = t.id)
             AS previews FROM trainings t ",
            $rest
        )
    };
}

/// What a training is to be.
#[derive(Debug, Clone, Copy)]
pub struct NewTraining<'a> {
    pub spec: &'a TrainingSpec,
    /// See [`super::input_fingerprint`].
    pub input: &'a str,
    pub webhook_url: Option<&'a str>,
}

pub(super) async fn insert_training(
    transaction: &mut sqlx::Transaction<'static, sqlx::Sqlite>,
    concept: &Concept,
    new: NewTraining<'_>,
) -> Result<Training, RegistryError> {
    let NewTraining {
        spec,
        input,
        webhook_url,
    } = new;
    let (id, created_at) = (TrainingId::new(), now());
    sqlx::query(
        "INSERT INTO trainings (id, tenant_id, concept_id, status, spec, input_fingerprint, total_steps, created_at,
         webhook_url) VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7, $8)",
    )
    .bind(id.to_string())
    .bind(concept.tenant.to_string())
    .bind(concept.id.to_string())
    .bind(serde_json::to_string(spec).map_err(|error| RegistryError::Row(error.to_string()))?)
    .bind(input)
    .bind(i64::from(spec.steps))
    .bind(created_at)
    .bind(webhook_url)
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
        created_at,
        started_at: None,
        finished_at: None,
    })
}

fn training(row: &sqlx::sqlite::SqliteRow) -> Result<Training, RegistryError> {
    let text = |column: &str| row.try_get::<String, _>(column).map_err(RegistryError::from);
    let json = |column: &str| -> Result<Option<serde_json::Value>, RegistryError> {
        let text: Option<String> = row.try_get(column)?;
        text.map(|text| serde_json::from_str(&text).map_err(|error| RegistryError::Row(error.to_string())))
            .transpose()
    };
    let number = |column: &str| {
        row.try_get::<i64, _>(column)
            .map(|n| n as u32)
            .map_err(RegistryError::from)
    };
    Ok(Training {
        id: identifier(row, "id")?,
        tenant: identifier(row, "tenant_id")?,
        concept_id: identifier(row, "concept_id")?,
        concept: text("concept")?,
        status: text("status")?.parse().map_err(RegistryError::Row)?,
        spec: serde_json::from_str(&text("spec")?).map_err(|error| RegistryError::Row(error.to_string()))?,
        input_fingerprint: row.try_get("input_fingerprint")?,
        version: row.try_get("version")?,
        webhook_url: row.try_get("webhook_url")?,
        step: number("step")?,
        total_steps: number("total_steps")?,
        loss: row.try_get("loss")?,
        steps_per_second: row.try_get("steps_per_second")?,
        error: json("error")?,
        report: json("report")?,
        previews: serde_json::from_str(&text("previews")?).map_err(|error| RegistryError::Row(error.to_string()))?,
        checkpoint: row.try_get("checkpoint")?,
        checkpoint_step: row
            .try_get::<Option<i64>, _>("checkpoint_step")?
            .map(|step| step as u32),
        resumed_from_step: number("resumed_from_step")?,
        attempt: number("attempt")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

/// The blob of a training's checkpoint, if it has one.
async fn checkpoint_of(
    transaction: &mut sqlx::Transaction<'static, sqlx::Sqlite>,
    id: TrainingId,
) -> Result<Vec<String>, RegistryError> {
    let row: Option<(Option<String>,)> = sqlx::query_as("SELECT checkpoint FROM trainings WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **transaction)
        .await?;
    Ok(row.and_then(|(blob,)| blob).into_iter().collect())
}

/// A fenced write changed no row: the lease is somebody else's.
fn fenced(changed: u64) -> Result<(), RegistryError> {
    if changed == 1 {
        Ok(())
    } else {
        Err(RegistryError::LeaseLost)
    }
}

impl Registry {
    /// Trainings that have ended within the last `age` and whose receiver has not been told of that end.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn untold_trainings(&self, age: std::time::Duration) -> Result<Vec<Training>, RegistryError> {
        let since = now() - i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let rows = sqlx::query(select!(
            "WHERE t.webhook_url IS NOT NULL AND t.finished_at >= $1 AND t.status IN ('succeeded', 'failed', 'cancelled')
             AND NOT EXISTS (SELECT 1 FROM webhook_deliveries d WHERE d.subject = t.id AND d.event = 'training.' || t.status
                             AND d.created_at >= t.finished_at) ORDER BY t.finished_at LIMIT 100"
        ))
        .bind(since)
        .fetch_all(&self.pool)
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
            .fetch_optional(&self.pool)
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
        .fetch_all(&self.pool)
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
        let ids: Vec<String> = concepts.iter().map(ToString::to_string).collect();
        let ids = serde_json::to_string(&ids).map_err(|error| RegistryError::Row(error.to_string()))?;
        let rows = sqlx::query(select!(
            "WHERE t.tenant_id = $1 AND t.id IN (SELECT max(id) FROM trainings
             WHERE concept_id IN (SELECT value FROM json_each($2)) GROUP BY concept_id)"
        ))
        .bind(tenant.to_string())
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(training).collect()
    }

    /// The loss curve of a tenant's training as far as it is written down, in steps' order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn losses(&self, tenant: TenantId, id: TrainingId) -> Result<Vec<StepLosses>, RegistryError> {
        // Older versions kept it in the report.
        let row: Option<(Option<String>,)> = sqlx::query_as(
            "SELECT coalesce(losses, json_extract(report, '$.losses')) FROM trainings WHERE tenant_id = $1 AND id = $2",
        )
        .bind(tenant.to_string())
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await?;
        match row.and_then(|(text,)| text) {
            Some(text) => serde_json::from_str(&text).map_err(|error| RegistryError::Row(error.to_string())),
            None => Ok(vec![]),
        }
    }

    /// Queues another training of a concept that has one already or none; `None` where the concept is gone.
    ///
    /// # Errors
    /// `ConceptBusy` while one is queued or running; when the database fails.
    pub async fn add_training(
        &self,
        concept: &Concept,
        new: NewTraining<'_>,
    ) -> Result<Option<Training>, RegistryError> {
        let mut transaction = self.write().await?;
        let found: Option<(bool,)> = sqlx::query_as(
            "SELECT EXISTS (SELECT 1 FROM trainings WHERE concept_id = $1 AND status IN ('queued', 'running'))
             FROM concepts WHERE id = $1",
        )
        .bind(concept.id.to_string())
        .fetch_optional(&mut *transaction)
        .await?;
        match found {
            None => return Ok(None),
            Some((true,)) => return Err(RegistryError::ConceptBusy(concept.name.clone())),
            Some((false,)) => {}
        }
        let training = insert_training(&mut transaction, concept, new).await?;
        transaction.commit().await?;
        Ok(Some(training))
    }

    /// Queues a failed or cancelled training again, from its checkpoint where it has one. Pictures beyond it go. The
    /// training as it stands then, `None` where there is none; one that has not failed stays as it is.
    ///
    /// # Errors
    /// `ConceptBusy` while another training of the concept is queued or running; when the database fails.
    pub async fn retry_training(&self, tenant: TenantId, id: TrainingId) -> Result<Option<Training>, RegistryError> {
        let mut transaction = self.write().await?;
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
             losses = iif(checkpoint IS NULL, NULL, losses), step = coalesce(checkpoint_step, 0), started_at = NULL,
             finished_at = NULL WHERE tenant_id = $1 AND id = $2 AND status IN ('failed', 'cancelled')",
        )
        .bind(tenant.to_string())
        .bind(id.to_string())
        .execute(&mut *transaction)
        .await?;
        let mut gone: Vec<(String,)> = vec![];
        if changed.rows_affected() > 0 {
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

    /// Trainings that wait for a worker, of all tenants.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn waiting_trainings(&self) -> Result<i64, RegistryError> {
        let (count,) = sqlx::query_as("SELECT count(*) FROM trainings WHERE status = 'queued'")
            .fetch_one(&self.pool)
            .await?;
        Ok(count)
    }

    /// How many trainings there are in each status.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn training_counts(&self) -> Result<Vec<(TrainingStatus, i64)>, RegistryError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT status, count(*) FROM trainings GROUP BY status")
            .fetch_all(&self.pool)
            .await?;
        let counts = |status: TrainingStatus| {
            let row = rows.iter().find(|(word, _)| word == status.as_str());
            (status, row.map_or(0, |(_, count)| *count))
        };
        Ok(TrainingStatus::ALL.map(counts).to_vec())
    }

    /// Gives back every running training of a process that is gone. Only the holder of the data folder's lock may ask.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_all(&self) -> Result<u64, RegistryError> {
        let released = sqlx::query(
            "UPDATE trainings SET status = 'queued', lease_token = NULL, lease_until = NULL WHERE status = 'running'",
        )
        .execute(&self.pool)
        .await?;
        Ok(released.rows_affected())
    }

    /// Takes a training that nobody works on; a lease that ran out counts as nobody. Of the tenant with the fewest running,
    /// and among equals the one whose turn was the longest ago, the oldest; what was interrupted goes on first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_training(&self, lease_ms: i64) -> Result<Option<Claimed>, RegistryError> {
        let (lease, at) = (Uuid::new_v4().to_string(), now());
        let mut transaction = self.write().await?;
        let found: Option<(String,)> = sqlx::query_as(
            "SELECT t.id FROM trainings t WHERE t.status = 'queued' OR (t.status = 'running' AND t.lease_until < $1)
             ORDER BY (SELECT count(*) FROM trainings r
                       WHERE r.tenant_id = t.tenant_id AND r.status = 'running' AND r.lease_until >= $1),
                      t.started_at IS NULL,
                      (SELECT max(r.started_at) FROM trainings r WHERE r.tenant_id = t.tenant_id),
                      t.created_at, t.id LIMIT 1",
        )
        .bind(at)
        .fetch_optional(&mut *transaction)
        .await?;
        let Some((id,)) = found else { return Ok(None) };
        sqlx::query(
            "UPDATE trainings SET status = 'running', lease_token = $1, lease_until = $2, attempt = attempt + 1,
             resumed_from_step = coalesce(checkpoint_step, 0), step = coalesce(checkpoint_step, 0),
             steps_per_second = NULL, started_at = coalesce(started_at, $3) WHERE id = $4",
        )
        .bind(&lease)
        .bind(at + lease_ms)
        .bind(at)
        .bind(&id)
        .execute(&mut *transaction)
        .await?;
        let row = sqlx::query(select!("WHERE t.id = $1"))
            .bind(&id)
            .fetch_one(&mut *transaction)
            .await?;
        let training = training(&row)?;
        transaction.commit().await?;
        Ok(Some(Claimed { training, lease }))
    }

    /// Keeps the lease and tells how far the training is.
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
            "UPDATE trainings SET lease_until = $1, step = coalesce($2, step), loss = coalesce($3, loss),
             steps_per_second = coalesce($4, steps_per_second)
             WHERE id = $5 AND lease_token = $6 AND status = 'running'",
        )
        .bind(now() + lease_ms)
        .bind(progress.map(|p| i64::from(p.step)))
        .bind(progress.map(|p| p.loss))
        .bind(progress.and_then(|p| p.steps_per_second))
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pool)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Writes the loss curve down.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's.
    pub async fn record_losses(&self, claimed: &Claimed, losses: &[StepLosses]) -> Result<(), RegistryError> {
        let text = serde_json::to_string(losses).map_err(|error| RegistryError::Row(error.to_string()))?;
        let changed =
            sqlx::query("UPDATE trainings SET losses = $1 WHERE id = $2 AND lease_token = $3 AND status = 'running'")
                .bind(text)
                .bind(claimed.training.id.to_string())
                .bind(&claimed.lease)
                .execute(&self.pool)
                .await?;
        fenced(changed.rows_affected())
    }

    /// Records a checkpoint whose blob is stored; the one before it is removed.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's; the new blob is gone then.
    pub async fn record_checkpoint(&self, claimed: &Claimed, step: u32, blob: &str) -> Result<(), RegistryError> {
        let recorded = self.replace_checkpoint(claimed, step, blob).await;
        if recorded.is_err() {
            self.remove_unreferenced(&[blob.to_owned()]).await?;
        }
        self.remove_unreferenced(&recorded?).await
    }

    /// The blobs that are not needed any more.
    async fn replace_checkpoint(&self, claimed: &Claimed, step: u32, blob: &str) -> Result<Vec<String>, RegistryError> {
        let mut transaction = self.write().await?;
        let before = checkpoint_of(&mut transaction, claimed.training.id).await?;
        let changed = sqlx::query(
            "UPDATE trainings SET checkpoint = $1, checkpoint_step = $2 WHERE id = $3 AND lease_token = $4 AND status = 'running'",
        )
        .bind(blob)
        .bind(i64::from(step))
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&mut *transaction)
        .await?;
        fenced(changed.rows_affected())?;
        transaction.commit().await?;
        Ok(before)
    }

    /// Makes the file with that hash the concept's next version, puts it to use, and ends the training, all or nothing.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's; the file is gone then.
    pub async fn succeed(
        &self,
        claimed: &Claimed,
        version: &str,
        report: &serde_json::Value,
    ) -> Result<(), RegistryError> {
        let published = self.publish(claimed, version, report).await;
        if published.is_err() {
            self.remove_unreferenced(&[version.to_owned()]).await?;
        }
        self.remove_unreferenced(&published?).await
    }

    /// The blobs that are not needed any more.
    async fn publish(
        &self,
        claimed: &Claimed,
        version: &str,
        report: &serde_json::Value,
    ) -> Result<Vec<String>, RegistryError> {
        let at = now();
        let mut transaction = self.write().await?;
        let before = checkpoint_of(&mut transaction, claimed.training.id).await?;
        let (number,): (i64,) =
            sqlx::query_as("SELECT coalesce(max(number), 0) + 1 FROM concept_versions WHERE concept_id = $1")
                .bind(claimed.training.concept_id.to_string())
                .fetch_one(&mut *transaction)
                .await?;
        let changed = sqlx::query(
            "UPDATE trainings SET status = 'succeeded', step = total_steps, report = $1, finished_at = $2, version = $3,
             checkpoint = NULL, checkpoint_step = NULL, lease_token = NULL, lease_until = NULL
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
            "INSERT INTO concept_versions (concept_id, number, hash, training_id, input_fingerprint, created_at)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(claimed.training.concept_id.to_string())
        .bind(number)
        .bind(version)
        .bind(claimed.training.id.to_string())
        .bind(&claimed.training.input_fingerprint)
        .bind(at)
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
        Ok(before)
    }

    /// Ends the training with an error, or gives it back where another attempt may help.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's.
    pub async fn fail(&self, claimed: &Claimed, error: &serde_json::Value, retry: bool) -> Result<(), RegistryError> {
        let again = retry && claimed.training.attempt < ATTEMPTS;
        let changed = sqlx::query(
            "UPDATE trainings SET status = $1, error = $2, finished_at = $3, lease_token = NULL, lease_until = NULL
             WHERE id = $4 AND lease_token = $5 AND status = 'running'",
        )
        .bind(if again { "queued" } else { "failed" })
        .bind(error.to_string())
        .bind(if again { None } else { Some(now()) })
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pool)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Gives a training back, unfinished and without blame: its worker stops.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's.
    pub async fn release(&self, claimed: &Claimed) -> Result<(), RegistryError> {
        let changed = sqlx::query(
            "UPDATE trainings SET status = 'queued', attempt = attempt - 1, lease_token = NULL, lease_until = NULL
             WHERE id = $1 AND lease_token = $2 AND status = 'running'",
        )
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pool)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Cancels a training that is not finished; returns the training as it stands, and its checkpoint goes.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel_training(&self, tenant: TenantId, id: TrainingId) -> Result<Option<Training>, RegistryError> {
        if self.training(tenant, id).await?.is_none() {
            return Ok(None);
        }
        let mut transaction = self.write().await?;
        let before = checkpoint_of(&mut transaction, id).await?;
        sqlx::query(
            "UPDATE trainings SET status = 'cancelled', finished_at = $1, checkpoint = NULL, checkpoint_step = NULL, lease_token = NULL, lease_until = NULL
             WHERE tenant_id = $2 AND id = $3 AND status IN ('queued', 'running')",
        )
        .bind(now())
        .bind(tenant.to_string())
        .bind(id.to_string())
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.remove_unreferenced(&before).await?;
        self.training(tenant, id).await
    }
}

#[cfg(test)]
mod tests;
