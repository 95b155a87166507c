//! Content-addressed storage: bytes are written once under their SHA-256 and verified at each read.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use sha2::{Digest, Sha256};

/// How long the client retries a store that does not answer.
const RETRIES: Duration = Duration::from_secs(30);

/// Why bytes could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("no blob {0}")]
    Missing(String),
    #[error("blob {0} is damaged: its content has another hash")]
    Damaged(String),
    #[error("blob {0} has {1} bytes, more than can be used here")]
    TooLarge(String, u64),
    #[error("`{0}` is not a blob store URL: {1}")]
    Address(String, String),
    #[error(transparent)]
    Store(#[from] object_store::Error),
    #[error("{0}: {1}")]
    File(String, std::io::Error),
    #[error("{}", no_credentials(*.profile))]
    NoCredentials { profile: bool },
}

/// Variables that name credentials for S3, in this order. Without any of them, the cloud's metadata service is used.
const CREDENTIALS: &[&[&str]] = &[
    &["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
    &["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"],
    &["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"],
    &["AWS_CONTAINER_CREDENTIALS_FULL_URI"],
    &["AWS_SKIP_SIGNATURE"],
];

/// How long the metadata service may take: on a machine that has one, it answers at once.
const METADATA: Duration = Duration::from_secs(5);

fn names_credentials(is_set: impl Fn(&str) -> bool) -> bool {
    CREDENTIALS.iter().any(|names| names.iter().all(|name| is_set(name)))
}

fn no_credentials(profile: bool) -> String {
    let named: Vec<String> = CREDENTIALS[..4].iter().map(|names| names.join(" with ")).collect();
    let ignored = match profile {
        true => "AWS_PROFILE is set, but profiles and ~/.aws are not read",
        false => "profiles and ~/.aws are not read",
    };
    format!(
        "no credentials: none of {} is set, and the machine's metadata service gives none; {ignored}",
        named.join(", ")
    )
}

/// The store.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    /// Prefix of every key.
    prefix: Key,
}

