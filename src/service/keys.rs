//! API keys: created, shown once, checked, revoked. They need no engine: the command line uses them too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::Rng as _;
use subtle::ConstantTimeEq as _;

use super::Caller;
use crate::registry::blobs::content_hash;
use crate::registry::{ApiKey, Listed, NewKey, Page, Quotas, Registry, RegistryError, Scopes, Tenant, now};
use coar_core::concept::is_slug;
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::KeyId;

/// How long entries of the cache are valid: a revocation takes effect within a second.
const BELIEVED: Duration = Duration::from_millis(500);
/// Maximum number of cached keys; when it is reached, all are evicted.
const REMEMBERED: usize = 4096;
/// Length of a key's public part, by which it is looked up.
const PUBLIC: usize = 8;
/// Length of the secret part: 32 random bytes in base64.
const SECRET: usize = 43;
/// Maximum length of a key's name.
const NAME_LIMIT: usize = 100;
/// Latest expiry of a key, in days.
const DAYS_LIMIT: u32 = 3650;

/// Checks keys, with a short-lived cache.
#[derive(Debug, Clone)]
pub struct Keys {
    registry: Registry,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// There has been a key, or this process must not serve callers without one. Never reset.
    required: bool,
    /// When the database was last read without a key.
    none_at: Option<Instant>,
    /// Keys by public part, and for requests that wait by identifier. They do not collide: only the identifiers contain
    /// an underscore.
    keys: HashMap<String, (Instant, ApiKey)>,
}

/// The parameters of a new key.
#[derive(Debug, Clone, Default)]
pub struct KeyRequest {
    /// Name of the tenant.
    pub tenant: String,
    /// Its purpose.
    pub name: Option<String>,
    pub scopes: Scopes,
    pub expires_in_days: Option<u32>,
}

/// A new key with its text, which is not stored and never shown again.
#[derive(Debug, Clone)]
pub struct CreatedKey {
    pub key: ApiKey,
    /// `coar_` and 8 characters by which it is looked up, `_` and 43 secret characters.
    pub text: String,
}

/// The public part of a well-formed key.
fn public_part(text: &str) -> Option<&str> {
    let rest = text.strip_prefix("coar_")?;
    let (public, secret) = rest.split_at_checked(PUBLIC)?;
    let secret = secret.strip_prefix('_')?;
    let plain = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    (secret.len() == SECRET && plain(public) && plain(secret)).then_some(public)
}

fn new_text() -> String {
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    let public: String = (0..PUBLIC)
        .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
        .collect();
    format!("coar_{public}_{}", URL_SAFE_NO_PAD.encode(rng.random::<[u8; 32]>()))
}

fn invalid_key() -> Error {
    Error::new(
        ErrorKind::Unauthorized,
        "invalid_api_key",
        "This needs a valid key, sent as `Authorization: Bearer coar_…`.",
    )
}

pub(super) fn no_tenant(name: &str) -> Error {
    Error::field(
        "tenant_not_found",
        "tenant",
        format!("is `{name}`, which does not exist"),
    )
    .of_kind(ErrorKind::NotFound)
}

pub(super) fn check_tenant_name(name: &str) -> Result<(), Error> {
    match is_slug(name) {
        true => Ok(()),
        false => Err(Error::field(
            "invalid_value",
            "name",
            "must be 1 to 63 of a-z, 0-9 and -, the first not a hyphen",
        )),
    }
}

impl Keys {
    /// Keys of this database.
    pub fn new(registry: Registry) -> Self {
        Self {
            registry,
            memory: Arc::default(),
        }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        // No operation leaves the cache half-written.
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes this process require keys, independent of the database.
    pub fn require(&self) {
        self.memory().required = true;
    }

    /// Clears the cache: keys are read again.
    pub(super) fn forget(&self) {
        self.memory().keys.clear();
    }

    /// Whether callers need a key: as soon as there has been one, until the process ends. At most half a second late.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn required(&self) -> Result<bool, RegistryError> {
        {
            let memory = self.memory();
            if memory.required {
                return Ok(true);
            }
            if memory.none_at.is_some_and(|at| at.elapsed() < BELIEVED) {
                return Ok(false);
            }
        }
        let at = Instant::now();
        let required = self.registry.keys_required().await?;
        let mut memory = self.memory();
        memory.required |= required;
        memory.none_at = Some(at);
        Ok(memory.required)
    }

