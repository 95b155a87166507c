//! The server's own secret: it signs image addresses and authenticates processes of one database to each other. While
//! it is changed, two are valid.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use super::db::locking;
use super::{Registry, RegistryError, now};

/// The settings with the current secret, and with the previous one and its times.
const CURRENT: &str = "server_secret";
const BEFORE: &str = "server_secret_before";
/// How often processes read the secret; each has a new one after that time.
pub const SECRETS_REFRESH: Duration = Duration::from_secs(5);
/// A new secret is not used before every process has read it, by a wide margin.
const SIGNS_AFTER: Duration = Duration::from_secs(30);

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// The secret before the last change.
#[derive(Clone, PartialEq, Eq)]
struct Before {
    secret: String,
    /// The time until which it is used for signing.
    signs_until: i64,
    accepted_until: i64,
}

/// The server's secrets as they are stored.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerSecrets {
    current: String,
    before: Option<Before>,
}

impl std::fmt::Debug for ServerSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerSecrets").finish_non_exhaustive()
    }
}

impl ServerSecrets {
    /// The secret that signs at that time, in milliseconds.
    pub fn signing(&self, at: i64) -> &str {
        match &self.before {
            Some(before) if at < before.signs_until => &before.secret,
            _ => &self.current,
        }
    }

    /// The secrets whose signatures are accepted at that time; an empty one is never accepted.
    pub fn accepted(&self, at: i64) -> impl Iterator<Item = &str> {
        let before = self.before.as_ref().filter(|before| at < before.accepted_until);
        let all = std::iter::once(&self.current).chain(before.map(|before| &before.secret));
        all.map(String::as_str).filter(|secret| !secret.is_empty())
    }
}

/// The secrets that this process has read, shared by their users.
#[derive(Debug, Clone)]
pub struct SharedSecrets(Arc<RwLock<Arc<ServerSecrets>>>);

impl SharedSecrets {
    /// One secret that does not change.
    pub fn of(secret: &str) -> Self {
        Self::new(ServerSecrets {
            current: secret.to_owned(),
            before: None,
        })
    }

    /// Secrets as read from the database.
    pub fn new(secrets: ServerSecrets) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(secrets))))
    }

    /// The secrets as last read.
    pub fn get(&self) -> Arc<ServerSecrets> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the secrets again.
    ///
    /// # Errors
    /// When the database fails; the secrets are unchanged then.
    pub async fn refresh(&self, registry: &Registry) -> Result<(), RegistryError> {
        let secrets = Arc::new(registry.server_secrets().await?);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = secrets;
        Ok(())
    }
}

fn new_secret() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

/// `secret signs_until accepted_until`
fn read_before(text: &str) -> Option<Before> {
    let mut parts = text.split(' ');
    Some(Before {
        secret: parts.next()?.to_owned(),
        signs_until: parts.next()?.parse().ok()?,
        accepted_until: parts.next()?.parse().ok()?,
    })
}

impl Registry {
    /// The current secret, with which image addresses are signed from now on or soon: 32 random bytes in hex that never
    /// leave the server.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn server_secret(&self) -> Result<String, RegistryError> {
        self.setting(CURRENT, &new_secret()).await
    }

    /// The server's secrets; the first one is created if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn server_secrets(&self) -> Result<ServerSecrets, RegistryError> {
        let stored: Vec<(String, String)> = sqlx::query_as("SELECT key, value FROM settings WHERE key IN ($1, $2)")
            .bind(CURRENT)
            .bind(BEFORE)
            .fetch_all(&self.pools.reads)
            .await?;
        let value = |key: &str| stored.iter().find(|(stored, _)| stored == key).map(|(_, value)| value);
        let current = match value(CURRENT) {
            Some(current) => current.clone(),
            None => self.server_secret().await?,
        };
        let before = match value(BEFORE) {
            None => None,
            Some(text) => Some(read_before(text).ok_or_else(|| RegistryError::Row(BEFORE.to_owned()))?),
        };
        Ok(ServerSecrets { current, before })
    }

    /// Creates a new server secret. The current one is accepted for `accept_old_for`, and one from an earlier change no
    /// longer.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn rotate_server_secret(&self, accept_old_for: Duration) -> Result<(), RegistryError> {
        self.server_secret().await?;
        let mut transaction = self.write().await?;
        let (old,): (String,) = sqlx::query_as(locking!(
            self.backend,
            "SELECT value FROM settings WHERE key = $1",
            " FOR UPDATE"
        ))
        .bind(CURRENT)
        .fetch_one(&mut *transaction)
        .await?;
        let at = now();
        let accepted_until = at.saturating_add(milliseconds(accept_old_for));
        let signs_until = match accept_old_for > SIGNS_AFTER {
            true => at + milliseconds(SIGNS_AFTER),
            false => at,
        };
        for (key, value) in [
            (CURRENT, new_secret()),
            (BEFORE, format!("{old} {signs_until} {accepted_until}")),
        ] {
            sqlx::query(
                "INSERT INTO settings (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )
            .bind(key)
            .bind(value)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_secrets_are_valid_until_the_time_of_the_old_one_is_over() {
        let (_dir, registry) = crate::tests::test_registry().await;
        let known = SharedSecrets::new(registry.server_secrets().await.unwrap());
        let first = known.get().signing(now()).to_owned();
        assert_eq!((first.len(), &registry.server_secret().await.unwrap()), (64, &first));
        registry.rotate_server_secret(Duration::from_secs(3600)).await.unwrap();
        let at = now();
        // A process that has not read the change yet has the secret with which the others still sign.
        assert_eq!(known.get().signing(at), first);
        known.refresh(&registry).await.unwrap();
        let secrets = known.get();
        assert_eq!(secrets.signing(at), first);
        let second = secrets.signing(at + milliseconds(SIGNS_AFTER)).to_owned();
        assert_ne!(second, first);
        assert_eq!(secrets.accepted(at).collect::<Vec<_>>(), [&second, &first]);
        assert_eq!(secrets.accepted(at + 3_600_000).collect::<Vec<_>>(), [&second]);
        // If the old secret is not accepted any more, the new one is used at once.
        registry.rotate_server_secret(Duration::ZERO).await.unwrap();
        let secrets = registry.server_secrets().await.unwrap();
        let third = secrets.signing(now()).to_owned();
        assert!(third != first && third != second);
        assert_eq!(secrets.accepted(now()).collect::<Vec<_>>(), [&third]);
        assert!(!format!("{secrets:?}").contains(&third));
        assert_eq!(SharedSecrets::of("").get().accepted(0).count(), 0);
    }
}
