//! API keys, their tenants and scopes. Only the hashes of the keys are stored.

use std::fmt;
use std::str::FromStr;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::identifier;
use super::pool::Transaction;
use super::{Listed, Page, Registry, RegistryError, now};
use coar_core::ids::{KeyId, TenantId};

/// A kind of request that a key may allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Reading concepts, trainings and images.
    Read,
    /// Generating images.
    Generate,
    /// Registering, training, changing and deleting concepts.
    Train,
    /// Managing keys and tenants.
    Admin,
    /// Reading the server's metrics.
    Metrics,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [Self::Read, Self::Generate, Self::Train, Self::Admin, Self::Metrics];

    /// The name used in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Generate => "generate",
            Self::Train => "train",
            Self::Admin => "admin",
            Self::Metrics => "metrics",
        }
    }
}

/// The scopes of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// Every scope.
    pub const ALL: Self = Self(0b1_1111);

    /// Whether `scope` is among them. No scope implies another.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }

    /// The scopes, in order.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }
}

impl Default for Scopes {
    /// The scopes for customers: all but `admin` and `metrics`.
    fn default() -> Self {
        [Scope::Read, Scope::Generate, Scope::Train].into_iter().collect()
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | 1 << scope as u8))
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.iter().map(Scope::as_str).collect();
        f.write_str(&words.join(","))
    }
}

impl FromStr for Scopes {
    type Err = String;

    /// Parses scopes separated by commas; at least one.
    fn from_str(text: &str) -> Result<Self, String> {
        let word = |word: &str| {
            let found = Scope::ALL.into_iter().find(|scope| scope.as_str() == word.trim());
            found.ok_or_else(|| {
                format!(
                    "has `{}`; expected one or more of read, generate, train, admin, metrics",
                    word.trim()
                )
            })
        };
        text.split(',').map(word).collect()
    }
}

/// A stored key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub id: KeyId,
    pub tenant: TenantId,
    /// Its tenant's name.
    pub tenant_name: String,
    /// The 8 characters after `coar_`.
    pub public_id: String,
    /// Hex SHA-256 of the whole key.
    pub hash: String,
    pub name: String,
    pub scopes: Scopes,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub revoked_at: Option<i64>,
    pub last_used_at: Option<i64>,
}

impl ApiKey {
    /// Whether the key is valid at that time, in milliseconds.
    pub fn is_valid(&self, at: i64) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|end| at < end)
    }
}

/// A key to be stored.
#[derive(Debug, Clone)]
pub struct NewKey {
    pub tenant: TenantId,
    pub public_id: String,
    pub hash: String,
    pub name: String,
    pub scopes: Scopes,
    pub expires_at: Option<i64>,
}

/// Conditions for the deletion of a tenant.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deletion {
    /// The administrator's key; it must still be valid, and must not belong to the tenant.
    pub asked_with: Option<KeyId>,
    /// Deletes the tenant even if no valid key with the scope `admin` is left afterwards.
    pub including_the_last_admin_key: bool,
}

/// The setting that exists once a key has been created.
const KEYS_REQUIRED: &str = "keys_required";
/// The kind of the name lock under which tenants are deleted.
const DELETION_LOCK: &str = "deletion of tenants";
/// Resolution of `last_used_at`, in milliseconds.
const USE_RESOLUTION: i64 = 60_000;

fn key(row: &AnyRow) -> Result<ApiKey, RegistryError> {
    let scopes: String = row.try_get("scopes")?;
    Ok(ApiKey {
        id: identifier(row, "id")?,
        tenant: identifier(row, "tenant_id")?,
        tenant_name: row.try_get("tenant_name")?,
        public_id: row.try_get("public_id")?,
        hash: row.try_get("hash")?,
        name: row.try_get("name")?,
        scopes: scopes.parse().map_err(RegistryError::Row)?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
        revoked_at: row.try_get("revoked_at")?,
        last_used_at: row.try_get("last_used_at")?,
    })
}

