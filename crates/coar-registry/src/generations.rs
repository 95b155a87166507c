//! Generations: parameters, status and results.
//!
//! This is also the queue of background generations: rows with `background` that are `queued`. A claimed row carries
//! the owner's process id until it has ended, which is how rows of a dead process are found. `owner` and `attempt`
//! together are the fencing token: a process that was declared dead and comes back cannot write.

mod queue;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, number, places};
use super::{GenerationStatus, Listed, Made, Page, Queue, Registry, RegistryError, StoredImage};
use coar_core::concept::ConceptKind;
use coar_core::engine::SamplingParams;
use coar_core::ids::{GenerationId, ProcessId, TenantId};
use coar_core::image::{ImageFormat, OutputFormat};

/// All settings, resolved: equal values generate equal images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationSettings {
    /// Number of images.
    pub n: u32,
    #[serde(flatten)]
    pub sampling: SamplingParams,
    /// Index of the first image within the seed.
    pub first_index: u32,
    pub output_format: ImageFormat,
    /// Quality of JPEG, 1 to 100, and of WebP, 0 to 99; 100 is lossless.
    pub output_compression: u8,
    /// Partial images per image that a reader gets.
    pub partial_images: u32,
}

impl GenerationSettings {
    /// File format.
    pub fn format(&self) -> OutputFormat {
        match self.output_format {
            ImageFormat::Png => OutputFormat::Png,
            ImageFormat::Jpeg => OutputFormat::Jpeg(self.output_compression),
            ImageFormat::WebP if self.output_compression < 100 => OutputFormat::LossyWebP(self.output_compression),
            ImageFormat::WebP => OutputFormat::WebP,
        }
    }
}

/// A concept and the version in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationConcept {
    pub name: String,
    pub kind: ConceptKind,
    /// The version's number.
    pub version: u32,
    /// SHA-256 of the concept file.
    pub hash: String,
}

/// Token usage of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUsage {
    /// Of the prompt.
    pub text_tokens: u64,
    /// Of all its images.
    pub image_tokens: u64,
}

/// A generation that is not stored yet.
#[derive(Debug, Clone, PartialEq)]
pub struct NewGeneration {
    pub tenant: TenantId,
    /// No caller waits for it on a connection: it runs from the queue and is retried after a crash.
    pub background: bool,
    pub prompt: String,
    pub settings: GenerationSettings,
    pub concepts: Vec<GenerationConcept>,
    /// JSON object of strings.
    pub metadata: Value,
    pub webhook_url: Option<String>,
    /// Codes to generate.
    pub total: u32,
    /// Priority among the tenant's own; higher runs first.
    pub priority: i32,
}

/// A stored generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub id: GenerationId,
    pub status: GenerationStatus,
    pub new: NewGeneration,
    /// Codes generated; stored at the end.
    pub done: u32,
    pub usage: Option<TokenUsage>,
    /// `{code, message, field}`
    pub error: Option<Value>,
    /// How often it was started.
    pub attempt: u32,
    /// The process that runs it or is about to run it.
    pub owner: Option<ProcessId>,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// A generation fails for good after this many attempts.
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
    /// `QueueFull` for a background one; when the database fails.
    pub async fn add_generation(&self, new: NewGeneration) -> Result<Generation, RegistryError> {
        let (id, created_at) = (GenerationId::new(), self.lease_time().await?);
        let owner = (!new.background).then_some(self.process);
        let mut transaction = self.write().await?;
        // Foreground generations are limited by the engine's queue.
        if new.background {
            self.check_queue_in(&mut *transaction, Queue::Generations, new.tenant)
                .await?;
        }
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
        // A foreground generation is not bound to the key: a retry starts a new one.
        if new.background {
            self.bind_key(&mut transaction, Made::Generation(id)).await?;
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
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(generation).transpose()
    }

    /// A tenant's generations, newest first; with or without a filter on the status.
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
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(page.cut(rows.iter().map(generation).collect::<Result<_, _>>()?))
    }

    /// The images of each of a tenant's generations, in order, and for queued ones their position in the queue of all
    /// tenants. Two statements for any number of generations.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generation_details(
        &self,
        tenant: TenantId,
        generations: &[Generation],
    ) -> Result<Vec<(Vec<StoredImage>, Option<u32>)>, RegistryError> {
        let all: Vec<GenerationId> = generations.iter().map(|generation| generation.id).collect();
        let mut images: HashMap<GenerationId, Vec<StoredImage>> = HashMap::new();
        for image in self.images(tenant, &all).await? {
            if let Some(generation) = image.generation {
                images.entry(generation).or_default().push(image);
            }
        }
        let queued = generations
            .iter()
            .filter(|generation| generation.status == GenerationStatus::Queued);
        let queued: Vec<GenerationId> = queued.map(|generation| generation.id).collect();
        let positions = self.queue_positions(&queued).await?;
        let details = |id: &GenerationId| (images.remove(id).unwrap_or_default(), positions.get(id).copied());
        Ok(all.iter().map(details).collect())
    }

    /// For each of these, how many queued generations of all tenants are older.
    async fn queue_positions(&self, ids: &[GenerationId]) -> Result<HashMap<GenerationId, u32>, RegistryError> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let statement = format!(
            "SELECT g.id, (SELECT count(*) FROM generations o WHERE o.status = 'queued' AND o.id < g.id) AS position
             FROM generations g WHERE g.id IN ({})",
            places(1, ids.len())
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(statement));
        for id in ids {
            query = query.bind(id.to_string());
        }
        let rows = query.fetch_all(&self.pools.reads).await?;
        rows.iter()
            .map(|row| Ok((identifier(row, "id")?, number(row, "position")?)))
            .collect()
    }

    /// Every queued background generation, with its tenant.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn queued_generations(&self) -> Result<Vec<(GenerationId, TenantId)>, RegistryError> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT id, tenant_id FROM generations WHERE status = 'queued' AND background = 1")
                .fetch_all(&self.pools.reads)
                .await?;
        let parsed = |(id, tenant): (String, String)| Some((id.parse().ok()?, tenant.parse().ok()?));
        Ok(rows.into_iter().filter_map(parsed).collect())
    }

    /// Number of generations per status.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn generation_counts(&self) -> Result<Vec<(GenerationStatus, i64)>, RegistryError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT status, count(*) FROM generations GROUP BY status")
            .fetch_all(&self.pools.reads)
            .await?;
        let counts = |status: GenerationStatus| {
            let row = rows.iter().find(|(word, _)| word == status.as_str());
            (status, row.map_or(0, |(_, count)| *count))
        };
        Ok(GenerationStatus::ALL.map(counts).to_vec())
    }

    /// Removes a tenant's generation and its images. False if there is none.
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
        let answers = self
            .forget_answers(&mut transaction, tenant, Made::Generation(id))
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().map(|(blob,)| blob).chain(answers).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(deleted.rows_affected() > 0)
    }

    /// Removes generations of all tenants that ended longer than `age` ago; returns how many. Their images have
    /// expired earlier: see [`Registry::expire_images`].
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
        .execute(&self.pools.writes)
        .await?;
        Ok(expired.rows_affected())
    }
}
