//! Signed URLs of images: they need no key and are valid until they expire.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::registry::{SharedSecrets, StoredImage, now};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ImageId;

/// Signs and checks URLs.
#[derive(Clone)]
pub struct Links {
    secrets: SharedSecrets,
    /// How long images, and so their URLs, are valid, in milliseconds.
    lifetime: i64,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Links")
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

/// The signed part of an image's URL.
#[derive(Debug, Clone, Copy, Default)]
pub struct Signed<'a> {
    /// Unix seconds, as text.
    pub expires: &'a str,
    pub signature: &'a str,
}

fn absent(image: &str) -> Error {
    let message = format!("There is no image `{image}`, or its address is not complete.");
    Error::new(ErrorKind::NotFound, "image_not_found", message)
}

impl Links {
    /// Signs with the server's secrets; URLs are valid as long as images are kept.
    pub fn new(secrets: SharedSecrets, lifetime: std::time::Duration) -> Self {
        Self {
            secrets,
            lifetime: i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX),
        }
    }

    fn mac(secret: &str, id: ImageId, expires: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
        // No part contains a line feed, so different pairs give different texts.
        mac.update(format!("image\n{id}\n{expires}").as_bytes());
        mac
    }

    /// When an image and its URL expire, in Unix seconds.
    pub fn expires(&self, image: &StoredImage) -> i64 {
        let at = image
            .expires_at
            .unwrap_or_else(|| image.created_at.saturating_add(self.lifetime));
        at / 1000
    }

    /// The URL without the server's base. It stays the same until the secret changes, so it can be cached.
    pub fn path(&self, image: &StoredImage) -> String {
        let expires = self.expires(image).to_string();
        let secrets = self.secrets.get();
        let mac = Self::mac(secrets.signing(now()), image.id, &expires);
        let signature = hex::encode(mac.finalize().into_bytes());
        let extension = image.format.extension();
        format!(
            "/v1/images/{}.{extension}?expires={expires}&signature={signature}",
            image.id
        )
    }

    /// The image that a URL refers to. Compares in constant time.
    ///
    /// # Errors
    /// `image_not_found` for URLs that this server has not signed; `address_expired`.
    pub fn check(&self, file: &str, signed: Signed<'_>) -> Result<ImageId, Error> {
        let id: ImageId = file.split('.').next().unwrap_or("").parse().map_err(|_| absent(file))?;
        let signature = hex::decode(signed.signature).map_err(|_| absent(file))?;
        let secrets = self.secrets.get();
        let is_ours = |secret: &str| Self::mac(secret, id, signed.expires).verify_slice(&signature).is_ok();
        if !secrets.accepted(now()).any(is_ours) {
            return Err(absent(file));
        }
        let expires: i64 = signed.expires.parse().map_err(|_| absent(file))?;
        if expires <= now() / 1000 {
            let message = "The address of this image has expired; ask for its generation again to get a new one.";
            return Err(Error::new(ErrorKind::Forbidden, "address_expired", message));
        }
        Ok(id)
    }
}

impl super::Service {
    /// The image at a signed URL, with its bytes.
    ///
    /// # Errors
    /// As [`Links::check`]; when the image was deleted.
    pub async fn image(&self, file: &str, signed: Signed<'_>) -> Result<(StoredImage, bytes::Bytes), Error> {
        let id = self.links.check(file, signed)?;
        let image = self.registry.signed_image(id).await?.ok_or_else(|| absent(file))?;
        if file != format!("{id}.{}", image.format.extension()) {
            return Err(absent(file));
        }
        let bytes = self.registry.blobs.get(&image.blob).await?;
        Ok((image, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use coar_core::ids::TenantId;
    use coar_core::image::ImageFormat;

    fn image(created_at: i64) -> StoredImage {
        StoredImage {
            id: ImageId::new(),
            tenant: TenantId::DEFAULT,
            generation: None,
            index: 0,
            seed: Some(1),
            size: (1, 1),
            blob: String::new(),
            format: ImageFormat::Jpeg,
            created_at,
            expires_at: None,
        }
    }

    fn check(links: &Links, path: &str) -> Result<ImageId, &'static str> {
        let (file, query) = path.strip_prefix("/v1/images/").unwrap().split_once('?').unwrap();
        let (expires, signature) = query
            .strip_prefix("expires=")
            .unwrap()
            .split_once("&signature=")
            .unwrap();
        links
            .check(file, Signed { expires, signature })
            .map_err(|error| error.code)
    }

    #[test]
    fn an_address_opens_its_own_image_until_it_expires() {
        let links = Links::new(SharedSecrets::of("secret"), Duration::from_secs(60));
        let (one, other) = (image(now()), image(now()));
        let path = links.path(&one);
        assert!(path.contains(".jpg?"));
        assert_eq!(check(&links, &path), Ok(one.id));
        assert_eq!(links.path(&one), path);
        let foreign = path.replace(&one.id.to_string(), &other.id.to_string());
        let longer = path.replace("expires=", "expires=1");
        let forged = format!(
            "{}{}",
            &path[..path.len() - 1],
            if path.ends_with('0') { '1' } else { '0' }
        );
        for bad in [foreign, longer, forged, path[..path.len() - 2].to_owned()] {
            assert_eq!(check(&links, &bad), Err("image_not_found"), "{bad}");
        }
        assert_eq!(
            check(&Links::new(SharedSecrets::of("other"), Duration::from_secs(60)), &path),
            Err("image_not_found")
        );
        // URLs are not signed with the secret that authenticates processes to each other.
        let signature = path.rsplit('=').next().unwrap();
        assert_ne!(signature, crate::cluster::worker_token("secret"));
        let old = image(now() - 61_000);
        assert_eq!(check(&links, &links.path(&old)), Err("address_expired"));
    }
}
