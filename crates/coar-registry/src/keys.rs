//! API keys, their tenants and scopes. Only the hashes of the keys are stored.

use std::fmt;
use std::str::FromStr;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::db::identifier;
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
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 4] = [Self::Read, Self::Generate, Self::Train, Self::Admin];

    /// The name used in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Generate => "generate",
            Self::Train => "train",
            Self::Admin => "admin",
        }
    }
}

/// The scopes of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// Every scope.
    pub const ALL: Self = Self(0b1111);

    /// Whether it is among them. No scope implies another.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }

    /// The scopes, in order.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }
}

impl Default for Scopes {
    /// All scopes but `admin`.
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
                    "has `{}`; expected one or more of read, generate, train, admin",
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
    /// Whether it is valid at that time, in milliseconds.
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
    /// Stores a key.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_key(&self, new: &NewKey) -> Result<ApiKey, RegistryError> {
        let id = KeyId::new();
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
        .fetch_one(&self.pools.writes)
        .await?;
        key(&row)
    }

    /// Whether there is any key, revoked and expired ones included: revoking the last key does not open the server.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn has_keys(&self) -> Result<bool, RegistryError> {
        let found = sqlx::query("SELECT id FROM api_keys LIMIT 1")
            .fetch_optional(&self.pools.reads)
            .await?;
        Ok(found.is_some())
    }

    /// The key with that public part.
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
