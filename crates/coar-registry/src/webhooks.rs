//! Web-hook deliveries. They are rows, so pending ones survive a restart.

use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, locking, number};
use super::pool::Transaction;
use super::{Registry, RegistryError, now};
use coar_core::ids::{DeliveryId, TenantId};

/// A delivery to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDelivery {
    pub tenant: TenantId,
    /// Its subject: a training's or a generation's id.
    pub subject: String,
    /// `generation.succeeded`, `training.failed`, …
    pub event: String,
    pub url: String,
    /// The JSON that is sent, byte for byte.
    pub body: String,
}

/// A delivery that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Also the `webhook-id`: the same in every attempt.
    pub id: DeliveryId,
    pub url: String,
    pub body: String,
    /// `whsec_…` of its tenant.
    pub secret: String,
    /// The one before it, while both sign.
    pub secret_before: Option<String>,
    /// Attempts so far, including the current one.
    pub attempt: u32,
}

/// The outcome of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The response status, if there was one.
    pub status: Option<u16>,
    /// What went wrong; `None`: delivered.
    pub problem: Option<String>,
    /// Delay before the next attempt; `None`: no more attempts.
    pub again_after: Option<Duration>,
}

fn delivery(row: &AnyRow) -> Result<Delivery, RegistryError> {
    Ok(Delivery {
        id: identifier(row, "id")?,
        url: row.try_get("url")?,
        body: row.try_get("body")?,
        secret: row.try_get("webhook_secret")?,
        secret_before: {
            let until: Option<i64> = row.try_get("webhook_secret_before_until")?;
            let before: Option<String> = row.try_get("webhook_secret_before")?;
            before.filter(|_| until.is_some_and(|until| now() < until))
        },
        attempt: number(row, "attempt")?,
    })
}