    /// The owner of a key, or the default tenant if there are no keys at all.
    ///
    /// # Errors
    /// `invalid_api_key`: missing, malformed, unknown, expired, revoked; these are not distinguished.
    pub async fn authenticate(&self, text: Option<&str>) -> Result<Caller, Error> {
        if !self.required().await? {
            return Ok(Caller::LOCAL);
        }
        let text = text.ok_or_else(invalid_key)?;
        let public = public_part(text).ok_or_else(invalid_key)?;
        let key = self.known(public).await?.ok_or_else(invalid_key)?;
        let equal = content_hash(text.as_bytes()).as_bytes().ct_eq(key.hash.as_bytes());
        if !bool::from(equal) || !key.is_valid(now()) {
            return Err(invalid_key());
        }
        Ok(Caller {
            tenant: key.tenant,
            key: Some(key.id),
            scopes: key.scopes,
        })
    }

    /// Waits until the caller's key is revoked, expired or deleted; without keys, until there is one. Returns the
    /// refusal that the next request would get. About half a second late; a failure of the database ends nothing.
    pub async fn ended(&self, caller: Caller) -> Error {
        loop {
            tokio::time::sleep(BELIEVED).await;
            let valid = match caller.key {
                None => self.required().await.map(|required| !required),
                Some(id) => self.is_valid(id).await,
            };
            if let Ok(false) = valid {
                return invalid_key();
            }
        }
    }

    /// Whether a key is valid now. Uses the cache if it was read within half a second, so all requests that wait with
    /// one key read its row once.
    async fn is_valid(&self, id: KeyId) -> Result<bool, RegistryError> {
        let name = id.to_string();
        let remembered = self.memory().keys.get(&name).cloned();
        let key = match remembered {
            Some((at, key)) if at.elapsed() < BELIEVED => Some(key),
            _ => {
                let at = Instant::now();
                let key = self.registry.key(id).await?;
                match &key {
                    Some(key) => self.remember(&name, at, key),
                    None => drop(self.memory().keys.remove(&name)),
                }
                key
            }
        };
        Ok(key.is_some_and(|key| key.is_valid(now())))
    }

    fn remember(&self, name: &str, at: Instant, key: &ApiKey) {
        let mut memory = self.memory();
        if memory.keys.len() >= REMEMBERED {
            memory.keys.clear();
        }
        memory.keys.insert(name.to_owned(), (at, key.clone()));
    }

    /// A key from the cache or the database. Its use is recorded when it is read from the database; a failure to do so
    /// is only logged.
    async fn known(&self, public: &str) -> Result<Option<ApiKey>, RegistryError> {
        if let Some((at, key)) = self.memory().keys.get(public)
            && at.elapsed() < BELIEVED
        {
            return Ok(Some(key.clone()));
        }
        let at = Instant::now();
        let Some(key) = self.registry.key_by_public_id(public).await? else {
            self.memory().keys.remove(public);
            return Ok(None);
        };
        self.remember(public, at, &key);
        if let Err(error) = self.registry.note_key_use(&key).await {
            tracing::warn!(key = %key.id, %error, "the use of a key could not be noted");
        }
        Ok(Some(key))
    }

