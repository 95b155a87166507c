//! Webhook deliveries. They are rows, so pending ones survive a restart.

use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{Backend, identifier, number};
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
    /// The host of `url`, with its port unless that is the default port.
    pub host: String,
    /// The JSON that is sent, byte for byte.
    pub body: String,
}

/// Deliveries of one tenant to one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Receiver {
    pub tenant: TenantId,
    pub host: String,
}

/// Maximum number of deliveries of one tenant, and to one host, that all processes together send at once.
pub const DELIVERIES_AT_ONCE: i64 = 2;

/// A delivery that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Also the `webhook-id`: the same in every attempt.
    pub id: DeliveryId,
    pub receiver: Receiver,
    pub url: String,
    pub body: String,
    /// `whsec_…` of its tenant.
    pub secret: String,
    /// The previous secret, while both sign.
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
        receiver: Receiver {
            tenant: identifier(row, "tenant_id")?,
            host: row.try_get("host")?,
        },
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
        "INSERT INTO webhook_deliveries (id, tenant_id, subject, event, url, host, body, status, next_at, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, 'pending', 0, $8)",
    )
    .bind(DeliveryId::new().to_string())
    .bind(new.tenant.to_string())
    .bind(&new.subject)
    .bind(&new.event)
    .bind(&new.url)
    .bind(&new.host)
    .bind(&new.body)
    .bind(at)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// The SQL statement for the delivery to send next; $1 is the time, $2 the limit for each tenant and host, followed by
