//! Stored responses to requests with an `Idempotency-Key`, and leases on keys whose request is still running. Small
//! responses are in the row, larger ones in the blob store.
//!
//! A row without a status and without a blob is a running request: until `expires_at`, its lease, no other request
//! can claim the key. `created_at` is the fencing token: a later attempt has a later one, so a request that lost its
//! lease cannot write.

use bytes::Bytes;

use super::pool::Transaction;
use super::{Registry, RegistryError};
use coar_core::ids::{ConceptId, GenerationId, TenantId, TrainingId};

/// A response to be replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    pub status: u16,
    pub location: Option<String>,
    pub content_type: Option<String>,
    pub body: Bytes,
}

/// The object that a request with a key has created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    Concept(ConceptId),
    Training(TrainingId),
    Generation(GenerationId),
}

impl std::fmt::Display for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Concept(id) => id.fmt(f),
            Self::Training(id) => id.fmt(f),
            Self::Generation(id) => id.fmt(f),
        }
    }
}

impl std::str::FromStr for Made {
    type Err = RegistryError;

    /// The identifier formats are disjoint: at most one of the three parses.
    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let concept = || text.parse().map(Self::Concept).ok();
        let training = || text.parse().map(Self::Training).ok();
        let generation = || text.parse().map(Self::Generation).ok();
        concept()
            .or_else(training)
            .or_else(generation)
            .ok_or_else(|| RegistryError::Row(format!("made `{text}`")))
    }
}

/// The right to execute the request of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyClaim {
    tenant: TenantId,
    key: String,
    began: i64,
}

/// What to do with a request that has a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The key is new or its lease has expired: execute the request and store the response.
    Acquired(KeyClaim),
    /// A request with this key is running.
    InProgress,
    /// The key was used with a different request.
    Mismatch,
    Replay(StoredAnswer),
    /// The object was created, but its process died before it stored the response.
    Orphaned(Made),
}

tokio::task_local! {
    /// The claim under which the current task creates objects.
    static CLAIM: KeyClaim;
}

impl KeyClaim {
    /// The claim of the current task.
    pub fn current() -> Option<Self> {
        CLAIM.try_with(Clone::clone).ok()
    }

    /// Runs a future under the claim: what it creates is bound to the key from the start.
    pub async fn under<F: Future>(self, work: F) -> F::Output {
        CLAIM.scope(self, work).await
    }
}

/// How long a key without a response stays bound to the object it created.
const MADE_MS: i64 = 24 * 60 * 60 * 1000;
/// Larger bodies are stored as blobs. Responses that name an object are far below this; responses with images are
/// above.
const BODY_LIMIT: usize = 16 << 10;

