//! First answers to requests with an `Idempotency-Key`, and who works on one that has none yet. Small answers are in the
//! row, larger ones in the blob store.
//!
//! A row without a status and without a blob is a request that runs: until `expires_at`, its lease, nobody else begins it, and `created_at`
//! is the fence: a later attempt has a later one, so that a worker that lost its lease writes nothing.

use bytes::Bytes;

use super::pool::Transaction;
use super::{Registry, RegistryError};
use coar_core::ids::{ConceptId, GenerationId, TenantId, TrainingId};

/// What was answered, to be answered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    pub status: u16,
    pub location: Option<String>,
    pub content_type: Option<String>,
    pub body: Bytes,
}

/// What a request with a key has made.
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

    /// Identifiers of different things differ: at most one of the three can be read.
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

/// The right to answer first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyClaim {
    tenant: TenantId,
    key: String,
    began: i64,
}

/// What becomes of a request with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstOrAgain {
    /// Nobody answered before: do it, and store the answer.
    First(KeyClaim),
    /// It is being done.
    Running,
    /// The key came before with something else.
    Reused,
    Again(StoredAnswer),
    /// What was to be made is there; its process has died before it could say so.
    Made(Made),
}

tokio::task_local! {
    /// The claim under which the present task makes something.
    static CLAIM: KeyClaim;
}

impl KeyClaim {
    /// The claim under which the present task works.
    pub fn current() -> Option<Self> {
        CLAIM.try_with(Clone::clone).ok()
    }

    /// Does some work under the claim: what it makes bears the key from its first moment.
    pub async fn under<F: Future>(self, work: F) -> F::Output {
        CLAIM.scope(self, work).await
    }
}

/// A finished key is kept for so long after its thing was made without an answer.
const MADE_MS: i64 = 24 * 60 * 60 * 1000;
/// Larger bodies are blobs. Those that name what was made are far below this; those with images in them are above.
const BODY_LIMIT: usize = 16 << 10;

