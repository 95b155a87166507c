//! Protection of blobs between the write of their bytes and of the rows that refer to them.
//!
//! Bytes are stored before a row refers to them and removed after the last such row is deleted. In between, the rows do
//! not show whether a blob is needed. A *hold* does: a row that is written before the first byte is sent and deleted
//! once the referring row exists. A removal takes a hold too, and only on a blob that no row refers to and that is not
//! being stored; storing that blob waits for the removal.
//!
//! Holds are rows and not locks, since the blob store may be slow: no transaction and no connection is kept while it
//! works. The holds of a process that dies expire; [`Registry::expire_holds`] cleans up after them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;

use super::blobs::content_hash;
use super::{Registry, RegistryError};

/// Lifetime of a hold for storing: longer than any retry between the bytes and their row.
const STORING_MS: i64 = 30 * 60 * 1000;
/// Lifetime of a hold for removal: several times as long as the blob store's client retries.
const REMOVING_MS: i64 = 5 * 60 * 1000;
/// How long storing waits for a removal of the same bytes, and the poll interval.
const REMOVAL: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);
/// Maximum number of blobs per transaction.
const AT_ONCE: usize = 64;

/// Bytes that are kept until [`Registry::settle`], even if no row refers to them.
#[derive(Debug)]
#[must_use]
pub struct Stored {
    hashes: Vec<String>,
    holder: String,
}

impl Stored {
    /// The hashes of all of them, in the order given.
    pub fn hashes(&self) -> &[String] {
        &self.hashes
    }

    /// The hash of the first; empty if nothing was stored.
    pub fn first(&self) -> &str {
        self.hashes.first().map_or("", String::as_str)
    }
}

impl Registry {
    /// Stores bytes and holds them until [`Self::settle`], so that a row that refers to them can be written.
    ///
    /// # Errors
    /// When the store or the database fails.
    pub async fn store(&self, all: Vec<Bytes>) -> Result<Stored, RegistryError> {
        let mut stored = self.begin_storing();
        let sizes: Vec<_> = all.iter().map(|bytes| (content_hash(bytes), bytes.len())).collect();
        self.hold(&sizes, &stored.holder).await?;
        stored.hashes = sizes.into_iter().map(|(hash, _)| hash).collect();
        for (hash, bytes) in stored.hashes.iter().zip(all) {
            self.put(&stored, hash, bytes).await?;
        }
        Ok(stored)
    }

    /// An empty hold, for [`Self::store_more`].
    pub fn begin_storing(&self) -> Stored {
        Stored {
            hashes: vec![],
            holder: Uuid::new_v4().to_string(),
        }
    }

    /// Stores more bytes under a hold, and holds them too. If it fails, everything under the hold is removed later.
    ///
    /// # Errors
    /// When the store or the database fails.
    pub async fn store_more(&self, stored: &mut Stored, bytes: Bytes) -> Result<(), RegistryError> {
        let hash = content_hash(&bytes);
        if !stored.hashes.contains(&hash) {
            self.hold(&[(hash.clone(), bytes.len())], &stored.holder).await?;
            self.put(stored, &hash, bytes).await?;
        }
        stored.hashes.push(hash);
        Ok(())
    }

