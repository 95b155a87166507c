//! Signed addresses of images: they need no key and work until they expire.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::registry::{SharedSecrets, StoredImage, now};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ImageId;

/// Signs addresses, and checks them.
#[derive(Clone)]
pub struct Links {
    secrets: SharedSecrets,
    /// How long images, and so their addresses, last, in milliseconds.
    lifetime: i64,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Links")
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

/// What a caller sent with an image's address.
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
    /// With the server's secrets; addresses last as long as images are kept.
    pub fn new(secrets: SharedSecrets, lifetime: std::time::Duration) -> Self {
        Self {
            secrets,
            lifetime: i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX),
        }
    }

    fn mac(secret: &str, id: ImageId, expires: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
        // No part holds a line feed, so no two pairs are the same text.
        mac.update(format!("image\n{id}\n{expires}").as_bytes());
        mac
    }

    /// When an image and its address expire, in Unix seconds.
    pub fn expires(&self, image: &StoredImage) -> i64 {
        let at = image
            .expires_at
            .unwrap_or_else(|| image.created_at.saturating_add(self.lifetime));
        at / 1000
    }

    /// The address below the server's own: the same every time while the secret stays, so it can be cached.
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

    /// The image that an address names. Compares in constant time.
    ///
    /// # Errors
    /// `image_not_found` for whatever this server has not signed; `address_expired`.
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
    /// The image at a signed address, with its bytes.
    ///
    /// # Errors
    /// As [`Links::check`]; when the image is gone.
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
        // What callers see signed is another secret than the one between processes.
        let signature = path.rsplit('=').next().unwrap();
        assert_ne!(signature, crate::cluster::worker_token("secret"));
        let old = image(now() - 61_000);
        assert_eq!(check(&links, &links.path(&old)), Err("address_expired"));
    }
}
