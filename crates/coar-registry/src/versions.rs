//! Versions of concepts, and the preview images of trainings.

use bytes::Bytes;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::number;
use super::{Listed, Page, Registry, RegistryError, now};
use coar_core::ids::{ConceptId, TenantId, TrainingId};

/// One version of a concept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// From 1, never reused.
    pub number: u32,
    /// SHA-256 of the concept file in the blob store.
    pub hash: String,
    /// `None`: imported.
    pub training: Option<TrainingId>,
    pub created_at: i64,
}

fn version(row: &AnyRow) -> Result<Version, RegistryError> {
    let training: Option<String> = row.try_get("training_id")?;
    let training = training.map(|id| id.parse().map_err(|_| RegistryError::Row(format!("training `{id}`"))));
    Ok(Version {
        number: number(row, "number")?,
        hash: row.try_get("hash")?,
        training: training.transpose()?,
        created_at: row.try_get("created_at")?,
    })
}

impl Registry {
    /// A page of a concept's versions, newest first; paged by number.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn versions(&self, concept: ConceptId, page: Page<u32>) -> Result<Listed<Version>, RegistryError> {
        let rows = sqlx::query(
            "SELECT number, hash, training_id, created_at FROM concept_versions
             WHERE concept_id = $1 AND ($2 IS NULL OR number < $2) ORDER BY number DESC LIMIT $3",
        )
        .bind(concept.to_string())
        .bind(page.after.map(i64::from))
        .bind(page.fetched())
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(page.cut(rows.iter().map(version).collect::<Result<_, _>>()?))
    }

    /// A version of a concept by its number.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn version(&self, concept: ConceptId, number: u32) -> Result<Option<Version>, RegistryError> {
        let row = sqlx::query(
            "SELECT number, hash, training_id, created_at FROM concept_versions WHERE concept_id = $1 AND number = $2",
        )
        .bind(concept.to_string())
        .bind(i64::from(number))
        .fetch_optional(&self.pools.reads)
        .await?;
        row.as_ref().map(version).transpose()
    }

    /// Stores a preview of a training that is running or has succeeded; ignored for any other training or a deleted
    /// one.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn add_preview(&self, training: TrainingId, step: u32, png: Bytes) -> Result<(), RegistryError> {
        let stored = self.store(vec![png]).await?;
        let added = self.replace_preview(training, step, stored.first()).await;
        self.settle(stored, matches!(added, Ok(Some(_)))).await;
        match added? {
            Some(before) => self.remove_unreferenced(&before).await,
            None => Ok(()),
        }
    }

    /// The blobs that are no longer needed; `None`: nothing was stored.
    async fn replace_preview(
        &self,
        training: TrainingId,
        step: u32,
        blob: &str,
    ) -> Result<Option<Vec<String>>, RegistryError> {
        let mut transaction = self.write().await?;
        let before: Option<(String,)> =
            sqlx::query_as("SELECT blob FROM training_previews WHERE training_id = $1 AND step = $2")
                .bind(training.to_string())
                .bind(i64::from(step))
                .fetch_optional(&mut *transaction)
                .await?;
        let added = sqlx::query(
            "INSERT INTO training_previews (training_id, step, blob, created_at) SELECT id, $2, $3, $4 FROM trainings
             WHERE id = $1 AND status IN ('running', 'succeeded')
             ON CONFLICT (training_id, step) DO UPDATE SET blob = excluded.blob, created_at = excluded.created_at",
        )
        .bind(training.to_string())
        .bind(i64::from(step))
        .bind(blob)
        .bind(now())
        .execute(&mut *transaction)
        .await?;
        if added.rows_affected() == 0 {
            return Ok(None);
        }
        transaction.commit().await?;
        Ok(Some(
            before
                .into_iter()
                .map(|(before,)| before)
                .filter(|before| before != blob)
                .collect(),
        ))
    }

    /// The blob of a training's preview after that step.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn preview(
        &self,
        tenant: TenantId,
        training: TrainingId,
        step: u32,
    ) -> Result<Option<String>, RegistryError> {
        let row: Option<(String,)> = sqlx::query_as(
            "SELECT p.blob FROM training_previews p JOIN trainings t ON t.id = p.training_id
             WHERE t.tenant_id = $1 AND t.id = $2 AND p.step = $3",
        )
        .bind(tenant.to_string())
        .bind(training.to_string())
        .bind(i64::from(step))
        .fetch_optional(&self.pools.reads)
        .await?;
        Ok(row.map(|(blob,)| blob))
    }
}