/// `paused` pairs.
fn claim_statement(backend: Backend, paused: usize) -> String {
    let paused: String = (0..paused)
        .map(|pair| {
            format!(
                " AND NOT (d.tenant_id = ${} AND d.host = ${})",
                2 * pair + 3,
                2 * pair + 4
            )
        })
        .collect();
    let lock = match backend {
        Backend::Sqlite => "",
        Backend::Postgres => " FOR UPDATE OF d SKIP LOCKED",
    };
    format!(
        "WITH sent AS (SELECT tenant_id, host FROM webhook_deliveries WHERE sending_until > $1 AND status = 'pending'),
              tenant AS (SELECT tenant_id, count(*) AS n FROM sent GROUP BY tenant_id),
              busy AS (SELECT host, count(*) AS n FROM sent GROUP BY host)
         SELECT d.id, d.tenant_id, d.host, d.url, d.body, d.attempt + 1 AS attempt, t.webhook_secret,
            t.webhook_secret_before, t.webhook_secret_before_until
         FROM webhook_deliveries d JOIN tenants t ON t.id = d.tenant_id
         LEFT JOIN tenant ON tenant.tenant_id = d.tenant_id LEFT JOIN busy ON busy.host = d.host
         WHERE d.status = 'pending' AND d.next_at <= $1
         AND coalesce(tenant.n, 0) < $2 AND coalesce(busy.n, 0) < $2{paused}
         ORDER BY coalesce(tenant.n, 0), d.next_at, d.id LIMIT 1{lock}"
    )
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
    /// process stores an outcome before. Order: the tenant with the fewest deliveries in progress, then the delivery
    /// that has been due longest. Limits: [`DELIVERIES_AT_ONCE`]. Those to `paused` receivers are skipped.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_deliveries(
        &self,
        limit: usize,
        lease: Duration,
        paused: &[Receiver],
    ) -> Result<Vec<Delivery>, RegistryError> {
        let at = self.lease_time().await?;
        let until = at + lease.as_millis() as i64;
        let statement = claim_statement(self.backend, paused.len());
        let mut transaction = self.write().await?;
        // Two processes that count at the same time would exceed the limit.
        self.hold_name(&mut transaction, "webhooks", "claim").await?;
        let mut due = Vec::new();
        while due.len() < limit {
            let mut query = sqlx::query(sqlx::AssertSqlSafe(statement.as_str()))
                .bind(at)
                .bind(DELIVERIES_AT_ONCE);
            for receiver in paused {
                query = query.bind(receiver.tenant.to_string()).bind(&receiver.host);
            }
            let Some(row) = query.fetch_optional(&mut *transaction).await? else {
                break;
            };
            let next = delivery(&row)?;
            // Only possible with a lease of zero.
            if due.iter().any(|claimed: &Delivery| claimed.id == next.id) {
                break;
            }
            sqlx::query("UPDATE webhook_deliveries SET attempt = $1, next_at = $2, sending_until = $2 WHERE id = $3")
                .bind(i64::from(next.attempt))
                .bind(until)
                .bind(next.id.to_string())
                .execute(&mut *transaction)
                .await?;
            due.push(next);
        }
        transaction.commit().await?;
        Ok(due)
    }

    /// Stores the outcome of an attempt. After the last one the body is removed, since nothing is sent again.
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
            "UPDATE webhook_deliveries SET status = $1, next_at = coalesce($2, next_at), sending_until = NULL,
             last_status = $3, last_error = $4, finished_at = CASE WHEN $1 = 'pending' THEN NULL ELSE $5 END,
             body = CASE WHEN $1 = 'pending' THEN body ELSE '' END WHERE id = $6",
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

    /// The earliest due time after `present`, both by [`Registry::lease_time`]. A delivery that is already due and was
    /// not claimed waits for the end of another.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn next_delivery(&self, present: i64) -> Result<Option<i64>, RegistryError> {
        let (at,) =
            sqlx::query_as("SELECT min(next_at) FROM webhook_deliveries WHERE status = 'pending' AND next_at > $1")
                .bind(present)
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
    use crate::Quotas;

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
            host: "example.com".to_owned(),
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
        assert_eq!(
            registry.claim_deliveries(8, Duration::ZERO, &[]).await.unwrap().len(),
            1
        );
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
            host: "example.com".to_owned(),
            body: "{}".to_owned(),
        };
        registry.add_delivery(&new).await.unwrap();
        let first = registry
            .claim_deliveries(8, Duration::ZERO, &[])
            .await
            .unwrap()
            .remove(0);
        assert!(first.secret_before.is_none());
        for (keep, before) in [
            (Duration::from_secs(60), Some(first.secret.clone())),
            (Duration::ZERO, None),
        ] {
            let changed = registry.rotate_webhook_secret("default", keep).await.unwrap().unwrap();
            let again = registry
                .claim_deliveries(8, Duration::ZERO, &[])
                .await
                .unwrap()
                .remove(0);
            assert_eq!((again.secret, again.secret_before), (changed.webhook_secret, before));
        }
        assert!(
            registry
                .rotate_webhook_secret("unknown", Duration::ZERO)
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
            host: "example.com".to_owned(),
            body: "{}".to_owned(),
        };
        registry.add_delivery(&new).await.unwrap();
        let first = registry
            .claim_deliveries(8, Duration::ZERO, &[])
            .await
            .unwrap()
            .remove(0);
        assert_eq!((first.attempt, first.body.as_str()), (1, "{}"));
        assert!(first.secret.starts_with("whsec_"));
        // The lease expires at once, as after a crash: the delivery is due again.
        let second = registry
            .claim_deliveries(8, Duration::from_secs(60), &[])
            .await
            .unwrap()
            .remove(0);
        assert_eq!((second.id, second.attempt), (first.id, 2));
        assert!(
            registry
                .claim_deliveries(8, Duration::ZERO, &[])
                .await
                .unwrap()
                .is_empty()
        );
        let failed = Attempt {
            status: Some(500),
            problem: Some("it answered 500".to_owned()),
            again_after: Some(Duration::ZERO),
        };
        registry.record_attempt(first.id, &failed).await.unwrap();
        assert!(registry.next_delivery(0).await.unwrap().is_some());
        assert_eq!(
            registry.claim_deliveries(8, Duration::ZERO, &[]).await.unwrap()[0].attempt,
            3
        );
        let delivered = Attempt {
            status: Some(204),
            problem: None,
            again_after: None,
        };
        registry.record_attempt(first.id, &delivered).await.unwrap();
        assert_eq!(registry.next_delivery(0).await.unwrap(), None);
        let (body,): (String,) = sqlx::query_as("SELECT body FROM webhook_deliveries")
            .fetch_one(&registry.pools.reads)
            .await
            .unwrap();
        assert_eq!(body, "");
        assert_eq!(registry.expire_deliveries(Duration::from_secs(60)).await.unwrap(), 0);
    }

    /// A delivery of the tenant with `subject` as its body.
    async fn add(registry: &Registry, tenant: TenantId, host: &str, subject: &str) {
        let new = NewDelivery {
            tenant,
            subject: subject.to_owned(),
            event: "generation.succeeded".to_owned(),
            url: format!("https://{host}/"),
            host: host.to_owned(),
            body: subject.to_owned(),
        };
        registry.add_delivery(&new).await.unwrap();
    }

    fn subjects(deliveries: &[Delivery]) -> Vec<&str> {
        deliveries.iter().map(|delivery| delivery.body.as_str()).collect()
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn deliveries_are_claimed_fairly() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let (a, b) = (
            TenantId::DEFAULT,
            registry.add_tenant("b", Quotas::default()).await.unwrap().id,
        );
        for number in 0..16 {
            add(&registry, a, &format!("a{number}.example"), &format!("a{number}")).await;
        }
        add(&registry, b, "b.example", "b0").await;
        add(&registry, b, "b.example", "b1").await;
        add(&registry, b, "b.example", "b2").await;
        // The tenant with the fewest deliveries first, then the oldest delivery; two of each tenant.
        let first = registry.claim_deliveries(8, MINUTE, &[]).await.unwrap();
        assert_eq!(subjects(&first), ["a0", "b0", "a1", "b1"]);
        assert!(registry.claim_deliveries(8, MINUTE, &[]).await.unwrap().is_empty());
        let done = Attempt {
            status: Some(204),
            problem: None,
            again_after: None,
        };
        registry.record_attempt(first[1].id, &done).await.unwrap();
        let next = registry.claim_deliveries(8, MINUTE, &[]).await.unwrap();
        assert_eq!(subjects(&next), ["b2"]);
        // Deliveries that are due and wait for others do not determine the next wake-up.
        let at = registry.lease_time().await.unwrap();
        assert!(registry.next_delivery(at).await.unwrap().unwrap() > at);
    }

    #[tokio::test]
    async fn one_host_has_two_deliveries_at_once() {
        let (_dir, registry) = crate::tests::test_registry().await;
        for name in ["b", "c", "d"] {
            let tenant = registry.add_tenant(name, Quotas::default()).await.unwrap().id;
            add(&registry, tenant, "same.example", name).await;
        }
        let claimed = registry.claim_deliveries(8, MINUTE, &[]).await.unwrap();
        assert_eq!(subjects(&claimed), ["b", "c"]);
    }

    #[tokio::test]
    async fn paused_receivers_are_left_alone() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let (a, b) = (
            TenantId::DEFAULT,
            registry.add_tenant("b", Quotas::default()).await.unwrap().id,
        );
        for (tenant, host, subject) in [(a, "x.example", "ax"), (a, "y.example", "ay"), (b, "x.example", "bx")] {
            add(&registry, tenant, host, subject).await;
        }
        let paused = |host: &str| Receiver {
            tenant: a,
            host: host.to_owned(),
        };
        let both = [paused("x.example"), paused("z.example")];
        let claimed = registry.claim_deliveries(8, MINUTE, &both).await.unwrap();
        assert_eq!(subjects(&claimed), ["ay", "bx"]);
        let claimed = registry.claim_deliveries(8, MINUTE, &[]).await.unwrap();
        assert_eq!(subjects(&claimed), ["ax"]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn processes_share_the_limit() {
        let (_dir, registry) = crate::tests::test_registry().await;
        for number in 0..8 {
            add(&registry, TenantId::DEFAULT, &format!("{number}.example"), "same").await;
        }
        let claim = || registry.claim_deliveries(8, MINUTE, &[]);
        let (one, two, three) = tokio::join!(claim(), claim(), claim());
        assert_eq!(one.unwrap().len() + two.unwrap().len() + three.unwrap().len(), 2);
    }
}