pub(super) async fn insert_delivery(
    transaction: &mut Transaction,
    new: &NewDelivery,
    at: i64,
) -> Result<(), RegistryError> {
    sqlx::query(
        "INSERT INTO webhook_deliveries (id, tenant_id, subject, event, url, body, status, next_at, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, 'pending', 0, $7)",
    )
    .bind(DeliveryId::new().to_string())
    .bind(new.tenant.to_string())
    .bind(&new.subject)
    .bind(&new.event)
    .bind(&new.url)
    .bind(&new.body)
    .bind(at)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

impl Registry {
    /// Stores a delivery.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_delivery(&self, new: &NewDelivery) -> Result<(), RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        insert_delivery(&mut transaction, new, at).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Stores the delivery for a training's latest end, unless another process has done so.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_training_delivery(&self, new: &NewDelivery) -> Result<(), RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        self.hold_name(&mut transaction, "end of a training", &new.subject)
            .await?;
        let delivery = sqlx::query(
            "SELECT d.id FROM webhook_deliveries d JOIN trainings t ON t.id = d.subject
             WHERE d.subject = $1 AND d.event = $2 AND d.created_at >= t.finished_at LIMIT 1",
        )
        .bind(&new.subject)
        .bind(&new.event)
        .fetch_optional(&mut *transaction)
        .await?;
        if delivery.is_none() {
            insert_delivery(&mut transaction, new, at).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Claims deliveries that are due and counts an attempt for each. They are due again after `lease`, unless this
    /// process stores an outcome before.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_deliveries(&self, limit: usize, lease: Duration) -> Result<Vec<Delivery>, RegistryError> {
        let at = self.lease_time().await?;
        let mut transaction = self.write().await?;
        let rows = sqlx::query(locking!(
            self.backend,
            "SELECT d.id, d.url, d.body, d.attempt + 1 AS attempt, t.webhook_secret,
                t.webhook_secret_before, t.webhook_secret_before_until FROM webhook_deliveries d
             JOIN tenants t ON t.id = d.tenant_id
             WHERE d.status = 'pending' AND d.next_at <= $1 ORDER BY d.next_at, d.id LIMIT $2",
            " FOR UPDATE OF d SKIP LOCKED"
        ))
        .bind(at)
        .bind(limit as i64)
        .fetch_all(&mut *transaction)
        .await?;
        let due = rows.iter().map(delivery).collect::<Result<Vec<_>, _>>()?;
        for delivery in &due {
            sqlx::query("UPDATE webhook_deliveries SET attempt = $1, next_at = $2 WHERE id = $3")
                .bind(i64::from(delivery.attempt))
                .bind(at + lease.as_millis() as i64)
                .bind(delivery.id.to_string())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(due)
    }

    /// Stores the outcome of an attempt.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn record_attempt(&self, id: DeliveryId, attempt: &Attempt) -> Result<(), RegistryError> {
        let status = match (&attempt.problem, attempt.again_after) {
            (None, _) => "delivered",
            (Some(_), Some(_)) => "pending",
            (Some(_), None) => "failed",
        };
        let again_at = match attempt.again_after {
            Some(wait) => Some(self.lease_time().await? + wait.as_millis() as i64),
            None => None,
        };
        sqlx::query(
            "UPDATE webhook_deliveries SET status = $1, next_at = coalesce($2, next_at), last_status = $3, last_error = $4,
             finished_at = CASE WHEN $1 = 'pending' THEN NULL ELSE $5 END WHERE id = $6",
        )
        .bind(status)
        .bind(again_at)
        .bind(attempt.status.map(i64::from))
        .bind(&attempt.problem)
        .bind(now())
        .bind(id.to_string())
        .execute(&self.pools.writes)
        .await?;
        Ok(())
    }

    /// When the next delivery is due, by [`Registry::lease_time`].
    ///
    /// # Errors
    /// When the database fails.
    pub async fn next_delivery(&self) -> Result<Option<i64>, RegistryError> {
        let (at,) = sqlx::query_as("SELECT min(next_at) FROM webhook_deliveries WHERE status = 'pending'")
            .fetch_one(&self.pools.reads)
            .await?;
        Ok(at)
    }

    /// Removes deliveries that ended longer than `age` ago; returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn expire_deliveries(&self, age: Duration) -> Result<u64, RegistryError> {
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let before = self.lease_time().await?.saturating_sub(age);
        let expired = sqlx::query("DELETE FROM webhook_deliveries WHERE finished_at < $1")
            .bind(before)
            .execute(&self.pools.writes)
            .await?;
        Ok(expired.rows_affected())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_training_is_delivered_once() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let new = crate::NewConcept {
            webhook_url: Some("https://example.com/".to_owned()),
            ..crate::NewConcept::new("ink", coar_core::concept::ConceptKind::Style)
        };
        let spec =
            coar_core::training::TrainingSpec::preset(coar_core::training::Preset::Pocket, new.kind, "ink", None, 6);
        registry.add_concept(TenantId::DEFAULT, &new, &spec).await.unwrap();
        let claimed = registry.claim_training(60_000).await.unwrap().unwrap();
        registry.fail(&claimed, &serde_json::json!({}), false).await.unwrap();
        let delivery = NewDelivery {
            tenant: TenantId::DEFAULT,
            subject: claimed.training.id.to_string(),
            event: "training.failed".to_owned(),
            url: "https://example.com/".to_owned(),
            body: "{}".to_owned(),
        };
        assert_eq!(
            registry
                .undelivered_trainings(Duration::from_secs(60))
                .await
                .unwrap()
                .len(),
            1
        );
        let both = tokio::join!(
            registry.add_training_delivery(&delivery),
            registry.add_training_delivery(&delivery)
        );
        both.0.unwrap();
        both.1.unwrap();
        assert_eq!(registry.claim_deliveries(8, Duration::ZERO).await.unwrap().len(), 1);
        assert!(
            registry
                .undelivered_trainings(Duration::from_secs(60))
                .await
                .unwrap()
                .is_empty()
        );
    }

    #[tokio::test]
    async fn two_secrets_sign_while_a_tenants_is_changed() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let new = NewDelivery {
            tenant: TenantId::DEFAULT,
            subject: "generation_1".to_owned(),
            event: "generation.succeeded".to_owned(),
            url: "https://example.com/".to_owned(),
            body: "{}".to_owned(),
        };
        registry.add_delivery(&new).await.unwrap();
        let first = registry.claim_deliveries(8, Duration::ZERO).await.unwrap().remove(0);
        assert!(first.secret_before.is_none());
        for (keep, before) in [
            (Duration::from_secs(60), Some(first.secret.clone())),
            (Duration::ZERO, None),
        ] {
            let changed = registry.rotate_webhook_secret("default", keep).await.unwrap().unwrap();
            let again = registry.claim_deliveries(8, Duration::ZERO).await.unwrap().remove(0);
            assert_eq!((again.secret, again.secret_before), (changed.webhook_secret, before));
        }
        assert!(
            registry
                .rotate_webhook_secret("nobody", Duration::ZERO)
                .await
                .unwrap()
                .is_none()
        );
    }

    #[tokio::test]
    async fn delivery_keeps_its_id_across_attempts() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let new = NewDelivery {
            tenant: TenantId::DEFAULT,
            subject: "generation_1".to_owned(),
            event: "generation.succeeded".to_owned(),
            url: "https://example.com/".to_owned(),
            body: "{}".to_owned(),
        };
        registry.add_delivery(&new).await.unwrap();
        let first = registry.claim_deliveries(8, Duration::ZERO).await.unwrap().remove(0);
        assert_eq!((first.attempt, first.body.as_str()), (1, "{}"));
        assert!(first.secret.starts_with("whsec_"));
        // The lease expires at once, as after a crash: the delivery is due again.
        let second = registry
            .claim_deliveries(8, Duration::from_secs(60))
            .await
            .unwrap()
            .remove(0);
        assert_eq!((second.id, second.attempt), (first.id, 2));
        assert!(registry.claim_deliveries(8, Duration::ZERO).await.unwrap().is_empty());
        let failed = Attempt {
            status: Some(500),
            problem: Some("it answered 500".to_owned()),
            again_after: Some(Duration::ZERO),
        };
        registry.record_attempt(first.id, &failed).await.unwrap();
        assert!(registry.next_delivery().await.unwrap().is_some());
        assert_eq!(
            registry.claim_deliveries(8, Duration::ZERO).await.unwrap()[0].attempt,
            3
        );
        let delivered = Attempt {
            status: Some(204),
            problem: None,
            again_after: None,
        };
        registry.record_attempt(first.id, &delivered).await.unwrap();
        assert_eq!(registry.next_delivery().await.unwrap(), None);
        assert_eq!(registry.expire_deliveries(Duration::from_secs(60)).await.unwrap(), 0);
    }
}