    /// Creates a key for a tenant.
    ///
    /// # Errors
    /// A value that cannot be used; a tenant that does not exist.
    pub async fn create(&self, request: KeyRequest) -> Result<CreatedKey, Error> {
        let name = request.name.unwrap_or_default();
        if name.chars().count() > NAME_LIMIT || name.chars().any(char::is_control) {
            let problem = format!("must be at most {NAME_LIMIT} characters, none of them a control character");
            return Err(Error::field("invalid_value", "name", problem).limit(NAME_LIMIT as u64));
        }
        if request.scopes.iter().next().is_none() {
            return Err(Error::field(
                "invalid_value",
                "scopes",
                "is empty; a key needs one scope at least",
            ));
        }
        let expires_at = match request.expires_in_days {
            None => None,
            Some(days) if (1..=DAYS_LIMIT).contains(&days) => Some(now() + i64::from(days) * 86_400_000),
            Some(days) => {
                let problem = format!("is {days}; expected 1 to {DAYS_LIMIT}");
                return Err(Error::field("invalid_value", "expires_in_days", problem).limit(DAYS_LIMIT.into()));
            }
        };
        let tenant = self.registry.tenant(&request.tenant).await?;
        let tenant = tenant.ok_or_else(|| no_tenant(&request.tenant))?.id;
        let text = new_text();
        let new = NewKey {
            tenant,
            public_id: public_part(&text)
                .map(str::to_owned)
                .ok_or_else(|| Error::internal("a new key is malformed"))?,
            hash: content_hash(text.as_bytes()),
            name,
            scopes: request.scopes,
            expires_at,
        };
        let key = self.registry.add_key(&new).await?;
        self.require();
        Ok(CreatedKey { key, text })
    }

    /// The tenant of that name, created if there is none, and whether it was created.
    ///
    /// # Errors
    /// When the name is malformed, or the database fails.
    pub async fn tenant_or_new(&self, name: &str) -> Result<(Tenant, bool), Error> {
        check_tenant_name(name)?;
        match self.registry.tenant(name).await? {
            Some(tenant) => Ok((tenant, false)),
            None => Ok((self.registry.add_tenant(name, Quotas::default()).await?, true)),
        }
    }

