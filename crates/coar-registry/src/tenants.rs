//! Tenants: the owners of concepts, trainings and images.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::{identifier, is_unstorable, locking, optional_number};
use super::pool::Transaction;
use super::{Deletion, Listed, Page, Registry, RegistryError, now};
use coar_core::ids::TenantId;

/// The kind of the name lock for additions to a tenant. It differs from that of schema 3, whose programs hold it while
/// they store images.
const QUOTA_LOCK: &str = "room of a tenant";

/// Quotas of a tenant; `None`: the server's default; 0: unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Concepts.
    pub concepts: Option<u32>,
    /// Trainings that are queued or running.
    pub trainings: Option<u32>,
    /// Generations that are queued or running.
    pub requests_in_flight: Option<u32>,
    pub pictures_per_minute: Option<u32>,
    /// Requests that create or start something.
    pub requests_per_minute: Option<u32>,
    /// Bytes of reference images, concept files and kept images.
    pub bytes: Option<u64>,
}

impl Quotas {
    /// These quotas, with the other's for those that are unset.
    pub fn or(self, default: Self) -> Self {
        Self {
            concepts: self.concepts.or(default.concepts),
            trainings: self.trainings.or(default.trainings),
            requests_in_flight: self.requests_in_flight.or(default.requests_in_flight),
            pictures_per_minute: self.pictures_per_minute.or(default.pictures_per_minute),
            requests_per_minute: self.requests_per_minute.or(default.requests_per_minute),
            bytes: self.bytes.or(default.bytes),
        }
    }
}

impl Quotas {
    /// Checks that a tenant with a given usage may add more.
    ///
    /// # Errors
    /// `QuotaExceeded`
    pub fn check(self, usage: Usage, addition: Usage) -> Result<(), RegistryError> {
        for (quota, used, more, limit) in [
            (
                "concepts",
                usage.concepts.into(),
                addition.concepts.into(),
                self.concepts.map(u64::from),
            ),
            (
                "trainings",
                usage.trainings.into(),
                addition.trainings.into(),
                self.trainings.map(u64::from),
            ),
            ("bytes", usage.bytes, addition.bytes, self.bytes),
        ] {
            if let Some(limit) = limit
                && more > 0
                && used.saturating_add(more) > limit
            {
                return Err(RegistryError::QuotaExceeded { quota, used, limit });
            }
        }
        Ok(())
    }
}

/// A tenant's usage of what is limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub concepts: u32,
    /// Queued and running trainings.
    pub trainings: u32,
    /// Bytes of reference images, concept files and kept images; the same bytes count once.
    pub bytes: u64,
}

/// Counts of a tenant's rate limits, or the limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    images: i64,
    requests: i64,
}

/// The tenant's rate limit leaves no room for more images or requests in this minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MinuteFull {
    /// Images or requests of the last minute.
    pub count: u32,
    /// The time until the oldest of them is a minute old.
    pub wait: Duration,
}

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    /// `whsec_…`: signs its webhooks.
    pub webhook_secret: String,
    pub quotas: Quotas,
    pub created_at: i64,
}

fn tenant(row: &AnyRow) -> Result<Tenant, RegistryError> {
    Ok(Tenant {
        id: identifier(row, "id")?,
        name: row.try_get("name")?,
        webhook_secret: row.try_get("webhook_secret")?,
        quotas: Quotas {
            concepts: optional_number(row, "concepts")?,
            trainings: optional_number(row, "trainings")?,
            requests_in_flight: optional_number(row, "requests_in_flight")?,
            pictures_per_minute: optional_number(row, "pictures_per_minute")?,
            requests_per_minute: optional_number(row, "requests_per_minute")?,
            bytes: row
                .try_get::<Option<i64>, _>("bytes")?
                .map(|bytes| u64::try_from(bytes).unwrap_or(0)),
        },
        created_at: row.try_get("created_at")?,
    })
}