impl Registry {
    /// Claims a key, unless its lease is held or it has a response.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_key(
        &self,
        tenant: TenantId,
        key: &str,
        fingerprint: &str,
        lease_ms: i64,
    ) -> Result<Claim, RegistryError> {
        type Row = (
            String,
            Option<i64>,
            Option<String>,
            Option<String>,
            Option<Vec<u8>>,
            i64,
            i64,
            Option<String>,
            Option<String>,
            Option<i64>,
        );
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        // A lock on the name: there may be no row yet to lock.
        self.hold_name(&mut transaction, "idempotency key", &format!("{tenant} {key}"))
            .await?;
        let found: Option<Row> = sqlx::query_as(
            "SELECT fingerprint, status, location, content_type, body, created_at, expires_at, made, blob, blob_status
             FROM idempotency_keys WHERE tenant_id = $1 AND key = $2",
        )
        .bind(tenant.to_string())
        .bind(key)
        .fetch_optional(&mut *transaction)
        .await?;
        let (mut began, mut outdated) = (at, None);
        if let Some((before, status, location, content_type, body, created_at, expires_at, made, blob, blob_status)) =
            found
        {
            let status = status.or(blob_status);
            if let (true, None, Some(made)) = (at >= expires_at && at < created_at + MADE_MS, status, made) {
                return Ok(match before == fingerprint {
                    true => Claim::Orphaned(made.parse()?),
                    false => Claim::Mismatch,
                });
            }
            if at < expires_at {
                if before != fingerprint {
                    return Ok(Claim::Mismatch);
                }
                let Some(status) = status else {
                    return Ok(Claim::InProgress);
                };
                // End the transaction before the blob store is read.
                drop(transaction);
                return Ok(Claim::Replay(StoredAnswer {
                    status: u16::try_from(status).map_err(|error| RegistryError::Row(error.to_string()))?,
                    location,
                    content_type,
                    body: match (body, blob) {
                        (Some(body), _) => body.into(),
                        (None, Some(blob)) => self.blobs.get(&blob).await?,
                        (None, None) => Bytes::new(),
                    },
                }));
            }
            began = at.max(created_at + 1);
            outdated = blob;
        }
        sqlx::query(
            "INSERT INTO idempotency_keys (tenant_id, key, fingerprint, created_at, expires_at) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (tenant_id, key) DO UPDATE SET fingerprint = excluded.fingerprint, status = NULL, location = NULL,
             content_type = NULL, body = NULL, blob = NULL, blob_status = NULL, made = NULL, created_at = excluded.created_at, expires_at = excluded.expires_at",
        )
        .bind(tenant.to_string())
        .bind(key)
        .bind(fingerprint)
        .bind(began)
        .bind(at + lease_ms)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        // If this fails, the next sweep removes it.
        if let Some(outdated) = outdated
            && let Err(error) = self.remove_unreferenced(&[outdated]).await
        {
            tracing::warn!(%error, "could not remove an expired response");
        }
        Ok(Claim::Acquired(KeyClaim {
            tenant,
            key: key.to_owned(),
            began,
        }))
    }

    /// If the current task works under a key, binds the key to the object it creates, in the transaction that
    /// creates it.
    ///
    /// # Errors
    /// `LeaseLost` if another request has claimed the key since: then nothing may be created; when the database
    /// fails.
    pub(super) async fn bind_key(&self, transaction: &mut Transaction, made: Made) -> Result<(), RegistryError> {
        let Ok(claim) = CLAIM.try_with(Clone::clone) else {
            return Ok(());
        };
        let changed = sqlx::query(
            "UPDATE idempotency_keys SET made = $1
             WHERE tenant_id = $2 AND key = $3 AND created_at = $4 AND status IS NULL AND blob IS NULL",
        )
        .bind(made.to_string())
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&mut **transaction)
        .await?;
        match changed.rows_affected() {
            0 => Err(RegistryError::LeaseLost),
            _ => Ok(()),
        }
    }

    /// As [`Self::bind_key`], for an object that is complete and whose caller waits for it: the response may
    /// already be stored.
    ///
    /// # Errors
    /// As [`Self::bind_key`].
    pub(super) async fn bind_key_if_open(
        &self,
        transaction: &mut Transaction,
        made: Made,
    ) -> Result<(), RegistryError> {
        let Some(claim) = KeyClaim::current() else {
            return Ok(());
        };
        let changed =
            sqlx::query("UPDATE idempotency_keys SET made = $1 WHERE tenant_id = $2 AND key = $3 AND created_at = $4")
                .bind(made.to_string())
                .bind(claim.tenant.to_string())
                .bind(&claim.key)
                .bind(claim.began)
                .execute(&mut **transaction)
                .await?;
        match changed.rows_affected() {
            0 => Err(RegistryError::LeaseLost),
            _ => Ok(()),
        }
    }

    /// Renews the lease of a running request.
    ///
    /// # Errors
    /// `LeaseLost` if another request has claimed the key since; when the database fails.
    pub async fn renew_key(&self, claim: &KeyClaim, lease_ms: i64) -> Result<(), RegistryError> {
        let changed = sqlx::query(
            "UPDATE idempotency_keys SET expires_at = $1
             WHERE tenant_id = $2 AND key = $3 AND created_at = $4 AND status IS NULL AND blob IS NULL",
        )
        .bind(self.lease_time().await? + lease_ms)
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pools.writes)
        .await?;
        match changed.rows_affected() {
            0 => Err(RegistryError::LeaseLost),
            _ => Ok(()),
        }
    }

    /// Stores the response for `keep_ms`. No effect if the lease was lost.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn store_answer(
        &self,
        claim: &KeyClaim,
        answer: &StoredAnswer,
        keep_ms: i64,
    ) -> Result<(), RegistryError> {
        if answer.body.len() <= BODY_LIMIT {
            self.write_answer(claim, answer, None, keep_ms).await?;
            return Ok(());
        }
        let stored = self.store(vec![answer.body.clone()]).await?;
        let written = self.write_answer(claim, answer, Some(stored.first()), keep_ms).await;
        self.settle(stored, matches!(written, Ok(true))).await;
        written.map(|_| ())
    }

    /// False if the lease was lost.
    async fn write_answer(
        &self,
        claim: &KeyClaim,
        answer: &StoredAnswer,
        blob: Option<&str>,
        keep_ms: i64,
    ) -> Result<bool, RegistryError> {
        let body = blob.is_none().then(|| answer.body.to_vec());
        let written = sqlx::query(
            "UPDATE idempotency_keys SET status = $1, location = $2, content_type = $3, body = $4, expires_at = $5, blob = $9,
             blob_status = $10 WHERE tenant_id = $6 AND key = $7 AND created_at = $8 AND status IS NULL AND blob IS NULL",
        )
        .bind(blob.is_none().then_some(i64::from(answer.status)))
        .bind(&answer.location)
        .bind(&answer.content_type)
        .bind(body)
        .bind(self.lease_time().await? + keep_ms)
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .bind(blob)
        .bind(blob.is_some().then_some(i64::from(answer.status)))
        .execute(&self.pools.writes)
        .await?;
        Ok(written.rows_affected() > 0)
    }

    /// Removes every response that contains an object that is being deleted. A request for it that is still running can
    /// no longer store a response. The keys stay bound to the object: a retry creates nothing and is answered that the
    /// object was deleted. Returns the blobs of the responses.
    ///
    /// # Errors
    /// When the database fails.
    pub(super) async fn forget_answers(
        &self,
        transaction: &mut Transaction,
        tenant: TenantId,
        made: Made,
    ) -> Result<Vec<String>, RegistryError> {
        let blobs: Vec<(String,)> =
            sqlx::query_as("SELECT blob FROM idempotency_keys WHERE tenant_id = $1 AND made = $2 AND blob IS NOT NULL")
                .bind(tenant.to_string())
                .bind(made.to_string())
                .fetch_all(&mut **transaction)
                .await?;
        sqlx::query(
            "UPDATE idempotency_keys SET status = NULL, location = NULL, content_type = NULL, body = NULL, blob = NULL,
             blob_status = NULL, expires_at = 0, created_at = created_at + 1 WHERE tenant_id = $1 AND made = $2",
        )
        .bind(tenant.to_string())
        .bind(made.to_string())
        .execute(&mut **transaction)
        .await?;
        Ok(blobs.into_iter().map(|(blob,)| blob).collect())
    }

    /// Binds the key of a running request to a generation that its response contains, so that the response is removed
    /// with the generation. False if the generation was deleted or the lease is lost.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_made(&self, claim: &KeyClaim, id: GenerationId) -> Result<bool, RegistryError> {
        let bound = sqlx::query(
            "UPDATE idempotency_keys SET made = coalesce(made, $1) WHERE tenant_id = $2 AND key = $3 AND created_at = $4
             AND status IS NULL AND blob IS NULL AND EXISTS (SELECT 1 FROM generations WHERE id = $1)",
        )
        .bind(id.to_string())
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pools.writes)
        .await?;
        Ok(bound.rows_affected() > 0)
    }

    /// Binds the key to the object that the request created and discards its response, which is too large to be stored:
    /// a retry is answered with the object's current state. False if the request created no object.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn answer_by_object(&self, claim: &KeyClaim) -> Result<bool, RegistryError> {
        let bound = sqlx::query(
            "UPDATE idempotency_keys SET expires_at = 0
             WHERE tenant_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL AND blob IS NULL AND made IS NOT NULL",
        )
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pools.writes)
        .await?;
        Ok(bound.rows_affected() > 0)
    }

    /// Releases the key of a request that failed, unless the request has created an object.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_key(&self, claim: &KeyClaim) -> Result<(), RegistryError> {
        sqlx::query(
            "DELETE FROM idempotency_keys
             WHERE tenant_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL AND blob IS NULL AND made IS NULL",
        )
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pools.writes)
        .await?;
        Ok(())
    }

    /// Releases the keys of all running requests of an earlier process. Only the owner of the data folder's lock may
    /// call it, before it accepts requests.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_keys(&self) -> Result<u64, RegistryError> {
        sqlx::query(
            "UPDATE idempotency_keys SET expires_at = 0 WHERE status IS NULL AND blob IS NULL AND made IS NOT NULL",
        )
        .execute(&self.pools.writes)
        .await?;
        let released =
            sqlx::query("DELETE FROM idempotency_keys WHERE status IS NULL AND blob IS NULL AND made IS NULL")
                .execute(&self.pools.writes)
                .await?;
        Ok(released.rows_affected())
    }

    /// Removes expired responses and their bytes; returns how many.
    ///
    /// # Errors
    /// When the database or the blob store fails.
    pub async fn expire_keys(&self) -> Result<usize, RegistryError> {
        let at = self.lease_time().await?;
        let removed: Vec<(Option<String>,)> = sqlx::query_as(
            "DELETE FROM idempotency_keys
             WHERE expires_at < $1 AND (status IS NOT NULL OR blob IS NOT NULL OR created_at < $2) RETURNING blob",
        )
        .bind(at)
        .bind(at - MADE_MS)
        .fetch_all(&self.pools.writes)
        .await?;
        let blobs: Vec<String> = removed.iter().filter_map(|(blob,)| blob.clone()).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(removed.len())
    }
}

#[cfg(test)]
mod tests;