    /// Keys of all tenants, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self, page: Page<KeyId>) -> Result<Listed<ApiKey>, Error> {
        Ok(self.registry.keys(page).await?)
    }

    /// Revokes a key, for good.
    ///
    /// # Errors
    /// When there is none.
    pub async fn revoke(&self, id: &str) -> Result<(), Error> {
        let missing = || Error::new(ErrorKind::NotFound, "key_not_found", format!("There is no key `{id}`."));
        let key: KeyId = id.parse().map_err(|_| missing())?;
        let revoked = self.registry.revoke_key(key).await?;
        self.forget();
        if revoked { Ok(()) } else { Err(missing()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{Deletion, Scope};

    fn refused(outcome: Result<Caller, Error>) -> &'static str {
        outcome.expect_err("the key is refused").code
    }

    #[tokio::test]
    async fn a_key_opens_its_own_tenant_until_it_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::new(Registry::open(dir.path()).await.unwrap());
        assert_eq!(keys.authenticate(Some("anything")).await.unwrap(), Caller::LOCAL);
        let (tenant, _) = keys.tenant_or_new("acme").await.unwrap();
        let request = KeyRequest {
            tenant: "acme".into(),
            scopes: "read".parse().unwrap(),
            ..KeyRequest::default()
        };
        let created = keys.create(request.clone()).await.unwrap();
        assert_eq!(created.text.len(), 5 + PUBLIC + 1 + SECRET);
        let caller = keys.authenticate(Some(&created.text)).await.unwrap();
        assert_eq!((caller.tenant, caller.key), (tenant.id, Some(created.key.id)));
        assert!(caller.require(Scope::Read).is_ok());
        assert_eq!(caller.require(Scope::Admin).unwrap_err().code, "missing_scope");
        let mut forged = created.text.clone();
        forged.replace_range(forged.len() - 1.., if forged.ends_with('A') { "B" } else { "A" });
        for wrong in [None, Some("coar_x"), Some(forged.as_str()), Some(&created.text[1..])] {
            assert_eq!(refused(keys.authenticate(wrong).await), "invalid_api_key");
        }
        let noted = keys.list(Page { limit: 1, after: None }).await.unwrap();
        assert!(noted.rows[0].last_used_at.is_some());
        keys.revoke(&created.key.id.to_string()).await.unwrap();
        assert_eq!(refused(keys.authenticate(Some(&created.text)).await), "invalid_api_key");
        // The last key is deleted, and keys are still required.
        assert_eq!(refused(keys.authenticate(None).await), "invalid_api_key");
        let absent = KeyRequest {
            tenant: "absent".into(),
            ..request
        };
        assert_eq!(keys.create(absent).await.unwrap_err().code, "tenant_not_found");
    }

    #[tokio::test]
    async fn without_a_single_row_of_a_key_callers_still_need_one() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        let keys = Keys::new(registry.clone());
        let (acme, made) = keys.tenant_or_new("acme").await.unwrap();
        assert!(made && !keys.tenant_or_new("acme").await.unwrap().1);
        let request = KeyRequest {
            tenant: "acme".into(),
            scopes: Scopes::ALL,
            ..KeyRequest::default()
        };
        keys.create(request).await.unwrap();
        let all = Deletion {
            including_the_last_admin_key: true,
            ..Deletion::default()
        };
        assert!(registry.delete_tenant(acme.id, all).await.unwrap());
        let page = Page { limit: 1, after: None };
        assert!(keys.list(page).await.unwrap().rows.is_empty());
        // In a process that has seen a key, and in a new one.
        for keys in [keys, Keys::new(registry)] {
            assert_eq!(refused(keys.authenticate(None).await), "invalid_api_key");
        }
        // A process that others can reach requires keys even if the database has none.
        let empty = tempfile::tempdir().unwrap();
        let keys = Keys::new(Registry::open(empty.path()).await.unwrap());
        assert_eq!(keys.authenticate(None).await.unwrap(), Caller::LOCAL);
        keys.require();
        assert_eq!(refused(keys.authenticate(None).await), "invalid_api_key");
    }

    /// Half of the wrong keys differ in their first secret character, half in their last. If texts or hashes were
    /// compared byte by byte, a longer correct prefix would take longer. The bounds are wide, for a loaded machine.
    #[tokio::test]
    async fn a_wrong_key_takes_as_long_wherever_it_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::new(Registry::open(dir.path()).await.unwrap());
        keys.tenant_or_new("acme").await.unwrap();
        let request = KeyRequest {
            tenant: "acme".into(),
            scopes: "read".parse().unwrap(),
            ..KeyRequest::default()
        };
        let text = keys.create(request).await.unwrap().text;
        let other = |at: usize| {
            let mut wrong = text.clone().into_bytes();
            wrong[at] = if wrong[at] == b'A' { b'B' } else { b'A' };
            String::from_utf8(wrong).unwrap()
        };
        let wrong = [other(5 + PUBLIC + 1), other(text.len() - 1)];
        let mut times = [vec![], vec![]];
        for _ in 0..4000 {
            for (wrong, times) in wrong.iter().zip(&mut times) {
                let begun = Instant::now();
                assert!(keys.authenticate(Some(wrong)).await.is_err());
                times.push(begun.elapsed());
            }
        }
        let [first, last] = times.map(|mut times| {
            times.sort();
            times[times.len() / 2].as_secs_f64()
        });
        assert!((0.7..1.4).contains(&(first / last)), "{first} {last}");
    }

    #[test]
    fn an_expired_key_is_not_valid() {
        let key = ApiKey {
            id: KeyId::new(),
            tenant: coar_core::ids::TenantId::DEFAULT,
            tenant_name: "default".into(),
            public_id: String::new(),
            hash: String::new(),
            name: String::new(),
            scopes: Scopes::ALL,
            created_at: 0,
            expires_at: Some(10),
            revoked_at: None,
            last_used_at: None,
        };
        assert!(key.is_valid(9) && !key.is_valid(10));
    }
}
