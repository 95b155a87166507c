//! The operator's view across tenants: the queue, failed jobs, damaged blobs.

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, number};
use super::{JobStatus, Quotas, Registry, RegistryError};
use coar_core::ids::{DeliveryId, GenerationId, TenantId, TrainingId};

/// Number of a tenant's jobs by kind and status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueCount {
    /// `training`, `generation` or `webhook`.
    pub kind: String,
    /// The tenant's name.
    pub tenant: String,
    /// `queued` or `running`; of webhooks `pending`.
    pub status: String,
    pub count: u64,
    /// Creation time of the oldest.
    pub oldest: i64,
}

/// A job of any kind and tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub kind: String,
    pub id: String,
    pub tenant: String,
    pub status: String,
    pub attempt: u32,
    /// The process that runs it.
    pub process: Option<String>,
    pub created_at: i64,
    /// Why it failed: JSON for trainings and generations, a sentence for webhooks.
    pub error: Option<String>,
}

/// A blob that a row refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobUse {
    pub hash: String,
    /// `image` (reference or generated), `concept`, `checkpoint`, `preview` or `answer`.
    pub role: String,
    /// The concept's, training's or generation's identifier; an answer's idempotency key.
    pub of: String,
    pub tenant: String,
}

/// The subject of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobId {
    Training(TrainingId),
    Generation(GenerationId),
    Delivery(DeliveryId),
}

impl std::str::FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let training = || text.parse().map(Self::Training).ok();
        let generation = || text.parse().map(Self::Generation).ok();
        let delivery = || text.parse().map(Self::Delivery).ok();
        training()
            .or_else(generation)
            .or_else(delivery)
            .ok_or_else(|| format!("`{text}` is not the identifier of a training, a generation or a webhook"))
    }
}

fn job(row: &AnyRow) -> Result<Job, RegistryError> {
    Ok(Job {
        kind: row.try_get("kind")?,
        id: row.try_get("id")?,
        tenant: row.try_get("tenant")?,
        status: row.try_get("status")?,
        attempt: number(row, "attempt")?,
        process: row.try_get("process")?,
        created_at: row.try_get("created_at")?,
        error: row.try_get("error")?,
    })
}