async fn usage<'e>(
    executor: impl sqlx::Executor<'e, Database = sqlx::Any>,
    id: TenantId,
) -> Result<Usage, RegistryError> {
    let (concepts, trainings, bytes): (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM concepts WHERE tenant_id = $1),
                (SELECT count(*) FROM trainings WHERE tenant_id = $1 AND status IN ('queued', 'running')),
                (SELECT CAST(coalesce(sum(b.bytes), 0) AS BIGINT) FROM (
                     SELECT p.blob FROM concept_pictures p JOIN concepts c ON c.id = p.concept_id WHERE c.tenant_id = $1
                     UNION SELECT v.hash FROM concept_versions v JOIN concepts c ON c.id = v.concept_id
                           WHERE c.tenant_id = $1
                     UNION SELECT blob FROM images WHERE tenant_id = $1) AS own JOIN blobs b ON b.hash = own.blob)",
    )
    .bind(id.to_string())
    .fetch_one(executor)
    .await?;
    let number = |count: i64| u32::try_from(count).unwrap_or(u32::MAX);
    Ok(Usage {
        concepts: number(concepts),
        trainings: number(trainings),
        bytes: u64::try_from(bytes).unwrap_or(0),
    })
}

fn as_number(bytes: Option<u64>) -> Option<i64> {
    bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// 24 random bytes, the length that the Standard Webhooks libraries expect.
fn webhook_secret() -> String {
    format!("whsec_{}", STANDARD.encode(rand::random::<[u8; 24]>()))
}

impl Registry {
    /// Generates secrets for tenants that a migration has created.
    pub(super) async fn complete_tenants(&self) -> Result<(), RegistryError> {
        let incomplete: Vec<(String,)> = sqlx::query_as("SELECT id FROM tenants WHERE webhook_secret IS NULL")
            .fetch_all(&self.pools.reads)
            .await?;
        for (id,) in incomplete {
            sqlx::query("UPDATE tenants SET webhook_secret = $1 WHERE id = $2 AND webhook_secret IS NULL")
                .bind(webhook_secret())
                .bind(id)
                .execute(&self.pools.writes)
                .await?;
        }
        Ok(())
    }

    /// Creates a tenant.
    ///
    /// # Errors
    /// `TenantTaken`; when the database fails.
    pub async fn add_tenant(&self, name: &str, quotas: Quotas) -> Result<Tenant, RegistryError> {
        let new = Tenant {
            id: TenantId::new(),
            name: name.to_owned(),
            webhook_secret: webhook_secret(),
            quotas,
            created_at: now(),
        };
        let inserted = sqlx::query(
            "INSERT INTO tenants (id, name, webhook_secret, concepts, trainings, requests_in_flight, pictures_per_minute,
             created_at, requests_per_minute, bytes) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(new.id.to_string())
        .bind(&new.name)
        .bind(&new.webhook_secret)
        .bind(quotas.concepts.map(i64::from))
        .bind(quotas.trainings.map(i64::from))
        .bind(quotas.requests_in_flight.map(i64::from))
        .bind(quotas.pictures_per_minute.map(i64::from))
        .bind(new.created_at)
        .bind(quotas.requests_per_minute.map(i64::from))
        .bind(as_number(quotas.bytes))
        .execute(&self.pools.writes)
        .await;
        match inserted {
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                Err(RegistryError::TenantTaken(new.name))
            }
            other => other.map(|_| new).map_err(Into::into),
        }
    }

    /// A tenant by its name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tenant(&self, name: &str) -> Result<Option<Tenant>, RegistryError> {
        if is_unstorable(name) {
            return Ok(None);
        }
        let row = sqlx::query("SELECT * FROM tenants WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(tenant).transpose()
    }

    /// A tenant by its identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tenant_by_id(&self, id: TenantId) -> Result<Option<Tenant>, RegistryError> {
        let row = sqlx::query("SELECT * FROM tenants WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pools.reads)
            .await?;
        row.as_ref().map(tenant).transpose()
    }

    /// Tenants, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tenants(&self, page: Page<TenantId>) -> Result<Listed<Tenant>, RegistryError> {
        let rows = sqlx::query("SELECT * FROM tenants WHERE id < $1 ORDER BY id DESC LIMIT $2")
            .bind(page.after())
            .bind(page.fetched())
            .fetch_all(&self.pools.reads)
            .await?;
        Ok(page.cut(rows.iter().map(tenant).collect::<Result<_, _>>()?))
    }

    /// Replaces a tenant's quotas; `None` if there is no such tenant.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_quotas(&self, name: &str, quotas: Quotas) -> Result<Option<Tenant>, RegistryError> {
        if is_unstorable(name) {
            return Ok(None);
        }
        sqlx::query(
            "UPDATE tenants SET concepts = $1, trainings = $2, requests_in_flight = $3, pictures_per_minute = $4,
             requests_per_minute = $6, bytes = $7 WHERE name = $5",
        )
        .bind(quotas.concepts.map(i64::from))
        .bind(quotas.trainings.map(i64::from))
        .bind(quotas.requests_in_flight.map(i64::from))
        .bind(quotas.pictures_per_minute.map(i64::from))
        .bind(name)
        .bind(quotas.requests_per_minute.map(i64::from))
        .bind(as_number(quotas.bytes))
        .execute(&self.pools.writes)
        .await?;
        self.tenant(name).await
    }

    /// Gives a tenant a new webhook secret. Until `keep_old_for` has passed the current one signs too, so that
    /// receivers can switch in between; `None` if there is no such tenant.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn rotate_webhook_secret(
        &self,
        name: &str,
        keep_old_for: Duration,
    ) -> Result<Option<Tenant>, RegistryError> {
        if is_unstorable(name) {
            return Ok(None);
        }
        let keep = i64::try_from(keep_old_for.as_millis()).unwrap_or(i64::MAX);
        sqlx::query(
            "UPDATE tenants SET webhook_secret_before = webhook_secret, webhook_secret_before_until = $1, webhook_secret = $2
             WHERE name = $3",
        )
        .bind(now().saturating_add(keep))
        .bind(webhook_secret())
        .bind(name)
        .execute(&self.pools.writes)
        .await?;
        self.tenant(name).await
    }

    /// A tenant's usage.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn usage(&self, id: TenantId) -> Result<Usage, RegistryError> {
        usage(&self.pools.reads, id).await
    }

    /// Checks a tenant's quotas for an addition, and locks out other additions until the transaction ends, so that
    /// two requests cannot both take the last slot.
    ///
    /// # Errors
    /// `QuotaExceeded`; when the database fails.
    pub(super) async fn check_quota(
        &self,
        transaction: &mut Transaction,
        id: TenantId,
        quotas: Quotas,
        addition: Usage,
    ) -> Result<(), RegistryError> {
        self.hold_name(transaction, QUOTA_LOCK, &id.to_string()).await?;
        quotas.check(usage(&mut **transaction, id).await?, addition)
    }

    /// Removes a tenant with all its keys, concepts, trainings, generations and images.
    ///
    /// # Errors
    /// `KeyInvalid`, `OwnTenant` and `LastAdminKey`; when the database or the blob store fails.
    pub async fn delete_tenant(&self, id: TenantId, deletion: Deletion) -> Result<bool, RegistryError> {
        let mut transaction = self.write().await?;
        self.check_deletion(&mut transaction, id, deletion).await?;
        // Lock order: additions to a tenant take this name first.
        self.hold_name(&mut transaction, QUOTA_LOCK, &id.to_string()).await?;
        // From here on, additions to the tenant fail or wait for the end of the transaction.
        sqlx::query(locking!(
            self.backend,
            "SELECT id FROM tenants WHERE id = $1",
            " FOR UPDATE"
        ))
        .bind(id.to_string())
        .fetch_optional(&mut *transaction)
        .await?;
        let blobs: Vec<(Option<String>,)> = sqlx::query_as(
            "WITH own AS (SELECT id FROM concepts WHERE tenant_id = $1)
             SELECT blob FROM concept_pictures WHERE concept_id IN (SELECT id FROM own)
             UNION SELECT hash FROM concept_versions WHERE concept_id IN (SELECT id FROM own)
             UNION SELECT checkpoint FROM trainings WHERE tenant_id = $1
             UNION SELECT p.blob FROM training_previews p JOIN trainings t ON t.id = p.training_id WHERE t.tenant_id = $1
             UNION SELECT blob FROM idempotency_keys WHERE tenant_id = $1
             UNION SELECT blob FROM images WHERE tenant_id = $1",
        )
        .bind(id.to_string())
        .fetch_all(&mut *transaction)
        .await?;
        let deleted = sqlx::query("DELETE FROM tenants WHERE id = $1")
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let blobs: Vec<String> = blobs.into_iter().filter_map(|(blob,)| blob).collect();
        self.remove_unreferenced(&blobs).await?;
        Ok(deleted.rows_affected() > 0)
    }

    /// Rate-limits generations across all processes: counts the images in the current second, unless that would
    /// exceed the tenant's limit per minute. Returns that second, or the current count as a refusal.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn admit_images(
        &self,
        id: TenantId,
        images: u32,
        per_minute: u32,
    ) -> Result<Result<i64, MinuteFull>, RegistryError> {
        let images = Tally {
            images: images.into(),
            requests: 0,
        };
        let limits = Tally {
            images: per_minute.into(),
            requests: i64::MAX,
        };
        self.count_within(id, images, limits).await
    }

    /// Rate-limits requests across all processes: counts one in the current second, unless that would exceed the
    /// tenant's limit per minute. Returns the current count as a refusal.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn admit_request(&self, id: TenantId, per_minute: u32) -> Result<Result<(), MinuteFull>, RegistryError> {
        let request = Tally { images: 0, requests: 1 };
        let limits = Tally {
            images: i64::MAX,
            requests: per_minute.into(),
        };
        Ok(self.count_within(id, request, limits).await?.map(|_| ()))
    }

    /// Adds to the counts of the current second, unless this would exceed a limit for the last minute.
    async fn count_within(
        &self,
        id: TenantId,
        more: Tally,
        limits: Tally,
    ) -> Result<Result<i64, MinuteFull>, RegistryError> {
        let second = self.lease_time().await? / 1000;
        let mut transaction = self.write().await?;
        self.hold_name(&mut transaction, "tally", &id.to_string()).await?;
        let counted = sqlx::query(
            "INSERT INTO picture_tallies (tenant_id, second, pictures, requests)
             SELECT $1, $2, $3, $4 FROM
                 (SELECT CAST(coalesce(sum(pictures), 0) AS BIGINT) AS pictures,
                         CAST(coalesce(sum(requests), 0) AS BIGINT) AS requests
                  FROM picture_tallies WHERE tenant_id = $1 AND second > $5) AS minute
             WHERE pictures <= $6 AND requests <= $7
             ON CONFLICT (tenant_id, second) DO UPDATE SET pictures = picture_tallies.pictures + excluded.pictures,
                 requests = picture_tallies.requests + excluded.requests",
        )
        .bind(id.to_string())
        .bind(second)
        .bind(more.images)
        .bind(more.requests)
        .bind(second - 60)
        .bind(limits.images - more.images)
        .bind(limits.requests - more.requests)
        .execute(&mut *transaction)
        .await?;
        if counted.rows_affected() > 0 {
            transaction.commit().await?;
            return Ok(Ok(second));
        }
        let (count, oldest): (i64, i64) = sqlx::query_as(
            "SELECT CAST(coalesce(sum(counted), 0) AS BIGINT), coalesce(min(second), $4) FROM
                 (SELECT second, CASE WHEN $3 > 0 THEN requests ELSE pictures END AS counted FROM picture_tallies
                  WHERE tenant_id = $1 AND second > $2) AS minute
             WHERE counted > 0",
        )
        .bind(id.to_string())
        .bind(second - 60)
        .bind(more.requests)
        .bind(second)
        .fetch_one(&mut *transaction)
        .await?;
        Ok(Err(MinuteFull {
            count: u32::try_from(count).unwrap_or(u32::MAX),
            wait: Duration::from_secs(u64::try_from(oldest + 60 - second).unwrap_or(1).max(1)),
        }))
    }

    /// Removes counts that are too old for any rate limit.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn expire_tallies(&self) -> Result<(), RegistryError> {
        sqlx::query("DELETE FROM picture_tallies WHERE second <= $1")
            .bind(self.lease_time().await? / 1000 - 60)
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// Subtracts `images` from the count of [`Self::admit_images`] in that second.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn take_back(&self, id: TenantId, second: i64, images: u32) -> Result<(), RegistryError> {
        sqlx::query("UPDATE picture_tallies SET pictures = pictures - $1 WHERE tenant_id = $2 AND second = $3")
            .bind(i64::from(images))
            .bind(id.to_string())
            .bind(second)
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }

    /// A tenant's current usage in all processes: queued and running generations other than this process's
    /// foreground ones, and images of the last minute.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn activity(&self, id: TenantId) -> Result<(u32, u32), RegistryError> {
        let second = self.lease_time().await? / 1000;
        let (generations, images): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM generations WHERE tenant_id = $1 AND status IN ('queued', 'running')
                     AND (background = 1 OR owner <> $2)),
                    (SELECT CAST(coalesce(sum(pictures), 0) AS BIGINT) FROM picture_tallies
                     WHERE tenant_id = $1 AND second > $3)",
        )
        .bind(id.to_string())
        .bind(self.process.to_string())
        .bind(second - 60)
        .fetch_one(&self.pools.reads)
        .await?;
        let number = |count: i64| u32::try_from(count).unwrap_or(u32::MAX);
        Ok((number(generations), number(images)))
    }
}