/// Hex SHA-256.
pub fn content_hash(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Whether S3 may be used without TLS: the operator has configured an `http` address, or allows it explicitly.
fn plain_http() -> bool {
    let is = |name: &str, wanted: fn(&str) -> bool| std::env::var(name).is_ok_and(|value| wanted(&value));
    ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .any(|name| is(name, |url| url.starts_with("http://")))
        || is("AWS_ALLOW_HTTP", |value| {
            value.eq_ignore_ascii_case("true") || value == "1"
        })
}

impl Blobs {
    /// A store in a local folder, which is created.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn open(dir: &Path) -> Result<Self, BlobError> {
        super::create_private_dir(dir).map_err(|error| BlobError::File(dir.display().to_string(), error))?;
        let store = LocalFileSystem::new_with_prefix(dir)?
            .with_automatic_cleanup(true)
            .with_fsync(true);
        Ok(Self {
            store: Arc::new(store),
            prefix: Key::default(),
        })
    }

    /// A store behind an address: `s3://bucket/prefix`, with the usual `AWS_*` variables for keys, region and endpoint.
    ///
    /// # Errors
    /// When the address or the variables cannot be used.
    pub fn connect(url: &str) -> Result<Self, BlobError> {
        let unusable = |problem: &str| BlobError::Address(url.to_owned(), problem.to_owned());
        let rest = url
            .strip_prefix("s3://")
            .ok_or_else(|| unusable("expected s3://bucket/prefix"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(unusable("names no bucket"));
        }
        // Fails if a provider is already installed, which is then kept.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig {
            max_retries: 8,
            retry_timeout: RETRIES,
            ..RetryConfig::default()
        };
        let client = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(3))
            .with_timeout(Duration::from_secs(20))
            // Drops connections that only this end still considers open.
            .with_read_timeout(Duration::from_secs(10))
            .with_allow_http(plain_http());
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_retry(retry)
            .build()?;
        Ok(Self {
            store: Arc::new(store),
            prefix: Key::from(prefix),
        })
    }

    fn key(&self, hash: &str) -> Key {
        self.prefix.clone().join(hash.get(..2).unwrap_or("__")).join(hash)
    }

    /// Stores bytes and returns their hash; storing the same bytes again has no effect.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put(&self, bytes: Bytes) -> Result<String, BlobError> {
        let hash = content_hash(&bytes);
        self.put_as(&hash, bytes).await?;
        Ok(hash)
    }

    /// Checks that the store can be reached and that its bucket exists.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub async fn probe(&self) -> Result<(), BlobError> {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let mut listed = self.store.list(Some(&self.prefix));
        if names_credentials(is_set) {
            listed.try_next().await?;
            return Ok(());
        }
        // The client would try the metadata service again for half a minute.
        match tokio::time::timeout(METADATA, listed.try_next()).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(BlobError::NoCredentials {
                profile: is_set("AWS_PROFILE"),
            }),
        }
    }

    /// As [`Self::put`], with a known hash.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn put_as(&self, hash: &str, bytes: Bytes) -> Result<(), BlobError> {
        self.store.put(&self.key(hash), bytes.into()).await?;
        Ok(())
    }

    /// Wraps the store: tests make it slow or let it fail.
    #[cfg(test)]
    pub(crate) fn wrap<S: ObjectStore>(&self, wrap: impl FnOnce(Arc<dyn ObjectStore>) -> S) -> Self {
        Self {
            store: Arc::new(wrap(self.store.clone())),
            prefix: self.prefix.clone(),
        }
    }

    /// The bytes of a hash, verified.
    ///
    /// # Errors
    /// When they are absent or damaged.
    pub async fn get(&self, hash: &str) -> Result<Bytes, BlobError> {
        self.get_within(hash, u64::MAX).await
    }

    /// As [`Self::get`]; of more than `limit` bytes none is read.
    ///
    /// # Errors
    /// `TooLarge`; as [`Self::get`].
    pub async fn get_within(&self, hash: &str, limit: u64) -> Result<Bytes, BlobError> {
        let bytes = match self.store.get(&self.key(hash)).await {
            Ok(found) if found.meta.size > limit => {
                return Err(BlobError::TooLarge(hash.to_owned(), found.meta.size));
            }
            Ok(found) => found.bytes().await?,
            Err(object_store::Error::NotFound { .. }) => return Err(BlobError::Missing(hash.to_owned())),
            Err(error) => return Err(error.into()),
        };
        if content_hash(&bytes) == hash {
            Ok(bytes)
        } else {
            Err(BlobError::Damaged(hash.to_owned()))
        }
    }

    /// The first bytes of a blob, `length` at most, and the size of the whole in bytes. They are not verified.
    ///
    /// # Errors
    /// When it is absent.
    pub async fn first_bytes(&self, hash: &str, length: usize) -> Result<(Bytes, u64), BlobError> {
        // A range would be refused for a blob that was truncated to nothing; a stream that is dropped reads no further.
        let found = match self.store.get(&self.key(hash)).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Err(BlobError::Missing(hash.to_owned())),
            Err(error) => return Err(error.into()),
        };
        let size = found.meta.size;
        let (mut first, mut stream) = (Vec::with_capacity(length), found.into_stream());
        while first.len() < length {
            let Some(chunk) = stream.try_next().await? else { break };
            first.extend(chunk.iter().take(length - first.len()));
        }
        Ok((first.into(), size))
    }

    /// The size of a blob; `None` if it is absent.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn size(&self, hash: &str) -> Result<Option<u64>, BlobError> {
        match self.store.head(&self.key(hash)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Hashes of all stored blobs.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn all(&self) -> Result<Vec<String>, BlobError> {
        let found: Vec<_> = self.store.list(Some(&self.prefix)).try_collect().await?;
        Ok(found
            .iter()
            .filter_map(|object| object.location.filename().map(str::to_owned))
            .collect())
    }

    /// Removes a blob; it is no error if it is absent.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove(&self, hash: &str) -> Result<(), BlobError> {
        match self.store.delete(&self.key(hash)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_credentials_are_named() {
        let set = |given: &'static [&str]| names_credentials(|name| given.contains(&name));
        assert!(set(&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]));
        assert!(set(&["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_PROFILE"]));
        assert!(set(&["AWS_CONTAINER_CREDENTIALS_FULL_URI"]));
        assert!(!set(&["AWS_ACCESS_KEY_ID", "AWS_PROFILE"]));
        assert!(!set(&[]));
        let told = BlobError::NoCredentials { profile: true }.to_string();
        assert!(told.contains("AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY"), "{told}");
        assert!(told.contains("AWS_PROFILE is set, but profiles"), "{told}");
    }

    #[tokio::test]
    async fn blobs_are_addressed_by_hash_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let hash = blobs.put(Bytes::from_static(b"abc")).await.unwrap();
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(blobs.put(Bytes::from_static(b"abc")).await.unwrap(), hash);
        assert_eq!(blobs.get(&hash).await.unwrap(), "abc");
        assert_eq!(blobs.get_within(&hash, 3).await.unwrap(), "abc");
        assert!(matches!(
            blobs.get_within(&hash, 2).await,
            Err(BlobError::TooLarge(_, 3))
        ));
        assert_eq!(blobs.first_bytes(&hash, 2).await.unwrap(), ("ab".into(), 3));
        assert_eq!(blobs.first_bytes(&hash, 64).await.unwrap(), ("abc".into(), 3));
        std::fs::write(dir.path().join("ba").join(&hash), b"abd").unwrap();
        assert!(matches!(blobs.get(&hash).await, Err(BlobError::Damaged(_))));
        blobs.remove(&hash).await.unwrap();
        blobs.remove(&hash).await.unwrap();
        assert!(matches!(blobs.get(&hash).await, Err(BlobError::Missing(_))));
        assert!(matches!(blobs.first_bytes(&hash, 2).await, Err(BlobError::Missing(_))));
    }
}