impl Registry {
    /// Queued and running jobs, by kind, tenant and status.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queue_counts(&self) -> Result<Vec<QueueCount>, RegistryError> {
        let rows = sqlx::query(
            "SELECT j.kind, n.name AS tenant, j.status, count(*) AS jobs, min(j.created_at) AS oldest FROM (
                 SELECT 'training' AS kind, tenant_id, status, created_at FROM trainings
                     WHERE status IN ('queued', 'running')
                 UNION ALL SELECT 'generation', tenant_id, status, created_at FROM generations
                     WHERE status IN ('queued', 'running')
                 UNION ALL SELECT 'webhook', tenant_id, status, created_at FROM webhook_deliveries
                     WHERE status = 'pending') AS j
             JOIN tenants n ON n.id = j.tenant_id GROUP BY j.kind, n.name, j.status ORDER BY j.kind, n.name, j.status",
        )
        .fetch_all(&self.pools.reads)
        .await?;
        let count = |row: &AnyRow| {
            Ok(QueueCount {
                kind: row.try_get("kind")?,
                tenant: row.try_get("tenant")?,
                status: row.try_get("status")?,
                count: number(row, "jobs")?,
                oldest: row.try_get("oldest")?,
            })
        };
        rows.iter().map(count).collect()
    }

    /// Jobs of all tenants in one status, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn jobs(&self, status: JobStatus, limit: u32) -> Result<Vec<Job>, RegistryError> {
        // Webhooks have other status names.
        let delivery = match status {
            JobStatus::Queued | JobStatus::Running => "pending",
            JobStatus::Succeeded => "delivered",
            JobStatus::Failed => "failed",
            JobStatus::Cancelled => "",
        };
        let rows = sqlx::query(
            "SELECT j.kind, j.id, n.name AS tenant, j.status, j.attempt, j.process, j.created_at, j.error FROM (
                 SELECT 'training' AS kind, id, tenant_id, status, attempt, worker AS process, created_at, error
                     FROM trainings WHERE status = $1
                 UNION ALL SELECT 'generation', id, tenant_id, status, attempt, owner, created_at, error
                     FROM generations WHERE status = $1
                 UNION ALL SELECT 'webhook', id, tenant_id, status, attempt, NULL, created_at, last_error
                     FROM webhook_deliveries WHERE status = $2) AS j
             JOIN tenants n ON n.id = j.tenant_id ORDER BY j.created_at DESC, j.id DESC LIMIT $3",
        )
        .bind(status.as_str())
        .bind(delivery)
        .bind(i64::from(limit))
        .fetch_all(&self.pools.reads)
        .await?;
        rows.iter().map(job).collect()
    }

    /// Requeues a failed job of any tenant: a training from its checkpoint, a generation from the start, a webhook
    /// at once and with all its attempts. False if there is no such failed job.
    ///
    /// # Errors
    /// `ConceptBusy` while another training of the concept is queued or running; when the database fails.
    pub async fn replay(&self, id: JobId) -> Result<bool, RegistryError> {
        let changed = match id {
            JobId::Training(id) => {
                let row =
                    sqlx::query("SELECT tenant_id FROM trainings WHERE id = $1 AND status IN ('failed', 'cancelled')")
                        .bind(id.to_string())
                        .fetch_optional(&self.pools.reads)
                        .await?;
                let Some(row) = row else { return Ok(false) };
                let tenant: TenantId = identifier(&row, "tenant_id")?;
                let queued = self.retry_training(tenant, id, Quotas::default()).await?;
                return Ok(queued.is_some_and(|training| training.status == JobStatus::Queued));
            }
            JobId::Generation(id) => sqlx::query(
                "UPDATE generations SET status = 'queued', background = 1, attempt = 0, owner = NULL, not_before = 0,
                     done = 0, error = NULL, started_at = NULL, finished_at = NULL
                     WHERE id = $1 AND status IN ('failed', 'cancelled')
                     AND NOT EXISTS (SELECT 1 FROM images WHERE images.generation_id = generations.id)",
            )
            .bind(id.to_string())
            .execute(&self.pools.writes)
            .await?,
            JobId::Delivery(id) => {
                sqlx::query(
                    "UPDATE webhook_deliveries SET status = 'pending', attempt = 0, next_at = 0, finished_at = NULL
                     WHERE id = $1 AND status = 'failed'",
                )
                .bind(id.to_string())
                .execute(&self.pools.writes)
                .await?
            }
        };
        Ok(changed.rows_affected() > 0)
    }

    /// Every use of a blob, of all tenants.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn blob_uses(&self) -> Result<Vec<BlobUse>, RegistryError> {
        let rows = sqlx::query(
            "SELECT u.hash, u.role, u.id, n.name AS tenant FROM (
                 SELECT p.blob AS hash, 'image' AS role, c.id, c.tenant_id FROM concept_pictures p
                     JOIN concepts c ON c.id = p.concept_id
                 UNION ALL SELECT v.hash, 'concept', c.id, c.tenant_id FROM concept_versions v
                     JOIN concepts c ON c.id = v.concept_id
                 UNION ALL SELECT checkpoint, 'checkpoint', id, tenant_id FROM trainings WHERE checkpoint IS NOT NULL
                 UNION ALL SELECT p.blob, 'preview', t.id, t.tenant_id FROM training_previews p
                     JOIN trainings t ON t.id = p.training_id
                 UNION ALL SELECT blob, 'answer', key, tenant_id FROM idempotency_keys WHERE blob IS NOT NULL
                 UNION ALL SELECT blob, 'image', coalesce(generation_id, id), tenant_id FROM images) AS u
             JOIN tenants n ON n.id = u.tenant_id ORDER BY u.role, u.id",
        )
        .fetch_all(&self.pools.reads)
        .await?;
        let used = |row: &AnyRow| {
            Ok(BlobUse {
                hash: row.try_get("hash")?,
                role: row.try_get("role")?,
                of: row.try_get("id")?,
                tenant: row.try_get("tenant")?,
            })
        };
        rows.iter().map(used).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::test_registry;
    use crate::{Attempt, NewConcept, NewDelivery};
    use coar_core::concept::ConceptKind;
    use coar_core::training::{Preset, TrainingSpec};

    #[tokio::test]
    async fn failed_jobs_are_listed_and_replayed() {
        let (_dir, registry) = test_registry().await;
        let spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Style, "ink", None, 6);
        let stored = registry.store(vec!["image".into()]).await.unwrap();
        let new = NewConcept {
            images: stored.hashes().to_vec(),
            ..NewConcept::new("ink", ConceptKind::Style)
        };
        let (concept, training) = registry.add_concept(TenantId::DEFAULT, &new, &spec).await.unwrap();
        let counts = registry.queue_counts().await.unwrap();
        assert_eq!(counts.len(), 1);
        assert_eq!(
            (counts[0].kind.as_str(), counts[0].status.as_str(), counts[0].count),
            ("training", "queued", 1)
        );
        let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
        let error = serde_json::json!({"code": "unreadable_input"});
        registry.fail(&claimed, &error, false).await.unwrap();
        let delivery = NewDelivery {
            tenant: TenantId::DEFAULT,
            subject: training.id.to_string(),
            event: "training.failed".into(),
            url: "https://example.com".into(),
            host: "example.com".into(),
            body: "{}".into(),
        };
        registry.add_delivery(&delivery).await.unwrap();
        let delivery = registry
            .claim_deliveries(1, std::time::Duration::from_secs(60), &[])
            .await
            .unwrap()
            .remove(0);
        let gone = Attempt {
            status: Some(410),
            problem: Some("it answered 410".into()),
            again_after: None,
        };
        registry.record_attempt(delivery.id, &gone).await.unwrap();
        let dead = registry.jobs(JobStatus::Failed, 10).await.unwrap();
        let kinds: std::collections::HashSet<&str> = dead.iter().map(|job| job.kind.as_str()).collect();
        assert_eq!((dead.len(), kinds), (2, ["training", "webhook"].into()));
        assert_eq!(
            dead.iter().find(|job| job.kind == "training").unwrap().process,
            Some(registry.process().to_string())
        );
        for job in &dead {
            let id: JobId = job.id.parse().unwrap();
            assert!(registry.replay(id).await.unwrap());
            assert!(!registry.replay(id).await.unwrap());
        }
        assert!(registry.jobs(JobStatus::Failed, 10).await.unwrap().is_empty());
        assert_eq!(
            registry.claim_training(60_000).await.unwrap().unwrap().training.id,
            training.id
        );
        let uses = registry.blob_uses().await.unwrap();
        assert_eq!(
            (uses.len(), uses[0].role.as_str(), uses[0].of.clone()),
            (1, "image", concept.id.to_string())
        );
        assert!("concept_1".parse::<JobId>().is_err());
    }
}
