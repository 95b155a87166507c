//! Generated pictures that are answered by URL.

use super::{Registry, RegistryError, now};
use crate::ids::{ImageId, TenantId};

/// A stored picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    pub blob: String,
    pub content_type: String,
}

impl Registry {
    /// Remembers a picture whose blob is stored.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_image(&self, tenant: TenantId, id: ImageId, image: &StoredImage) -> Result<(), RegistryError> {
        sqlx::query("INSERT INTO images (id, tenant_id, blob, content_type, created_at) VALUES ($1, $2, $3, $4, $5)")
            .bind(id.to_string())
            .bind(tenant.to_string())
            .bind(&image.blob)
            .bind(&image.content_type)
            .bind(now())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Forgets pictures past their own time, or without one older than `age`, of all tenants, and removes their bytes;
    /// returns how many.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn expire_images(&self, age: std::time::Duration) -> Result<usize, RegistryError> {
        let at = now();
        let before = at.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let rows: Vec<(String,)> = sqlx::query_as(
            "DELETE FROM images WHERE expires_at < $1 OR (expires_at IS NULL AND created_at < $2) RETURNING blob",
        )
        .bind(at)
        .bind(before)
        .fetch_all(&self.pool)
        .await?;
        let blobs: Vec<String> = rows.into_iter().map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(blobs.len())
    }

    /// A tenant's picture by its identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn image(&self, tenant: TenantId, id: ImageId) -> Result<Option<StoredImage>, RegistryError> {
        let row: Option<(String, String)> =
            sqlx::query_as("SELECT blob, content_type FROM images WHERE tenant_id = $1 AND id = $2")
                .bind(tenant.to_string())
                .bind(id.to_string())
                .fetch_optional(&self.pool)
                .await?;
        Ok(row.map(|(blob, content_type)| StoredImage { blob, content_type }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn expired_pictures_are_forgotten_and_their_bytes_removed() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        let (old, new) = (ImageId::new(), ImageId::new());
        let mut stored = Vec::new();
        for (id, bytes) in [(old, &b"old"[..]), (new, b"new")] {
            let image = StoredImage {
                blob: registry.blobs.put(bytes.into()).await.unwrap(),
                content_type: "image/png".to_owned(),
            };
            registry.add_image(TenantId::DEFAULT, id, &image).await.unwrap();
            stored.push(image.blob);
        }
        sqlx::query("UPDATE images SET created_at = created_at - 7200000 WHERE id = $1")
            .bind(old.to_string())
            .execute(&registry.pool)
            .await
            .unwrap();
        assert_eq!(registry.expire_images(Duration::from_secs(3600)).await.unwrap(), 1);
        assert_eq!(registry.image(TenantId::DEFAULT, old).await.unwrap(), None);
        assert!(registry.image(TenantId::DEFAULT, new).await.unwrap().is_some());
        assert_eq!(registry.blobs.all().await.unwrap(), vec![stored[1].clone()]);
    }
}
