//! A registration as a multipart form, read under limits while it streams in.

use axum::extract::Multipart;
use axum::extract::multipart::{Field, MultipartError};
use bytes::{Bytes, BytesMut};

use super::extract::{no_nul, too_slow};
use crate::service::{Limits, Receiving, Registration, Room, Upload, image_fault};
use coar_core::error::{Error, ErrorKind};

/// The largest text field, in bytes.
const TEXT_LIMIT: usize = 4096;
/// The largest metadata, in bytes: whatever is within its limits, as JSON.
const METADATA_LIMIT: usize = 64 << 10;

fn broken(error: &MultipartError) -> Error {
    if let Some(slow) = too_slow(error) {
        return slow;
    }
    match error.status().as_u16() {
        413 => Error::new(
            ErrorKind::TooLarge,
            "body_too_large",
            "The body is larger than this route accepts.",
        ),
        _ => Error::new(
            ErrorKind::Invalid,
            "invalid_multipart",
            format!("The form cannot be read: {}.", error.body_text()),
        ),
    }
}

/// The part's bytes; `None` where they are more than `limit`.
async fn bytes(mut part: Field<'_>, limit: usize) -> Result<Option<Bytes>, Error> {
    let mut all = BytesMut::new();
    while let Some(chunk) = part.chunk().await.map_err(|error| broken(&error))? {
        if all.len() + chunk.len() > limit {
            return Ok(None);
        }
        all.extend_from_slice(&chunk);
    }
    Ok(Some(all.freeze()))
}

/// The part's bytes, as a file: the image at `index`.
async fn file(mut part: Field<'_>, limit: usize, mut receiving: Receiving, index: usize) -> Result<Upload, Error> {
    while let Some(chunk) = part.chunk().await.map_err(|error| broken(&error))? {
        if receiving.length() + chunk.len() > limit {
            let problem = format!("has more than {limit} bytes, the limit");
            let fault = image_fault("image_too_large", index, receiving.file_name(), problem);
            return Err(fault.of_kind(ErrorKind::TooLarge).limit(limit as u64));
        }
        receiving.write(&chunk).await?;
    }
    receiving.finish().await
}

fn too_large(code: &'static str, name: String, limit: usize) -> Error {
    Error::field(code, name, format!("has more than {limit} bytes, the limit")).limit(limit as u64)
}

fn number<T: std::str::FromStr>(name: &'static str, text: &str) -> Result<T, Error> {
    let kind = if std::any::type_name::<T>() == "f64" {
        "a number"
    } else {
        "an integer of 0 or more"
    };
    text.trim()
        .parse()
        .map_err(|_| Error::field("invalid_value", name, format!("is `{text}`; expected {kind}")))
}

fn json(name: &'static str, text: &str) -> Result<serde_json::Value, Error> {
    let value = serde_json::from_str(text)
        .map_err(|error| Error::field("invalid_value", name, format!("is not JSON: {error}")))?;
    no_nul(name, &value)?;
    Ok(value)
}

/// Reads `name`, `kind`, `class`, `images` and the optional settings; every other part is refused by name.
/// Images go to disk, into the room that was taken for them.
pub(super) async fn registration(mut form: Multipart, limits: &Limits, room: Room<'_>) -> Result<Registration, Error> {
    let mut registration = Registration::default();
    while let Some(part) = form.next_field().await.map_err(|error| broken(&error))? {
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                "invalid_multipart",
                "A part of the form has no name.",
            ));
        };
        if matches!(name.as_str(), "images" | "images[]" | "image" | "image[]") {
            if registration.images.len() == limits.images {
                return Err(Error::field(
                    "too_many_images",
                    "images",
                    format!("has more than {} images, the limit", limits.images),
                )
                .limit(limits.images as u64));
            }
            let limit = limits.image.bytes;
            let file_name = part.file_name().unwrap_or_default().to_owned();
            let receiving = room.receive(file_name).await?;
            let image = file(part, limit, receiving, registration.images.len()).await?;
            registration.images.push(image);
            continue;
        }
        let limit = if name == "metadata" { METADATA_LIMIT } else { TEXT_LIMIT };
        let raw = bytes(part, limit)
            .await?
            .ok_or_else(|| too_large("value_too_large", name.clone(), limit))?;
        let text = String::from_utf8(raw.to_vec())
            .map_err(|_| Error::field("invalid_value", name.clone(), "is not UTF-8 text"))?;
        no_nul(&name, &text.as_str().into())?;
        let r = &mut registration;
        let repeated = match name.as_str() {
            "name" => r.name.replace(text).is_some(),
            "kind" => r.kind.replace(text).is_some(),
            "class" => r.class.replace(text).is_some(),
            "captions" | "captions[]" | "caption" => {
                r.captions.push(text);
                r.captions.len() > limits.images
            }
            "method" => r.method.replace(text).is_some(),
            "steps" => r.steps.replace(number("steps", &text)?).is_some(),
            "layers" => r.layers.replace(number("layers", &text)?).is_some(),
            "learning_rate" => r.learning_rate.replace(number("learning_rate", &text)?).is_some(),
            "text_tokens" => r.text_tokens.replace(number("text_tokens", &text)?).is_some(),
            "image_tokens" => r.image_tokens.replace(number("image_tokens", &text)?).is_some(),
            "seed" => r.seed.replace(number("seed", &text)?).is_some(),
            "description" => r.description.replace(text).is_some(),
            "metadata" => r.metadata.replace(json("metadata", &text)?).is_some(),
            "webhook_url" => r.webhook_url.replace(text).is_some(),
            "priority" => r.priority.replace(number("priority", &text)?).is_some(),
            _ => {
                return Err(Error::field(
                    "unknown_parameter",
                    name,
                    "is not a parameter of this route",
                ));
            }
        };
        if repeated {
            return Err(Error::field(
                "repeated_parameter",
                name,
                "is given more often than it can be",
            ));
        }
    }
    Ok(registration)
}
