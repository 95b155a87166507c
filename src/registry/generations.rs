//! Generations: what was asked for, how far it is, what came of it.
//!
//! The queue of those that nobody waits for is in here too: rows with `background` that are `queued`. What a process has
//! taken bears its name until it has ended; what a lost process has left is found by its name. `owner` and `attempt`
//! together are the fence: whoever was taken for lost and comes back writes nothing.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, locking, number};
use super::webhooks::{NewDelivery, insert_delivery};
use super::{GenerationStatus, Listed, Page, Registry, RegistryError};
use crate::concept::ConceptKind;
use crate::ids::{GenerationId, ProcessId, TenantId};
use crate::picture::{OutputFormat, PictureFormat};

/// Every setting, resolved: the same again draw the same pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationSettings {
    /// Pictures.
    pub n: u32,
    /// In pixels.
    pub width: u32,
    pub height: u32,
    pub seed: u64,
    /// Which picture of the seed the first one is.
    pub first_index: u32,
    pub guidance_scale: f64,
    pub temperature: f64,
    pub top_k: u32,
    pub identity_mask: bool,
    pub output_format: PictureFormat,
    /// Quality of JPEG, 1 to 100, and of WebP, 0 to 99; 100 where nothing is lost.
    pub output_compression: u8,
    /// Unfinished pictures that a listener gets of each.
    pub partial_images: u32,
}

impl GenerationSettings {
    /// How its files are written.
    pub fn format(&self) -> OutputFormat {
        match self.output_format {
            PictureFormat::Png => OutputFormat::Png,
            PictureFormat::Jpeg => OutputFormat::Jpeg(self.output_compression),
            PictureFormat::WebP if self.output_compression < 100 => OutputFormat::LossyWebP(self.output_compression),
            PictureFormat::WebP => OutputFormat::WebP,
        }
    }
}

/// A concept and the version of it that is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationConcept {
    pub name: String,
    pub kind: ConceptKind,
    /// The version's number.
    pub version: u32,
    /// SHA-256 of the concept file.
    pub hash: String,
}

/// Tokens that a generation took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUsage {
    /// Of the prompt.
    pub text_tokens: u64,
    /// Of all its pictures.
    pub image_tokens: u64,
}

/// A generation that is not stored yet.
#[derive(Debug, Clone, PartialEq)]
pub struct NewGeneration {
    pub tenant: TenantId,
    /// Nobody waits on a connection: it is drawn by the worker, and once more after a crash.
    pub background: bool,
    pub prompt: String,
    pub settings: GenerationSettings,
    pub concepts: Vec<GenerationConcept>,
    /// JSON object of strings.
    pub metadata: Value,
    pub webhook_url: Option<String>,
    /// Codes to draw.
    pub total: u32,
    /// Among those of its tenant the higher one is drawn first.
    pub priority: i32,
}

/// A stored generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub id: GenerationId,
    pub status: GenerationStatus,
    pub new: NewGeneration,
    /// Codes drawn; written down at the end.
    pub done: u32,
    pub usage: Option<TokenUsage>,
    /// `{code, message, field}`
    pub error: Option<Value>,
    /// How often its drawing was begun.
    pub attempt: u32,
    /// The process that draws it, or is about to.
    pub owner: Option<ProcessId>,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// Generations are begun this often before they fail for good.
pub const GENERATION_ATTEMPTS: u32 = 5;

fn json<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T, RegistryError> {
    serde_json::from_str(text).map_err(|error| RegistryError::Row(format!("{column}: {error}")))
}

fn text(value: &impl Serialize) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|error| RegistryError::Row(error.to_string()))
}

