//! Generations: what was asked for, how far it is, what came of it.
//!
//! The queue of those that nobody waits for is in here too: rows with `background` that are `queued`. One process holds
//! the data folder, so that what it draws at the moment needs no lease: after a crash the next process finds it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::webhooks::{NewDelivery, insert_delivery};
use super::{Listed, Page, Registry, RegistryError, identifier, now};
use crate::concept::ConceptKind;
use crate::ids::{GenerationId, TenantId};
use crate::picture::{OutputFormat, PictureFormat};

/// The words of the fine-tuning APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GenerationStatus {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl GenerationStatus {
    /// In the order of a generation's life.
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

    /// The status of a word.
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

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
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// Generations are begun this often before they fail for good.
pub const GENERATION_ATTEMPTS: u32 = 3;

fn json<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T, RegistryError> {
    serde_json::from_str(text).map_err(|error| RegistryError::Row(format!("{column}: {error}")))
}

fn text(value: &impl Serialize) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|error| RegistryError::Row(error.to_string()))
}

fn generation(row: &SqliteRow) -> Result<Generation, RegistryError> {
    let column = |name: &str| row.try_get::<String, _>(name).map_err(RegistryError::from);
    let optional = |name: &str| row.try_get::<Option<String>, _>(name).map_err(RegistryError::from);
    let status = column("status")?;
    Ok(Generation {
        id: identifier(row, "id")?,
        status: GenerationStatus::of_word(&status)
            .ok_or_else(|| RegistryError::Row(format!("generation status `{status}`")))?,
        new: NewGeneration {
            tenant: identifier(row, "tenant_id")?,
            background: row.try_get("background")?,
            prompt: column("prompt")?,
            settings: json("request", &column("request")?)?,
            concepts: json("concepts", &column("concepts")?)?,
            metadata: json("metadata", &column("metadata")?)?,
            webhook_url: optional("webhook_url")?,
            total: row.try_get("total")?,
        },
        done: row.try_get("done")?,
        usage: optional("usage")?.map(|usage| json("usage", &usage)).transpose()?,
        error: optional("error")?.map(|error| json("error", &error)).transpose()?,
        attempt: row.try_get("attempt")?,
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
        let (id, created_at) = (GenerationId::new(), now());
        sqlx::query(
            "INSERT INTO generations (id, tenant_id, status, background, prompt, request, concepts, metadata, webhook_url,
             total, created_at) VALUES ($1, $2, 'queued', $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(id.to_string())
        .bind(new.tenant.to_string())
        .bind(new.background)
        .bind(&new.prompt)
        .bind(text(&new.settings)?)
        .bind(text(&new.concepts)?)
        .bind(text(&new.metadata)?)
        .bind(&new.webhook_url)
        .bind(new.total)
        .bind(created_at)
        .execute(&self.pool)
        .await?;
        Ok(Generation {
            id,
            status: GenerationStatus::Queued,
            new,
            done: 0,
            usage: None,
            error: None,
            attempt: 0,
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
        let (count,) = sqlx::query_as("SELECT count(*) FROM generations WHERE status = 'queued' AND id < $1")
            .bind(id.to_string())
            .fetch_one(&self.pool)
            .await?;
        Ok(count)
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

    /// Queued generations that nobody waits for, in the order in which they are to be drawn: tenants of which less is
    /// being drawn first, then the older ones.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn next_generations(&self, limit: usize) -> Result<Vec<Generation>, RegistryError> {
        let rows = sqlx::query(
            "WITH busy AS (SELECT tenant_id, count(*) AS n FROM generations WHERE status = 'running' GROUP BY tenant_id)
             SELECT g.* FROM generations g LEFT JOIN busy ON busy.tenant_id = g.tenant_id
             WHERE g.status = 'queued' AND g.background = 1 ORDER BY coalesce(busy.n, 0), g.id LIMIT $1",
        )
        .bind(limit as i64)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(generation).collect()
    }

    /// From now on nobody waits for it; false when it has ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keep_generation(&self, id: GenerationId) -> Result<bool, RegistryError> {
        let kept =
            sqlx::query("UPDATE generations SET background = 1 WHERE id = $1 AND status IN ('queued', 'running')")
                .bind(id.to_string())
                .execute(&self.pool)
                .await?;
        Ok(kept.rows_affected() > 0)
    }

    /// Its drawing has begun; false when it has ended already.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn begin_generation(&self, id: GenerationId, at: i64) -> Result<bool, RegistryError> {
        let begun = sqlx::query(
            "UPDATE generations SET status = 'running', attempt = attempt + 1, started_at = $1
             WHERE id = $2 AND status = 'queued'",
        )
        .bind(at)
        .bind(id.to_string())
        .execute(&self.pool)
        .await?;
        Ok(begun.rows_affected() > 0)
    }

    /// Writes down how a generation ended, with the web-hook that tells of it; all or nothing. False when it had ended
    /// before, or is gone: then nothing is written.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn end_generation(
        &self,
        ended: &Generation,
        delivery: Option<&NewDelivery>,
    ) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        let changed = sqlx::query(
            "UPDATE generations SET status = $1, done = $2, usage = $3, error = $4, finished_at = $5
             WHERE id = $6 AND status IN ('queued', 'running')",
        )
        .bind(ended.status.as_str())
        .bind(ended.done)
        .bind(ended.usage.as_ref().map(text).transpose()?)
        .bind(ended.error.as_ref().map(text).transpose()?)
        .bind(ended.finished_at)
        .bind(ended.id.to_string())
        .execute(&mut *transaction)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(false);
        }
        if let Some(delivery) = delivery {
            insert_delivery(&mut transaction, delivery).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// Queues a running generation again, as if it had not been begun; its pictures so far go.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn requeue_generation(&self, id: GenerationId) -> Result<(), RegistryError> {
        let mut transaction = self.write().await?;
        let blobs: Vec<(String,)> = sqlx::query_as("DELETE FROM images WHERE generation_id = $1 RETURNING blob")
            .bind(id.to_string())
            .fetch_all(&mut *transaction)
            .await?;
        sqlx::query("UPDATE generations SET status = 'queued', started_at = NULL WHERE id = $1 AND status = 'running'")
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await
    }

    /// Generations that a process has left behind which is gone: those that nobody waits for are queued again, unless
    /// they were begun too often; the others are returned, to be ended. Only the holder of the data folder's lock may
    /// ask, before it serves anybody.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn left_generations(&self) -> Result<Vec<Generation>, RegistryError> {
        let rows = sqlx::query(
            "SELECT * FROM generations WHERE status = 'running' OR (status = 'queued' AND background = 0) ORDER BY id",
        )
        .fetch_all(&self.pool)
        .await?;
        let mut lost = Vec::new();
        for row in &rows {
            let left = generation(row)?;
            if left.new.background && left.attempt < GENERATION_ATTEMPTS {
                self.requeue_generation(left.id).await?;
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
        let before = now().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
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
    use crate::registry::StoredImage;

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
        }
    }

    async fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        (dir, registry)
    }

    async fn picture(registry: &Registry, generation: &Generation) -> StoredImage {
        let image = StoredImage {
            id: ImageId::new(),
            tenant: generation.new.tenant,
            generation: Some(generation.id),
            index: 2,
            seed: Some(1),
            size: (96, 96),
            blob: registry.blobs.put(generation.id.to_string().into()).await.unwrap(),
            format: PictureFormat::Jpeg,
            created_at: now(),
            expires_at: None,
        };
        registry.add_image(&image).await.unwrap();
        image
    }

    #[tokio::test]
    async fn a_generation_reads_back_and_ends_once() {
        let (_dir, registry) = registry().await;
        let added = registry.add_generation(new(false)).await.unwrap();
        let read = || async { registry.generation(TenantId::DEFAULT, added.id).await.unwrap() };
        assert_eq!(read().await.as_ref(), Some(&added));
        assert_eq!(registry.generation(TenantId::new(), added.id).await.unwrap(), None);
        assert!(registry.begin_generation(added.id, 5).await.unwrap());
        let image = picture(&registry, &added).await;
        assert_eq!(registry.images(TenantId::DEFAULT, added.id).await.unwrap(), [image]);
        let ended = Generation {
            status: GenerationStatus::Succeeded,
            usage: Some(TokenUsage {
                text_tokens: 3,
                image_tokens: 144,
            }),
            done: 144,
            attempt: 1,
            started_at: Some(5),
            finished_at: Some(9),
            ..added.clone()
        };
        assert!(registry.end_generation(&ended, None).await.unwrap());
        assert_eq!(read().await, Some(ended.clone()));
        let late = Generation {
            status: GenerationStatus::Cancelled,
            ..ended.clone()
        };
        assert!(!registry.end_generation(&late, None).await.unwrap());
        assert_eq!(read().await, Some(ended));
        assert!(!registry.delete_generation(TenantId::new(), added.id).await.unwrap());
        assert!(registry.delete_generation(TenantId::DEFAULT, added.id).await.unwrap());
        assert!(registry.blobs.all().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn after_a_crash_background_work_is_queued_again_and_the_rest_is_lost() {
        let (_dir, registry) = registry().await;
        let waited = registry.add_generation(new(false)).await.unwrap();
        let kept = registry.add_generation(new(true)).await.unwrap();
        let queued = registry.add_generation(new(true)).await.unwrap();
        registry.begin_generation(kept.id, now()).await.unwrap();
        picture(&registry, &kept).await;
        for attempt in 1..=GENERATION_ATTEMPTS {
            let lost: Vec<_> = registry
                .left_generations()
                .await
                .unwrap()
                .iter()
                .map(|g| g.id)
                .collect();
            if attempt == GENERATION_ATTEMPTS {
                assert_eq!(lost, [waited.id, kept.id]);
                break;
            }
            assert_eq!(lost, [waited.id]);
            assert!(registry.blobs.all().await.unwrap().is_empty());
            let next: Vec<_> = registry
                .next_generations(10)
                .await
                .unwrap()
                .iter()
                .map(|g| g.id)
                .collect();
            assert_eq!(next, [kept.id, queued.id]);
            assert_eq!(registry.generations_before(queued.id).await.unwrap(), 2);
            registry.begin_generation(kept.id, now()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_tenant_with_less_in_work_comes_first() {
        let (_dir, registry) = registry().await;
        let other = registry
            .add_tenant("acme", super::super::Quotas::default())
            .await
            .unwrap();
        let mut ids = Vec::new();
        for tenant in [TenantId::DEFAULT, TenantId::DEFAULT, other.id] {
            let new = NewGeneration { tenant, ..new(true) };
            ids.push(registry.add_generation(new).await.unwrap().id);
        }
        registry.begin_generation(ids[0], now()).await.unwrap();
        let next: Vec<_> = registry
            .next_generations(10)
            .await
            .unwrap()
            .iter()
            .map(|g| g.id)
            .collect();
        assert_eq!(next, [ids[2], ids[1]]);
        let page = Page {
            limit: 1,
            after: Some(ids[1]),
        };
        let queued = registry.generations(TenantId::DEFAULT, Some(GenerationStatus::Queued), page);
        assert!(queued.await.unwrap().rows.is_empty());
        let listed = registry
            .generations(TenantId::DEFAULT, None, Page { limit: 1, after: None })
            .await
            .unwrap();
        assert_eq!((listed.rows[0].id, listed.has_more), (ids[1], true));
    }
}
