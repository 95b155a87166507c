//! Generated pictures that are answered by URL.

use super::{Registry, RegistryError, now};
use crate::ids::ImageId;

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
    pub async fn add_image(&self, id: ImageId, image: &StoredImage) -> Result<(), RegistryError> {
        sqlx::query("INSERT INTO images (id, blob, content_type, created_at) VALUES ($1, $2, $3, $4)")
            .bind(id.to_string())
            .bind(&image.blob)
            .bind(&image.content_type)
            .bind(now())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// A picture by its identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn image(&self, id: ImageId) -> Result<Option<StoredImage>, RegistryError> {
        let row: Option<(String, String)> = sqlx::query_as("SELECT blob, content_type FROM images WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.map(|(blob, content_type)| StoredImage { blob, content_type }))
    }
}