impl Registry {
    /// Stores a key. With the first one, keys are required from then on.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_key(&self, new: &NewKey) -> Result<ApiKey, RegistryError> {
        let id = KeyId::new();
        let mut transaction = self.write().await?;
        sqlx::query("INSERT INTO settings (key, value) VALUES ($1, 'yes') ON CONFLICT DO NOTHING")
            .bind(KEYS_REQUIRED)
            .execute(&mut *transaction)
            .await?;
        let row = sqlx::query(
            "INSERT INTO api_keys (id, tenant_id, public_id, hash, name, scopes, created_at, expires_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             RETURNING *, (SELECT name FROM tenants WHERE tenants.id = tenant_id) AS tenant_name",
        )
        .bind(id.to_string())
        .bind(new.tenant.to_string())
        .bind(&new.public_id)
        .bind(&new.hash)
        .bind(&new.name)
        .bind(new.scopes.to_string())
        .bind(now())
        .bind(new.expires_at)
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        key(&row)
    }

    /// Whether callers need a key: a key exists or has existed. The rows are checked too, because a program with an
    /// earlier schema that runs beside this one creates keys without storing that fact.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keys_required(&self) -> Result<bool, RegistryError> {
        let found = sqlx::query("SELECT 1 FROM settings WHERE key = $1 UNION ALL SELECT 1 FROM api_keys LIMIT 1")
            .bind(KEYS_REQUIRED)
            .fetch_optional(&self.pools.reads)
            .await?;
        Ok(found.is_some())
    }

    /// Checks whether the keys allow the deletion of a tenant. Until the transaction ends, no other tenant is deleted,
    /// so two administrators cannot delete each other's tenants.
    pub(super) async fn check_deletion(
        &self,
        transaction: &mut Transaction,
        tenant: TenantId,
        deletion: Deletion,
    ) -> Result<(), RegistryError> {
        self.hold_name(transaction, DELETION_LOCK, "").await?;
        let admins: Vec<(String, String)> = sqlx::query_as(
            "SELECT id, tenant_id FROM api_keys
             WHERE ',' || scopes || ',' LIKE '%,admin,%' AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $1)",
        )
        .bind(now())
        .fetch_all(&mut **transaction)
        .await?;
        let tenant = tenant.to_string();
        if let Some(key) = deletion.asked_with {
            let key = key.to_string();
            let owner = admins.iter().find(|(id, _)| *id == key).map(|(_, owner)| owner);
            if owner.ok_or(RegistryError::KeyInvalid)? == &tenant {
                return Err(RegistryError::OwnTenant);
            }
        }
        let leaves_one = admins.iter().any(|(_, owner)| *owner != tenant);
        match admins.is_empty() || leaves_one || deletion.including_the_last_admin_key {
            true => Ok(()),
            false => Err(RegistryError::LastAdminKey),
        }
    }

    /// The key with the given public part.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn key_by_public_id(&self, public_id: &str) -> Result<Option<ApiKey>, RegistryError> {
        let row = sqlx::query(
            "SELECT k.*, t.name AS tenant_name FROM api_keys k JOIN tenants t ON t.id = k.tenant_id WHERE k.public_id = $1",
        )
        .bind(public_id)
        .fetch_optional(&self.pools.reads)
        .await?;
        row.as_ref().map(key).transpose()
    }

    /// The key with the given identifier.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn key(&self, id: KeyId) -> Result<Option<ApiKey>, RegistryError> {
        let row = sqlx::query(
            "SELECT k.*, t.name AS tenant_name FROM api_keys k JOIN tenants t ON t.id = k.tenant_id WHERE k.id = $1",
        )
        .bind(id.to_string())
        .fetch_optional(&self.pools.reads)
        .await?;
        row.as_ref().map(key).transpose()
    }

    /// Keys of all tenants, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keys(&self, page: Page<KeyId>) -> Result<Listed<ApiKey>, RegistryError> {
        let rows = sqlx::query(
            "SELECT k.*, t.name AS tenant_name FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
             WHERE k.id < $1 ORDER BY k.id DESC LIMIT $2",
        )
        .bind(page.after())
        .bind(page.fetched())
        .fetch_all(&self.pools.reads)
        .await?;
        Ok(page.cut(rows.iter().map(key).collect::<Result<_, _>>()?))
    }

    /// Revokes a key permanently; the row is kept. False if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn revoke_key(&self, id: KeyId) -> Result<bool, RegistryError> {
        let changed = sqlx::query("UPDATE api_keys SET revoked_at = coalesce(revoked_at, $1) WHERE id = $2")
            .bind(now())
            .bind(id.to_string())
            .execute(&self.pools.writes)
            .await?;
        Ok(changed.rows_affected() > 0)
    }

    /// Records the use of a key, at most once a minute.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_key_use(&self, key: &ApiKey) -> Result<(), RegistryError> {
        let at = now();
        if key.last_used_at.is_some_and(|last| at - last < USE_RESOLUTION) {
            return Ok(());
        }
        sqlx::query("UPDATE api_keys SET last_used_at = $1 WHERE id = $2")
            .bind(at)
            .bind(key.id.to_string())
            .execute(&self.pools.writes)
            .await?;
        Ok(())
    }
}