fn generation(row: &AnyRow) -> Result<Generation, RegistryError> {
    let column = |name: &str| row.try_get::<String, _>(name).map_err(RegistryError::from);
    let optional = |name: &str| row.try_get::<Option<String>, _>(name).map_err(RegistryError::from);
    let status = column("status")?;
    Ok(Generation {
        id: identifier(row, "id")?,
        status: GenerationStatus::of_word(&status)
            .ok_or_else(|| RegistryError::Row(format!("generation status `{status}`")))?,
        new: NewGeneration {
            tenant: identifier(row, "tenant_id")?,
            background: number::<i64>(row, "background")? != 0,
            prompt: column("prompt")?,
            settings: json("request", &column("request")?)?,
            concepts: json("concepts", &column("concepts")?)?,
            metadata: json("metadata", &column("metadata")?)?,
            webhook_url: optional("webhook_url")?,
            total: number(row, "total")?,
            priority: number(row, "priority")?,
        },
        done: number(row, "done")?,
        usage: optional("usage")?.map(|usage| json("usage", &usage)).transpose()?,
        error: optional("error")?.map(|error| json("error", &error)).transpose()?,
        attempt: number(row, "attempt")?,
        owner: optional("owner")?.map(|_| identifier(row, "owner")).transpose()?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

impl Registry {
    /// Stores a generation as queued.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_generation(&self, new: NewGeneration) -> Result<Generation, RegistryError> {
        let (id, created_at) = (GenerationId::new(), self.lease_time().await?);
        let owner = (!new.background).then_some(self.process);
        let mut transaction = self.write().await?;
        sqlx::query(
            "INSERT INTO generations (id, tenant_id, status, background, prompt, request, concepts, metadata, webhook_url,
             total, created_at, owner, priority) VALUES ($1, $2, 'queued', $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        )
        .bind(id.to_string())
        .bind(new.tenant.to_string())
        .bind(i64::from(new.background))
        .bind(&new.prompt)
        .bind(text(&new.settings)?)
        .bind(text(&new.concepts)?)
        .bind(text(&new.metadata)?)
        .bind(&new.webhook_url)
        .bind(i64::from(new.total))
        .bind(created_at)
        .bind(owner.map(|id| id.to_string()))
        .bind(i64::from(new.priority))
        .execute(&mut *transaction)
        .await?;
        // What somebody waits for is drawn anew for whoever asks again.
        if new.background {
            self.note_made(&mut transaction, &id).await?;
        }
        transaction.commit().await?;
        Ok(Generation {
            id,
            status: GenerationStatus::Queued,
            new,
            done: 0,
            usage: None,
            error: None,
            attempt: 0,
            owner,
            created_at,
            started_at: None,
            finished_at: None,
        })
    }

    /// A tenant's generation.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generation(&self, tenant: TenantId, id: GenerationId) -> Result<Option<Generation>, RegistryError> {
        let row = sqlx::query("SELECT * FROM generations WHERE tenant_id = $1 AND id = $2")
            .bind(tenant.to_string())
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(generation).transpose()
    }

    /// A tenant's generations, newest first, of one status or of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generations(
        &self,
        tenant: TenantId,
        status: Option<GenerationStatus>,
        page: Page<GenerationId>,
    ) -> Result<Listed<Generation>, RegistryError> {
        let rows = sqlx::query(
            "SELECT * FROM generations WHERE tenant_id = $1 AND id < $2 AND ($3 IS NULL OR status = $3)
             ORDER BY id DESC LIMIT $4",
        )
        .bind(tenant.to_string())
        .bind(page.after())
        .bind(status.map(GenerationStatus::as_str))
        .bind(page.fetched())
        .fetch_all(&self.pool)
        .await?;
        Ok(page.cut(rows.iter().map(generation).collect::<Result<_, _>>()?))
    }

    /// How many queued generations of all tenants are older than this one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generations_before(&self, id: GenerationId) -> Result<u32, RegistryError> {
        let (count,): (i64,) = sqlx::query_as("SELECT count(*) FROM generations WHERE status = 'queued' AND id < $1")
            .bind(id.to_string())
            .fetch_one(&self.pool)
            .await?;
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// How many generations of all tenants are queued.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn waiting_generations(&self) -> Result<i64, RegistryError> {
        let (count,) = sqlx::query_as("SELECT count(*) FROM generations WHERE status = 'queued'")
            .fetch_one(&self.pool)
            .await?;
        Ok(count)
    }

    /// Every queued generation that nobody waits for, and whose it is.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queued_generations(&self) -> Result<Vec<(GenerationId, TenantId)>, RegistryError> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT id, tenant_id FROM generations WHERE status = 'queued' AND background = 1")
                .fetch_all(&self.pool)
                .await?;
        let parsed = |(id, tenant): (String, String)| Some((id.parse().ok()?, tenant.parse().ok()?));
        Ok(rows.into_iter().filter_map(parsed).collect())
    }

    /// How many generations there are in each status.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generation_counts(&self) -> Result<Vec<(GenerationStatus, i64)>, RegistryError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT status, count(*) FROM generations GROUP BY status")
            .fetch_all(&self.pool)
            .await?;
        let counts = |status: GenerationStatus| {
            let row = rows.iter().find(|(word, _)| word == status.as_str());
            (status, row.map_or(0, |(_, count)| *count))
        };
        Ok(GenerationStatus::ALL.map(counts).to_vec())
    }

    /// Takes a queued generation that nobody waits for: of the tenant of which the least is being drawn, and among equals of
    /// the one that has waited the longest, the one with the highest priority, then the oldest.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_generation(&self) -> Result<Option<Generation>, RegistryError> {
        let at = self.lease_time().await?;
        // Whoever only looks takes nobody's turn to write.
        let any = sqlx::query(
            "SELECT id FROM generations WHERE status = 'queued' AND background = 1 AND owner IS NULL AND not_before <= $1
             LIMIT 1",
        )
        .bind(at)
        .fetch_optional(&self.pool)
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

    /// Generations that bear this process's name and have not ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn own_generations(&self) -> Result<Vec<Generation>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM generations WHERE owner = $1 AND status IN ('queued', 'running')")
            .bind(self.process.to_string())
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(generation).collect()
    }

    /// Gives a generation back that was taken and not begun; to be taken again after `wait_ms`.
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
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Writes down how many codes are drawn of the generations that this process draws. Those that are its no longer are
    /// returned: ended by others, deleted, or taken for lost.
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
            .execute(&self.pool)
            .await?;
            if changed.rows_affected() == 0 {
                gone.push(*id);
            }
        }
        Ok(gone)
    }

    /// From now on nobody waits for it; false when it has ended.
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
            self.note_made(&mut transaction, &id).await?;
        }
        transaction.commit().await?;
        Ok(kept)
    }

    /// Its drawing has begun, for the first time after `attempt` others; false when it has ended already, or is another
    /// process's. Said again, because the answer was lost, it changes nothing.
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
        .execute(&self.pool)
        .await?;
        Ok(begun.rows_affected() > 0)
    }

    /// Writes down how a generation ended, with the web-hook that tells of it; all or nothing. Where `ended` has an owner,
    /// only that one's attempt may end it. False when it had ended before, is gone or another's: then nothing is written.
    ///
    /// # Errors
    /// `LeaseLost` where it succeeds under an idempotency key that somebody else has begun anew; when the database fails.
    pub async fn end_generation(
        &self,
        ended: &Generation,
        delivery: Option<&NewDelivery>,
    ) -> Result<bool, RegistryError> {
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
            self.note_finished(&mut transaction, &ended.id).await?;
        }
        if let Some(delivery) = delivery {
            insert_delivery(&mut transaction, delivery, self.lease_time().await?).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// Queues a running generation again, as if it had not been begun; its pictures so far go. Without effect where it is
    /// no longer its owner's attempt.
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

    /// Generations of processes that are gone: those that nobody waits for are queued again, unless they were begun too
    /// often; the others are returned, to be ended. Nothing while this process [cannot tell](Registry::may_judge).
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn left_generations(&self) -> Result<Vec<Generation>, RegistryError> {
        if !self.may_judge() {
            return Ok(vec![]);
        }
        // Rows without an owner that run are of a version that knew none.
        let rows = sqlx::query(
            "SELECT * FROM generations WHERE status IN ('queued', 'running')
             AND (owner IS NOT NULL OR status = 'running' OR background = 0)
             AND coalesce(owner, '') NOT IN (SELECT id FROM processes WHERE seen_at >= $1) ORDER BY id",
        )
        .bind(self.lost_before().await?)
        .fetch_all(&self.pool)
        .await?;
        let left = rows.iter().map(generation).collect::<Result<_, _>>()?;
        self.queue_again(left).await
    }

    /// Queues generations again that nobody waits for, unless they were begun too often; returns the others.
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

    /// Removes a tenant's generation and its pictures. False where there is none.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn delete_generation(&self, tenant: TenantId, id: GenerationId) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        let blobs: Vec<(String,)> =
            sqlx::query_as("DELETE FROM images WHERE tenant_id = $1 AND generation_id = $2 RETURNING blob")
                .bind(tenant.to_string())
                .bind(id.to_string())
                .fetch_all(&mut *transaction)
                .await?;
        let deleted = sqlx::query("DELETE FROM generations WHERE tenant_id = $1 AND id = $2")
            .bind(tenant.to_string())
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(deleted.rows_affected() > 0)
    }

    /// Forgets generations of all tenants that ended longer than `age` ago; returns how many. Their pictures have expired
    /// before them: see [`Registry::expire_images`].
    ///
    /// # Errors
    /// When the database fails.
    pub async fn expire_generations(&self, age: Duration) -> Result<u64, RegistryError> {
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let before = self.lease_time().await?.saturating_sub(age);
        let expired = sqlx::query(
            "DELETE FROM generations WHERE finished_at < $1
             AND NOT EXISTS (SELECT 1 FROM images WHERE images.generation_id = generations.id)",
        )
        .bind(before)
        .execute(&self.pool)
        .await?;
        Ok(expired.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ids::ImageId;
    use crate::registry::{StoredImage, now};

    fn new(background: bool) -> NewGeneration {
        NewGeneration {
            tenant: TenantId::DEFAULT,
            background,
            prompt: "a cat".to_owned(),
            settings: GenerationSettings {
                n: 1,
                width: 96,
                height: 96,
                seed: (1 << 53) - 1,
                first_index: 2,
                guidance_scale: 3.5,
                temperature: 1.0,
                top_k: 20,
                identity_mask: true,
                output_format: PictureFormat::Jpeg,
                output_compression: 80,
                partial_images: 0,
            },
            concepts: vec![GenerationConcept {
                name: "rex".to_owned(),
                kind: ConceptKind::Subject,
                version: 2,
                hash: "ab".to_owned(),
            }],
            metadata: json!({"order": "7"}),
            webhook_url: None,
            total: 144,
            priority: 0,
        }
    }

    async fn registry() -> (tempfile::TempDir, Registry) {
        crate::registry::tests::test_registry().await
    }

    async fn picture(registry: &Registry, generation: &Generation) -> Result<StoredImage, RegistryError> {
        let bytes = format!("{} {}", generation.id, generation.attempt);
        let stored = registry.store(vec![bytes.into()]).await?;
        let image = StoredImage {
            id: ImageId::new(),
            tenant: generation.new.tenant,
            generation: Some(generation.id),
            index: 2,
            seed: Some(1),
            size: (96, 96),
            blob: stored.first().to_owned(),
            format: PictureFormat::Jpeg,
            created_at: now(),
            expires_at: None,
        };
        let added = registry.add_image(&image, generation.attempt).await;
        if added.is_ok() {
            // As when the first answer was lost.
            registry.add_image(&image, generation.attempt).await?;
        }
        let hashes = stored.release();
        if added.is_err() {
            registry.remove_unreferenced(&hashes).await?;
        }
        added.map(|()| image)
    }

    #[tokio::test]
    async fn a_generation_reads_back_and_ends_once() {
        let (_dir, registry) = registry().await;
        let mut added = registry.add_generation(new(false)).await.unwrap();
        assert_eq!(added.owner, Some(registry.process()));
        let read = || async { registry.generation(TenantId::DEFAULT, added.id).await.unwrap() };
        assert_eq!(read().await.as_ref(), Some(&added));
        assert_eq!(registry.generation(TenantId::new(), added.id).await.unwrap(), None);
        assert!(registry.begin_generation(added.id, 0, 5).await.unwrap());
        added.attempt = 1;
        let image = picture(&registry, &added).await.unwrap();
        assert_eq!(registry.images(TenantId::DEFAULT, added.id).await.unwrap(), [image]);
        let ended = Generation {
            status: GenerationStatus::Succeeded,
            usage: Some(TokenUsage {
                text_tokens: 3,
                image_tokens: 144,
            }),
            done: 144,
            started_at: Some(5),
            finished_at: Some(9),
            ..added.clone()
        };
        assert!(registry.end_generation(&ended, None).await.unwrap());
        assert_eq!(
            registry.generation(TenantId::DEFAULT, added.id).await.unwrap(),
            Some(ended.clone())
        );
        let late = Generation {
            status: GenerationStatus::Cancelled,
            owner: None,
            ..ended.clone()
        };
        assert!(!registry.end_generation(&late, None).await.unwrap());
        assert_eq!(
            registry.generation(TenantId::DEFAULT, added.id).await.unwrap(),
            Some(ended)
        );
        assert!(picture(&registry, &added).await.is_err());
        assert!(!registry.delete_generation(TenantId::new(), added.id).await.unwrap());
        assert!(registry.delete_generation(TenantId::DEFAULT, added.id).await.unwrap());
        assert!(registry.blobs.all().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_a_lost_process_has_left_is_queued_again_or_ended() {
        let (_dir, storage) = crate::registry::tests::test_storage().await;
        let mut registry = Registry::connect(&storage).await.unwrap();
        let waited = registry.add_generation(new(false)).await.unwrap();
        let kept = registry.add_generation(new(true)).await.unwrap();
        let queued = registry.add_generation(new(true)).await.unwrap();
        for attempt in 1..=GENERATION_ATTEMPTS {
            let mut taken = registry.claim_generation().await.unwrap().unwrap();
            assert_eq!(
                (taken.id, taken.attempt, taken.owner),
                (kept.id, attempt - 1, Some(registry.process()))
            );
            for _ in 0..2 {
                assert!(registry.begin_generation(taken.id, attempt - 1, now()).await.unwrap());
            }
            taken.attempt = attempt;
            picture(&registry, &taken).await.unwrap();
            // The process is gone without a word; another one looks.
            registry = Registry::connect(&storage).await.unwrap();
            let lost = registry.left_generations().await.unwrap();
            let ids: Vec<_> = lost.iter().map(|g| g.id).collect();
            if attempt == GENERATION_ATTEMPTS {
                assert_eq!(ids, [waited.id, kept.id]);
                break;
            }
            assert_eq!(ids, [waited.id]);
            assert!(registry.blobs.all().await.unwrap().is_empty());
            assert_eq!(registry.generations_before(queued.id).await.unwrap(), 2);
        }
    }

    #[tokio::test]
    async fn a_process_that_was_taken_for_lost_writes_nothing() {
        let (_dir, storage) = crate::registry::tests::test_storage().await;
        let slow = Registry::connect(&storage).await.unwrap();
        let swift = Registry::connect(&storage).await.unwrap();
        swift.announce(&Default::default()).await.unwrap();
        let added = slow.add_generation(new(true)).await.unwrap();
        let mut first = slow.claim_generation().await.unwrap().unwrap();
        assert!(swift.claim_generation().await.unwrap().is_none());
        slow.begin_generation(first.id, 0, now()).await.unwrap();
        first.attempt = 1;
        // It has not said for long that it lives.
        assert!(swift.left_generations().await.unwrap().is_empty());
        let mut second = swift.claim_generation().await.unwrap().unwrap();
        assert_eq!((second.id, second.attempt), (added.id, 1));
        swift.begin_generation(second.id, 1, now()).await.unwrap();
        second.attempt = 2;
        // Now it wakes up.
        assert!(matches!(picture(&slow, &first).await, Err(RegistryError::LeaseLost)));
        let ended = |taken: &Generation| Generation {
            status: GenerationStatus::Succeeded,
            ..taken.clone()
        };
        assert!(!slow.end_generation(&ended(&first), None).await.unwrap());
        slow.requeue_generation(&first).await.unwrap();
        assert_eq!(slow.report_drawn(&[(first.id, 7)]).await.unwrap(), [first.id]);
        assert!(swift.report_drawn(&[(first.id, 9)]).await.unwrap().is_empty());
        picture(&swift, &second).await.unwrap();
        assert!(swift.end_generation(&ended(&second), None).await.unwrap());
        assert_eq!(swift.images(TenantId::DEFAULT, added.id).await.unwrap().len(), 1);
        assert_eq!(slow.blobs.all().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn one_of_many_takes_each_and_nothing_is_taken_twice() {
        let (_dir, storage) = crate::registry::tests::test_storage().await;
        let first = Registry::connect(&storage).await.unwrap();
        let mut ids = std::collections::HashSet::new();
        for _ in 0..24 {
            ids.insert(first.add_generation(new(true)).await.unwrap().id);
        }
        let mut takers = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let storage = storage.clone();
            takers.spawn(async move {
                let registry = Registry::connect(&storage).await.unwrap();
                let mut taken = Vec::new();
                while let Some(next) = registry.claim_generation().await.unwrap() {
                    taken.push(next.id);
                }
                taken
            });
        }
        let taken: Vec<_> = takers.join_all().await.concat();
        assert_eq!(taken.len(), ids.len());
        assert_eq!(taken.into_iter().collect::<std::collections::HashSet<_>>(), ids);
    }

    #[tokio::test]
    async fn the_tenant_with_less_in_work_comes_first_and_within_it_the_more_urgent() {
        let (_dir, registry) = registry().await;
        let other = registry
            .add_tenant("acme", super::super::Quotas::default())
            .await
            .unwrap();
        let mut ids = Vec::new();
        for (tenant, priority) in [
            (TenantId::DEFAULT, 0),
            (TenantId::DEFAULT, 0),
            (other.id, 0),
            (other.id, 5),
            (TenantId::DEFAULT, 9),
        ] {
            let new = NewGeneration {
                tenant,
                priority,
                ..new(true)
            };
            ids.push(registry.add_generation(new).await.unwrap().id);
        }
        let mut order = Vec::new();
        while let Some(next) = registry.claim_generation().await.unwrap() {
            order.push(ids.iter().position(|id| *id == next.id).unwrap());
        }
        assert_eq!(order, [4, 3, 0, 2, 1]);
        registry.return_generation(ids[1], 60_000).await.unwrap();
        assert!(registry.claim_generation().await.unwrap().is_none());
        registry.return_generation(ids[2], 0).await.unwrap();
        assert_eq!(registry.claim_generation().await.unwrap().unwrap().id, ids[2]);
        let page = Page {
            limit: 1,
            after: Some(ids[1]),
        };
        let queued = registry.generations(TenantId::DEFAULT, Some(GenerationStatus::Queued), page);
        assert_eq!(queued.await.unwrap().rows[0].id, ids[0]);
        let listed = registry
            .generations(TenantId::DEFAULT, None, Page { limit: 1, after: None })
            .await
            .unwrap();
        assert_eq!((listed.rows[0].id, listed.has_more), (ids[4], true));
    }
}
