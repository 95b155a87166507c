//! Trainings, and the queue that they form: whoever holds a training's lease may write to it, nobody else.

use serde::{Deserialize, Serialize};
use sqlx::Row;
use uuid::Uuid;

use super::concepts::Concept;
use super::{Registry, RegistryError, identifier, now};
use crate::ids::{ConceptId, TenantId, TrainingId};
use crate::training::TrainingSpec;

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

    fn parse(text: &str) -> Result<Self, RegistryError> {
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| RegistryError::Row(format!("training status `{text}`")))
    }
}

/// One training.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    pub id: TrainingId,
    pub tenant: TenantId,
    pub concept_id: ConceptId,
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
    /// JSON: loss curve, seconds.
    pub report: Option<serde_json::Value>,
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
    pub steps_per_second: f64,
}

/// A training is begun at most this often.
pub const ATTEMPTS: u32 = 3;

pub(super) async fn insert_training(
    transaction: &mut sqlx::Transaction<'static, sqlx::Sqlite>,
    concept: &Concept,
    spec: &TrainingSpec,
    input: &str,
) -> Result<Training, RegistryError> {
    let (id, created_at) = (TrainingId::new(), now());
    sqlx::query(
        "INSERT INTO trainings (id, tenant_id, concept_id, status, spec, input_fingerprint, total_steps, created_at)
         VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7)",
    )
    .bind(id.to_string())
    .bind(concept.tenant.to_string())
    .bind(concept.id.to_string())
    .bind(serde_json::to_string(spec).map_err(|error| RegistryError::Row(error.to_string()))?)
    .bind(input)
    .bind(i64::from(spec.steps))
    .bind(created_at)
    .execute(&mut **transaction)
    .await?;
    Ok(Training {
        id,
        tenant: concept.tenant,
        concept_id: concept.id,
        status: TrainingStatus::Queued,
        spec: spec.clone(),
        input_fingerprint: Some(input.to_owned()),
        version: None,
        webhook_url: None,
        step: 0,
        total_steps: spec.steps,
        loss: None,
        steps_per_second: None,
        error: None,
        report: None,
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
        status: TrainingStatus::parse(&text("status")?)?,
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
    /// A tenant's training by its identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn training(&self, tenant: TenantId, id: TrainingId) -> Result<Option<Training>, RegistryError> {
        let row = sqlx::query("SELECT * FROM trainings WHERE tenant_id = $1 AND id = $2")
            .bind(tenant.to_string())
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(training).transpose()
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

    /// Takes the oldest training that nobody works on; a lease that ran out counts as nobody.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_training(&self, lease_ms: i64) -> Result<Option<Claimed>, RegistryError> {
        let (lease, at) = (Uuid::new_v4().to_string(), now());
        let mut transaction = self.write().await?;
        let row = sqlx::query(
            "UPDATE trainings SET status = 'running', lease_token = $1, lease_until = $2, attempt = attempt + 1,
             resumed_from_step = coalesce(checkpoint_step, 0), step = coalesce(checkpoint_step, 0),
             started_at = coalesce(started_at, $3)
             WHERE id = (SELECT id FROM trainings WHERE status = 'queued' OR (status = 'running' AND lease_until < $3)
                         ORDER BY created_at, id LIMIT 1)
             RETURNING *",
        )
        .bind(&lease)
        .bind(at + lease_ms)
        .bind(at)
        .fetch_optional(&mut *transaction)
        .await?;
        let claimed = row.as_ref().map(training).transpose()?;
        transaction.commit().await?;
        Ok(claimed.map(|training| Claimed { training, lease }))
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
        .bind(progress.map(|p| p.steps_per_second))
        .bind(claimed.training.id.to_string())
        .bind(&claimed.lease)
        .execute(&self.pool)
        .await?;
        fenced(changed.rows_affected())
    }

    /// Records a checkpoint whose blob is stored; the one before it is removed.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's.
    pub async fn record_checkpoint(&self, claimed: &Claimed, step: u32, blob: &str) -> Result<(), RegistryError> {
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
        self.remove_unreferenced(&before).await
    }

    /// Makes the file with that hash the concept's next version, puts it to use, and ends the training, all or nothing.
    ///
    /// # Errors
    /// `LeaseLost` when the training is no longer this worker's.
    pub async fn succeed(
        &self,
        claimed: &Claimed,
        version: &str,
        report: &serde_json::Value,
    ) -> Result<(), RegistryError> {
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
        self.remove_unreferenced(&before).await
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
mod tests {
    use super::*;
    use crate::concept::ConceptKind;
    use crate::registry::NewConcept;
    use crate::training::Preset;

    async fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        (dir, registry)
    }

    async fn add(registry: &Registry, name: &str) -> Training {
        let picture = registry.blobs.put(name.as_bytes().to_vec().into()).await.unwrap();
        let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, name, Some("cat"), 6);
        let new = NewConcept {
            name: name.into(),
            kind: spec.kind,
            class_noun: Some("cat".into()),
            pictures: vec![picture],
        };
        registry.add_concept(TenantId::DEFAULT, &new, &spec).await.unwrap().1
    }

    #[tokio::test]
    async fn a_name_is_taken_once_and_nothing_is_left_of_the_second() {
        let (_dir, registry) = registry().await;
        let first = add(&registry, "rex").await;
        let second = NewConcept {
            name: "rex".into(),
            kind: ConceptKind::Style,
            class_noun: None,
            pictures: vec![],
        };
        let again = registry.add_concept(TenantId::DEFAULT, &second, &first.spec).await;
        assert!(matches!(again, Err(RegistryError::NameTaken(name)) if name == "rex"));
        assert_eq!(registry.concepts(TenantId::DEFAULT).await.unwrap().len(), 1);
        assert_eq!(
            registry.claim_training(1000).await.unwrap().unwrap().training.id,
            first.id
        );
        assert!(registry.claim_training(1000).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn only_the_lease_holder_writes() {
        let (_dir, registry) = registry().await;
        add(&registry, "rex").await;
        let slow = registry.claim_training(-1).await.unwrap().unwrap();
        let next = registry.claim_training(60_000).await.unwrap().unwrap();
        assert_eq!((slow.training.id, next.training.attempt), (next.training.id, 2));
        assert!(matches!(
            registry.report_progress(&slow, 1000, None).await,
            Err(RegistryError::LeaseLost)
        ));
        assert!(matches!(
            registry.succeed(&slow, "x", &serde_json::json!({})).await,
            Err(RegistryError::LeaseLost)
        ));
        registry.succeed(&next, "y", &serde_json::json!({})).await.unwrap();
        let concept = registry.concept(TenantId::DEFAULT, "rex").await.unwrap().unwrap();
        assert_eq!(concept.version.as_deref(), Some("y"));
    }

    #[tokio::test]
    async fn checkpoints_replace_each_other_and_go_at_the_end() {
        let (_dir, registry) = registry().await;
        add(&registry, "rex").await;
        let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
        let mut blobs = vec![];
        for step in 1..3 {
            let blob = registry.blobs.put(vec![step].into()).await.unwrap();
            registry.record_checkpoint(&claimed, step.into(), &blob).await.unwrap();
            blobs.push(blob);
        }
        assert!(registry.blobs.get(&blobs[0]).await.is_err());
        assert!(registry.blobs.get(&blobs[1]).await.is_ok());
        // The process dies and another takes over.
        assert_eq!(registry.release_all().await.unwrap(), 1);
        let again = registry.claim_training(60_000).await.unwrap().unwrap();
        assert_eq!(
            (again.training.resumed_from_step, again.training.checkpoint.as_ref()),
            (2, Some(&blobs[1]))
        );
        registry.succeed(&again, "v", &serde_json::json!({})).await.unwrap();
        assert!(registry.blobs.get(&blobs[1]).await.is_err());
    }

    #[tokio::test]
    async fn failures_are_retried_a_few_times_and_permanent_ones_never() {
        let (_dir, registry) = registry().await;
        add(&registry, "rex").await;
        let error = serde_json::json!({"code": "internal_error"});
        for attempt in 1..=ATTEMPTS {
            let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
            registry.fail(&claimed, &error, true).await.unwrap();
            let status = registry
                .training(TenantId::DEFAULT, claimed.training.id)
                .await
                .unwrap()
                .unwrap()
                .status;
            assert_eq!(status == TrainingStatus::Failed, attempt == ATTEMPTS);
        }
        let other = add(&registry, "other").await;
        let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
        registry.fail(&claimed, &error, false).await.unwrap();
        assert_eq!(
            registry
                .training(TenantId::DEFAULT, other.id)
                .await
                .unwrap()
                .unwrap()
                .status,
            TrainingStatus::Failed
        );
    }

    #[tokio::test]
    async fn a_crash_before_the_row_leaves_nothing_for_long() {
        let (_dir, registry) = registry().await;
        add(&registry, "rex").await;
        let orphan = registry.blobs.put(b"never registered".to_vec().into()).await.unwrap();
        assert_eq!(registry.collect_garbage().await.unwrap(), 1);
        assert!(registry.blobs.get(&orphan).await.is_err());
        let kept = registry
            .concept(TenantId::DEFAULT, "rex")
            .await
            .unwrap()
            .unwrap()
            .pictures;
        assert!(registry.blobs.get(&kept[0]).await.is_ok());
    }

    #[tokio::test]
    async fn deleting_a_concept_removes_its_blobs_unless_another_uses_them() {
        let (dir, registry) = registry().await;
        let training = add(&registry, "rex").await;
        let concept = registry.concept(TenantId::DEFAULT, "rex").await.unwrap().unwrap();
        let shared = concept.pictures[0].clone();
        let new = NewConcept {
            name: "twin".into(),
            kind: ConceptKind::Style,
            class_noun: None,
            pictures: vec![shared.clone()],
        };
        registry
            .add_ready_concept(TenantId::DEFAULT, &new, "none")
            .await
            .unwrap();
        assert!(registry.delete_concept(TenantId::DEFAULT, "rex").await.unwrap());
        assert!(!registry.delete_concept(TenantId::DEFAULT, "rex").await.unwrap());
        assert!(registry.blobs.get(&shared).await.is_ok());
        assert!(
            registry
                .training(TenantId::DEFAULT, training.id)
                .await
                .unwrap()
                .is_none()
        );
        registry.delete_concept(TenantId::DEFAULT, "twin").await.unwrap();
        assert!(registry.blobs.get(&shared).await.is_err());
        drop(dir);
    }
}
