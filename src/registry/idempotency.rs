//! First answers to requests with an `Idempotency-Key`, and who works on one that has none yet.
//!
//! A row without a status is a request that runs: until `expires_at`, its lease, nobody else begins it, and `created_at`
//! is the fence: a later attempt has a later one, so that a worker that lost its lease writes nothing.

use super::{Registry, RegistryError};
use crate::ids::TenantId;

/// What was answered, to be answered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    pub status: u16,
    pub location: Option<String>,
    pub content_type: Option<String>,
    pub body: Vec<u8>,
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
}

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
        );
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        // There may be no row yet that could be held.
        self.hold_name(&mut transaction, "idempotency key", &format!("{tenant} {key}"))
            .await?;
        let found: Option<Row> = sqlx::query_as(
            "SELECT fingerprint, status, location, content_type, body, created_at, expires_at FROM idempotency_keys
             WHERE tenant_id = $1 AND key = $2",
        )
        .bind(tenant.to_string())
        .bind(key)
        .fetch_optional(&mut *transaction)
        .await?;
        let mut began = at;
        if let Some((before, status, location, content_type, body, created_at, expires_at)) = found {
            if at < expires_at {
                return Ok(match status {
                    _ if before != fingerprint => FirstOrAgain::Reused,
                    None => FirstOrAgain::Running,
                    Some(status) => FirstOrAgain::Again(StoredAnswer {
                        status: u16::try_from(status).map_err(|error| RegistryError::Row(error.to_string()))?,
                        location,
                        content_type,
                        body: body.unwrap_or_default(),
                    }),
                });
            }
            began = at.max(created_at + 1);
        }
        sqlx::query(
            "INSERT INTO idempotency_keys (tenant_id, key, fingerprint, created_at, expires_at) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (tenant_id, key) DO UPDATE SET fingerprint = excluded.fingerprint, status = NULL, location = NULL,
             content_type = NULL, body = NULL, created_at = excluded.created_at, expires_at = excluded.expires_at",
        )
        .bind(tenant.to_string())
        .bind(key)
        .bind(fingerprint)
        .bind(began)
        .bind(at + lease_ms)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(FirstOrAgain::First(KeyClaim {
            tenant,
            key: key.to_owned(),
            began,
        }))
    }

    /// Keeps a running request's lease.
    ///
    /// # Errors
    /// `LeaseLost` when somebody else began it anew; when the database fails.
    pub async fn renew_key(&self, claim: &KeyClaim, lease_ms: i64) -> Result<(), RegistryError> {
        let changed = sqlx::query(
            "UPDATE idempotency_keys SET expires_at = $1
             WHERE tenant_id = $2 AND key = $3 AND created_at = $4 AND status IS NULL",
        )
        .bind(self.lease_time().await? + lease_ms)
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pool)
        .await?;
        match changed.rows_affected() {
            0 => Err(RegistryError::LeaseLost),
            _ => Ok(()),
        }
    }

    /// Stores the first answer for `keep_ms`. Without effect where the lease was lost.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn store_answer(
        &self,
        claim: &KeyClaim,
        answer: &StoredAnswer,
        keep_ms: i64,
    ) -> Result<(), RegistryError> {
        sqlx::query(
            "UPDATE idempotency_keys SET status = $1, location = $2, content_type = $3, body = $4, expires_at = $5
             WHERE tenant_id = $6 AND key = $7 AND created_at = $8 AND status IS NULL",
        )
        .bind(i64::from(answer.status))
        .bind(&answer.location)
        .bind(&answer.content_type)
        .bind(&answer.body)
        .bind(self.lease_time().await? + keep_ms)
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Frees the key of a request that came to nothing.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_key(&self, claim: &KeyClaim) -> Result<(), RegistryError> {
        sqlx::query(
            "DELETE FROM idempotency_keys WHERE tenant_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL",
        )
        .bind(claim.tenant.to_string())
        .bind(&claim.key)
        .bind(claim.began)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Frees the keys of every running request of a process that is gone. Only the holder of the data folder's lock may
    /// ask, before it serves anybody.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_keys(&self) -> Result<u64, RegistryError> {
        let released = sqlx::query("DELETE FROM idempotency_keys WHERE status IS NULL")
            .execute(&self.pool)
            .await?;
        Ok(released.rows_affected())
    }

    /// Forgets answers that were kept long enough.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn expire_keys(&self) -> Result<u64, RegistryError> {
        let removed = sqlx::query("DELETE FROM idempotency_keys WHERE expires_at < $1 AND status IS NOT NULL")
            .bind(self.lease_time().await?)
            .execute(&self.pool)
            .await?;
        Ok(removed.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: &str) -> StoredAnswer {
        StoredAnswer {
            status: 202,
            location: Some("/v1/concepts/rex".into()),
            content_type: Some("application/json".into()),
            body: body.into(),
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
}