    async fn put(&self, stored: &Stored, hash: &str, bytes: Bytes) -> Result<(), RegistryError> {
        if let Err(error) = self.blobs.put_as(hash, bytes).await {
            // No removal here: a store that rejects writes will not remove either, and the caller has waited
            // long enough.
            self.expire_hold(&stored.holder).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Releases a hold. With `referred`, a row refers to the bytes now; otherwise bytes that no row refers to are
    /// removed. If the database or the store fails, [`Self::expire_holds`] cleans up later.
    pub async fn settle(&self, stored: Stored, referred: bool) {
        let settled = async {
            self.end_hold(&stored.holder).await?;
            match referred {
                true => Ok(()),
                false => self.remove_unreferenced(&stored.hashes).await,
            }
        };
        if let Err(error) = settled.await {
            tracing::warn!(%error, "cannot release a hold on stored blobs; it will expire");
        }
    }

    async fn hold(&self, sizes: &[(String, usize)], holder: &str) -> Result<(), RegistryError> {
        let since = Instant::now();
        // In a fixed order, so that two callers do not deadlock.
        let mut distinct: Vec<&(String, usize)> = sizes.iter().collect();
        distinct.sort_unstable();
        distinct.dedup();
        while !self.try_hold(&distinct, holder).await? {
            if since.elapsed() > REMOVAL {
                return Err(RegistryError::BlobBusy);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// False if one of them is being removed.
    async fn try_hold(&self, sizes: &[&(String, usize)], holder: &str) -> Result<bool, RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        for (hash, bytes) in sizes {
            self.hold_name(&mut transaction, "blob", hash).await?;
            let removing = sqlx::query(
                "SELECT holder FROM blob_holds WHERE hash = $1 AND removing = 1 AND expires_at >= $2 LIMIT 1",
            )
            .bind(hash.as_str())
            .bind(at)
            .fetch_optional(&mut *transaction)
            .await?;
            if removing.is_some() {
                return Ok(false);
            }
            sqlx::query("INSERT INTO blob_holds (hash, holder, removing, expires_at) VALUES ($1, $2, 0, $3)")
                .bind(hash.as_str())
                .bind(holder)
                .bind(at + STORING_MS)
                .execute(&mut *transaction)
                .await?;
            sqlx::query("INSERT INTO blobs (hash, bytes) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING")
                .bind(hash.as_str())
                .bind(i64::try_from(*bytes).unwrap_or(i64::MAX))
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    async fn end_hold(&self, holder: &str) -> Result<(), RegistryError> {
        sqlx::query("DELETE FROM blob_holds WHERE holder = $1")
            .bind(holder)
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Expires a hold at once; [`Self::expire_holds`] removes what was stored under it.
    async fn expire_hold(&self, holder: &str) -> Result<(), RegistryError> {
        sqlx::query("UPDATE blob_holds SET expires_at = 0 WHERE holder = $1")
            .bind(holder)
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Removes blobs that no row refers to.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn remove_unreferenced(&self, hashes: &[String]) -> Result<(), RegistryError> {
        self.remove(hashes).await.map(|_| ())
    }

    /// Removes those of the blobs that no row refers to and that are not being stored; returns how many.
    async fn remove(&self, hashes: &[String]) -> Result<usize, RegistryError> {
        let mut hashes = hashes.to_vec();
        hashes.sort_unstable();
        hashes.dedup();
        let mut removed = 0;
        for some in hashes.chunks(AT_ONCE) {
            removed += self.remove_some(some).await?;
        }
        Ok(removed)
    }

    async fn remove_some(&self, hashes: &[String]) -> Result<usize, RegistryError> {
        if hashes.is_empty() {
            return Ok(0);
        }
        let holder = Uuid::new_v4().to_string();
        let unwanted = self.hold_unwanted(hashes, &holder).await?;
        for hash in &unwanted {
            if let Err(error) = self.blobs.remove(hash).await {
                self.expire_hold(&holder).await?;
                return Err(error.into());
            }
        }
        if !unwanted.is_empty() {
            self.end_hold(&holder).await?;
        }
        Ok(unwanted.len())
    }

    /// Takes a removal hold on the blobs that no row refers to and that are not being stored.
    async fn hold_unwanted<'a>(&self, hashes: &'a [String], holder: &str) -> Result<Vec<&'a String>, RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        let mut unwanted = Vec::new();
        for hash in hashes {
            self.hold_name(&mut transaction, "blob", hash).await?;
            // One statement, one snapshot: a storing hold is released after its row is written, so at least one of
            // the two is visible.
            let (uses,): (i64,) = sqlx::query_as(
                "SELECT count(*) FROM (
                     SELECT 1 AS found FROM blob_holds WHERE hash = $1 AND removing = 0 AND expires_at >= $2
                     UNION ALL SELECT 1 FROM concept_pictures WHERE blob = $1
                     UNION ALL SELECT 1 FROM concept_versions WHERE hash = $1
                     UNION ALL SELECT 1 FROM trainings WHERE checkpoint = $1
                     UNION ALL SELECT 1 FROM training_previews WHERE blob = $1
                     UNION ALL SELECT 1 FROM idempotency_keys WHERE blob = $1
                     UNION ALL SELECT 1 FROM images WHERE blob = $1) AS uses",
            )
            .bind(hash)
            .bind(at)
            .fetch_one(&mut *transaction)
            .await?;
            if uses > 0 {
                continue;
            }
            sqlx::query("INSERT INTO blob_holds (hash, holder, removing, expires_at) VALUES ($1, $2, 1, $3)")
                .bind(hash)
                .bind(holder)
                .bind(at + REMOVING_MS)
                .execute(&mut *transaction)
                .await?;
            sqlx::query("DELETE FROM blobs WHERE hash = $1")
                .bind(hash)
                .execute(&mut *transaction)
                .await?;
            unwanted.push(hash);
        }
        if !unwanted.is_empty() {
            transaction.commit().await?;
        }
        Ok(unwanted)
    }

    /// Removes blobs that dead processes left behind while storing or removing, and those that could not be removed
    /// earlier; returns the number of blobs.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn expire_holds(&self) -> Result<usize, RegistryError> {
        let at = self.lease_time().await?;
        let expired: Vec<(String,)> = sqlx::query_as("SELECT DISTINCT hash FROM blob_holds WHERE expires_at < $1")
            .bind(at)
            .fetch_all(&self.pools.reads)
            .await?;
        let expired: Vec<String> = expired.into_iter().map(|(hash,)| hash).collect();
        let removed = self.remove(&expired).await?;
        let mut transaction = self.write().await?;
        for hash in &expired {
            sqlx::query("DELETE FROM blob_holds WHERE hash = $1 AND expires_at < $2")
                .bind(hash)
                .bind(at)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(removed)
    }

    /// Releases every hold. Only the owner of the data folder's lock may call it, before it stores anything: all
    /// other holders are dead.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_holds(&self) -> Result<(), RegistryError> {
        sqlx::query("DELETE FROM blob_holds")
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Removes every blob that no row refers to, such as those left by a crash between storing bytes and writing
    /// their row. Safe while others store.
    ///
    /// # Errors
    /// When the database or the store fails.
    pub async fn collect_garbage(&self) -> Result<usize, RegistryError> {
        let wanted = self.referenced_blobs().await?;
        let mut unwanted = self.blobs.all().await?;
        unwanted.retain(|hash| !wanted.contains(hash));
        self.remove(&unwanted).await
    }

    /// Records the sizes of some blobs that were stored by an earlier release; returns how many. 0: all sizes are
    /// known.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn note_sizes(&self) -> Result<usize, RegistryError> {
        let rows: Vec<(String,)> = sqlx::query_as(
            "SELECT blob FROM (SELECT blob FROM concept_pictures UNION SELECT hash AS blob FROM concept_versions
             UNION SELECT blob FROM images) AS kept WHERE NOT EXISTS (SELECT 1 FROM blobs WHERE hash = blob) LIMIT 500",
        )
        .fetch_all(&self.pools.reads)
        .await?;
        for (hash,) in &rows {
            // A deleted blob takes no space.
            let bytes = self.blobs.size(hash).await?.unwrap_or(0);
            sqlx::query("INSERT INTO blobs (hash, bytes) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING")
                .bind(hash)
                .bind(i64::try_from(bytes).unwrap_or(i64::MAX))
                .execute(&self.pools.writes)
                .await?;
        }
        Ok(rows.len())
    }

    /// Hashes of every blob that a row refers to.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn referenced_blobs(&self) -> Result<std::collections::HashSet<String>, RegistryError> {
        let rows: Vec<(String,)> = sqlx::query_as(
            "SELECT blob FROM concept_pictures UNION SELECT hash FROM concept_versions
             UNION SELECT checkpoint FROM trainings WHERE checkpoint IS NOT NULL
             UNION SELECT blob FROM training_previews UNION SELECT blob FROM images
             UNION SELECT blob FROM idempotency_keys WHERE blob IS NOT NULL",
        )
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(rows.into_iter().map(|(blob,)| blob).collect())
    }
}

#[cfg(test)]
mod tests;
