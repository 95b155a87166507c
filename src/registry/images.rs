//! Drawn images that are kept, each of a generation.

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, locking, number, optional_number, places};
use super::{Registry, RegistryError};
use coar_core::ids::{GenerationId, ImageId, TenantId};
use coar_core::image::ImageFormat;

/// A stored image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    pub id: ImageId,
    pub tenant: TenantId,
    /// `None`: drawn before generations were kept.
    pub generation: Option<GenerationId>,
    /// Which image of its seed.
    pub index: u32,
    pub seed: Option<u64>,
    /// Width and height in pixels; 0 where it was drawn before they were noted.
    pub size: (u32, u32),
    /// SHA-256 of the file.
    pub blob: String,
    pub format: ImageFormat,
    pub created_at: i64,
    /// `None`: as long as the server keeps images.
    pub expires_at: Option<i64>,
}

fn image(row: &AnyRow) -> Result<StoredImage, RegistryError> {
    let media: String = row.try_get("content_type")?;
    let formats = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
    let generation: Option<String> = row.try_get("generation_id")?;
    let side = |column: &str| optional_number(row, column).map(Option::unwrap_or_default);
    Ok(StoredImage {
        id: identifier(row, "id")?,
        tenant: identifier(row, "tenant_id")?,
        generation: generation
            .is_some()
            .then(|| identifier(row, "generation_id"))
            .transpose()?,
        index: number(row, "idx")?,
        seed: row.try_get::<Option<i64>, _>("seed")?.map(|seed| seed as u64),
        size: (side("width")?, side("height")?),
        blob: row.try_get("blob")?,
        format: formats
            .into_iter()
            .find(|format| format.media_type() == media)
            .ok_or_else(|| RegistryError::Row(format!("content_type `{media}`")))?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
    })
}

impl Registry {
    /// Remembers an image whose blob is stored, of the generation's attempt that this process draws.
    ///
    /// # Errors
    /// `LeaseLost` when it is another's by now, has ended, or is gone; when the database fails.
    pub async fn add_image(&self, image: &StoredImage, attempt: u32) -> Result<(), RegistryError> {
        let statement = locking!(
            self.backend,
            "INSERT INTO images (id, tenant_id, generation_id, idx, seed, width, height, blob, content_type, created_at,
             expires_at) SELECT $1, g.tenant_id, g.id, $2, $3, $4, $5, $6, $7, $8, $9 FROM generations g
             WHERE g.id = $10 AND g.tenant_id = $11 AND g.owner = $12 AND g.attempt = $13 AND g.status = 'running'
             AND NOT EXISTS (SELECT 1 FROM images i WHERE i.id = $1)",
            " FOR SHARE OF g"
        );
        let added = sqlx::query(statement)
            .bind(image.id.to_string())
            .bind(i64::from(image.index))
            .bind(image.seed.map(|seed| seed as i64))
            .bind(i64::from(image.size.0))
            .bind(i64::from(image.size.1))
            .bind(&image.blob)
            .bind(image.format.media_type())
            .bind(image.created_at)
            .bind(image.expires_at)
            .bind(image.generation.map(|id| id.to_string()))
            .bind(image.tenant.to_string())
            .bind(self.process.to_string())
            .bind(i64::from(attempt))
            .execute(&self.pools.writes)
            .await?;
        if added.rows_affected() > 0 {
            return Ok(());
        }
        // Added before, and the answer was lost?
        match self.signed_image(image.id).await? {
            Some(_) => Ok(()),
            None => Err(RegistryError::LeaseLost),
        }
    }

    /// Forgets images past their own time, or without one older than `age`, of all tenants, and removes their bytes;
    /// returns how many.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn expire_images(&self, age: std::time::Duration) -> Result<usize, RegistryError> {
        // By the clock of all processes: one whose own is off would remove what is young.
        let at = self.lease_time().await?;
        let before = at.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let rows: Vec<(String,)> = sqlx::query_as(
            "DELETE FROM images WHERE expires_at < $1 OR (expires_at IS NULL AND created_at < $2) RETURNING blob",
        )
        .bind(at)
        .bind(before)
        .fetch_all(&self.pools.writes)
        .await?;
        let blobs: Vec<String> = rows.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(blobs.len())
    }

    /// An image of whatever tenant: for callers that were shown a signed address of it, and nobody else.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn signed_image(&self, id: ImageId) -> Result<Option<StoredImage>, RegistryError> {
        let row = sqlx::query("SELECT * FROM images WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(image).transpose()
    }

    /// Images of some of a tenant's generations, in the order of each.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn images(
        &self,
        tenant: TenantId,
        generations: &[GenerationId],
    ) -> Result<Vec<StoredImage>, RegistryError> {
        if generations.is_empty() {
            return Ok(vec![]);
        }
        let statement = format!(
            "SELECT * FROM images WHERE tenant_id = $1 AND generation_id IN ({}) ORDER BY idx",
            places(2, generations.len())
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(tenant.to_string());
        for generation in generations {
            query = query.bind(generation.to_string());
        }
        let rows = query.fetch_all(&self.pools.reads).await?;
        rows.iter().map(image).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::registry::{GenerationSettings, NewGeneration, now};

    #[tokio::test]
    async fn expired_images_are_forgotten_and_their_bytes_removed() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let new = NewGeneration {
            tenant: TenantId::DEFAULT,
            background: false,
            prompt: String::new(),
            settings: GenerationSettings {
                sampling: coar_core::engine::SamplingParams {
                    width: 96,
                    height: 64,
                    seed: (1 << 53) - 1,
                    guidance_scale: 1.0,
                    temperature: 1.0,
                    top_k: 0,
                    identity_mask: true,
                },
                n: 2,
                first_index: 0,
                output_format: ImageFormat::WebP,
                output_compression: 100,
                partial_images: 0,
            },
            concepts: vec![],
            metadata: serde_json::json!({}),
            webhook_url: None,
            total: 0,
            priority: 0,
        };
        let generation = registry.add_generation(new).await.unwrap();
        registry.begin_generation(generation.id, 0, now()).await.unwrap();
        let mut stored = Vec::new();
        for (bytes, created_at) in [(&b"old"[..], now() - 7_200_000), (b"new", now())] {
            let image = StoredImage {
                id: ImageId::new(),
                tenant: TenantId::DEFAULT,
                generation: Some(generation.id),
                index: 3,
                seed: Some((1 << 53) - 1),
                size: (96, 64),
                blob: registry.blobs.put(bytes.into()).await.unwrap(),
                format: ImageFormat::WebP,
                created_at,
                expires_at: None,
            };
            registry.add_image(&image, 1).await.unwrap();
            stored.push(image);
        }
        let (old, new) = (&stored[0], &stored[1]);
        assert_eq!(registry.expire_images(Duration::from_secs(3600)).await.unwrap(), 1);
        assert_eq!(registry.signed_image(old.id).await.unwrap(), None);
        assert_eq!(registry.signed_image(new.id).await.unwrap().as_ref(), Some(new));
        assert_eq!(registry.blobs.all().await.unwrap(), vec![new.blob.clone()]);
    }
}