impl Registry {
    /// Begins a request with a key, unless it was begun before and its lease holds, or has an answer.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_key(
        &self,
        tenant: TenantId,
        key: &str,
        fingerprint: &str,
        lease_ms: i64,
    ) -> Result<FirstOrAgain, RegistryError> {
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
        // There may be no row yet that could be held.
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
                    true => FirstOrAgain::Made(made.parse()?),
                    false => FirstOrAgain::Reused,
                });
            }
            if at < expires_at {
                if before != fingerprint {
                    return Ok(FirstOrAgain::Reused);
                }
                let Some(status) = status else {
                    return Ok(FirstOrAgain::Running);
                };
                // Before the blob store is asked.
                drop(transaction);
                return Ok(FirstOrAgain::Again(StoredAnswer {
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
        // The next sweep removes what cannot be removed now.
        if let Some(outdated) = outdated
            && let Err(error) = self.remove_unreferenced(&[outdated]).await
        {
            tracing::warn!(%error, "an expired answer could not be removed");
        }
        Ok(FirstOrAgain::First(KeyClaim {
            tenant,
            key: key.to_owned(),
            began,
        }))
    }

    /// Where the present task works under a key, notes what it makes, in the transaction that makes it.
    ///
    /// # Errors
    /// `LeaseLost` when somebody else has begun it anew: then nothing may be made; when the database fails.
    pub(super) async fn note_made(&self, transaction: &mut Transaction, made: Made) -> Result<(), RegistryError> {
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

    /// The same where the thing is finished, for whoever has waited for it: the answer may have been given by now.
    ///
    /// # Errors
    /// As [`Self::note_made`].
    pub(super) async fn note_finished(&self, transaction: &mut Transaction, made: Made) -> Result<(), RegistryError> {
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

    /// Keeps a running request's lease.
    ///
    /// # Errors
    /// `LeaseLost` when somebody else began it anew; when the database fails.
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

    /// Stores the first answer for `keep_ms`. Without effect where the lease was lost.
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

    /// False where the lease was lost.
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

    /// Frees the key of a request that came to nothing; one that has made something keeps it.
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

    /// Frees the keys of every running request of a process that is gone. Only the holder of the data folder's lock may
    /// ask, before it serves anybody.
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

    /// Forgets answers that were kept long enough, and removes their bytes; returns how many.
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
mod tests {
    use super::*;

    const TOKENS: coar_core::engine::ConceptTokens = coar_core::engine::ConceptTokens { text: 1, image: 1 };

    fn answer(body: &str) -> StoredAnswer {
        StoredAnswer {
            status: 202,
            location: Some("/v1/concepts/rex".into()),
            content_type: Some("application/json".into()),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    fn first(outcome: FirstOrAgain) -> KeyClaim {
        match outcome {
            FirstOrAgain::First(claim) => claim,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_first_answer_is_kept_and_whoever_lost_the_lease_writes_nothing() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let tenant = TenantId::DEFAULT;
        let claim = |fingerprint: &'static str, lease| registry.claim_key(tenant, "k", fingerprint, lease);
        // The first attempt's lease has run out as soon as it began.
        let slow = first(claim("a", 0).await.unwrap());
        let next = first(claim("a", 60_000).await.unwrap());
        assert_eq!(claim("a", 60_000).await.unwrap(), FirstOrAgain::Running);
        assert_eq!(claim("b", 60_000).await.unwrap(), FirstOrAgain::Reused);
        assert!(matches!(
            registry.renew_key(&slow, 1).await,
            Err(RegistryError::LeaseLost)
        ));
        registry.store_answer(&slow, &answer("slow"), 60_000).await.unwrap();
        registry.release_key(&slow).await.unwrap();
        registry.renew_key(&next, 60_000).await.unwrap();
        registry.store_answer(&next, &answer("next"), 60_000).await.unwrap();
        assert_eq!(claim("a", 1).await.unwrap(), FirstOrAgain::Again(answer("next")));
        assert_eq!(claim("b", 1).await.unwrap(), FirstOrAgain::Reused);
        let other = registry
            .add_tenant("other", super::super::Quotas::default())
            .await
            .unwrap();
        first(registry.claim_key(other.id, "k", "b", 60_000).await.unwrap());
    }

    #[tokio::test]
    async fn what_was_made_before_the_answer_is_not_made_again() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let (tenant, style) = (TenantId::DEFAULT, coar_core::concept::ConceptKind::Style);
        let claim = |lease| registry.claim_key(tenant, "k", "a", lease);
        let add = |name: &str| {
            let (registry, new) = (registry.clone(), super::super::NewConcept::new(name, style));
            async move { registry.add_ready_concept(tenant, &new, ("hash", TOKENS)).await }
        };
        let slow = first(claim(0).await.unwrap());
        let next = first(claim(0).await.unwrap());
        // Whoever lost the lease makes nothing any more.
        assert!(matches!(slow.under(add("slow")).await, Err(RegistryError::LeaseLost)));
        assert!(registry.concept(tenant, "slow").await.unwrap().is_none());
        let made = next.clone().under(add("next")).await.unwrap();
        // Its process dies before it answers, or cannot answer.
        registry.release_key(&next).await.unwrap();
        assert_eq!(claim(60_000).await.unwrap(), FirstOrAgain::Made(Made::Concept(made.id)));
        assert_eq!(registry.release_keys().await.unwrap(), 0);
        assert_eq!(claim(60_000).await.unwrap(), FirstOrAgain::Made(Made::Concept(made.id)));
        let other = registry.claim_key(tenant, "k", "b", 60_000).await.unwrap();
        assert_eq!(other, FirstOrAgain::Reused);
        // Without a key nothing is noted.
        add("free").await.unwrap();
    }

    #[tokio::test]
    async fn what_somebody_waited_for_bears_the_key_when_it_is_finished() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let tenant = TenantId::DEFAULT;
        let claim = |lease| registry.claim_key(tenant, "k", "a", lease);
        let made = Made::Generation(GenerationId::new());
        let finish = |claim: KeyClaim| {
            claim.under(async {
                let mut transaction = registry.write().await.unwrap();
                registry.note_finished(&mut transaction, made).await?;
                transaction.commit().await.map_err(RegistryError::from)
            })
        };
        // The first one's lease has run out as soon as it began; the second is killed after the end, before the answer.
        let slow = first(claim(0).await.unwrap());
        let next = first(claim(0).await.unwrap());
        assert!(matches!(finish(slow).await, Err(RegistryError::LeaseLost)));
        finish(next).await.unwrap();
        assert_eq!(claim(60_000).await.unwrap(), FirstOrAgain::Made(made));
    }

    #[tokio::test]
    async fn a_dead_process_locks_no_key_and_old_answers_are_forgotten() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let tenant = TenantId::DEFAULT;
        first(registry.claim_key(tenant, "dead", "a", 60_000).await.unwrap());
        let done = first(registry.claim_key(tenant, "done", "a", 60_000).await.unwrap());
        registry.store_answer(&done, &answer("x"), 60_000).await.unwrap();
        assert_eq!(registry.release_keys().await.unwrap(), 1);
        first(registry.claim_key(tenant, "dead", "b", 60_000).await.unwrap());
        let failed = first(registry.claim_key(tenant, "failed", "a", 60_000).await.unwrap());
        registry.release_key(&failed).await.unwrap();
        first(registry.claim_key(tenant, "failed", "c", 60_000).await.unwrap());
        let old = first(registry.claim_key(tenant, "old", "a", 60_000).await.unwrap());
        registry.store_answer(&old, &answer("x"), -1).await.unwrap();
        assert_eq!(registry.expire_keys().await.unwrap(), 1);
        assert!(matches!(
            registry.claim_key(tenant, "done", "a", 1).await.unwrap(),
            FirstOrAgain::Again(_)
        ));
    }

    #[tokio::test]
    async fn large_answers_are_blobs_that_go_with_their_key() {
        let (_dir, registry) = crate::registry::tests::test_registry().await;
        let tenant = TenantId::DEFAULT;
        let claim = || registry.claim_key(tenant, "k", "a", 60_000);
        let large = answer(&"x".repeat(BODY_LIMIT + 1));
        let blobs = || async { registry.blobs.all().await.unwrap().len() };
        registry
            .store_answer(&first(claim().await.unwrap()), &large, 60_000)
            .await
            .unwrap();
        assert_eq!(claim().await.unwrap(), FirstOrAgain::Again(large.clone()));
        // Programs of the schema before see a request that runs.
        let (inline, status): (Option<Vec<u8>>, Option<i64>) =
            sqlx::query_as("SELECT body, status FROM idempotency_keys")
                .fetch_one(&registry.pools.reads)
                .await
                .unwrap();
        assert_eq!((inline, status, blobs().await), (None, None, 1));
        assert_eq!(registry.release_keys().await.unwrap(), 0);
        assert_eq!(registry.collect_garbage().await.unwrap(), 0, "a row refers to it");
        let expire = async || {
            sqlx::query("UPDATE idempotency_keys SET expires_at = 1")
                .execute(&registry.pools.writes)
                .await
                .unwrap();
        };
        // Expired, and the key is used anew; then expired and swept; then its tenant goes.
        expire().await;
        let again = first(claim().await.unwrap());
        assert_eq!(blobs().await, 0);
        registry.store_answer(&again, &large, 60_000).await.unwrap();
        expire().await;
        assert_eq!((registry.expire_keys().await.unwrap(), blobs().await), (1, 0));
        let lost = first(claim().await.unwrap());
        registry.release_key(&lost).await.unwrap();
        registry.store_answer(&lost, &large, 60_000).await.unwrap();
        assert_eq!(blobs().await, 0, "whoever lost the lease leaves nothing");
        let last = first(claim().await.unwrap());
        registry.store_answer(&last, &large, 60_000).await.unwrap();
        assert!(registry.delete_tenant(tenant).await.unwrap());
        assert_eq!(blobs().await, 0);
    }
}
