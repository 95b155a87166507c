//! A registration as a multipart form, read under limits while it streams in.

use axum::extract::Multipart;
use axum::extract::multipart::{Field, MultipartError};
use bytes::{Bytes, BytesMut};

use super::extract::{no_nul, too_slow};
use crate::service::{Limits, Receiving, Registration, Room, Unpacked, Upload, image_fault, too_many_images};
use coar_core::error::{Error, ErrorKind};

/// The largest text field, in bytes.
const TEXT_LIMIT: usize = 4096;
/// The largest metadata, in bytes of JSON: enough for everything within its own limits.
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

/// The part's bytes, as a file: the image at `index`, or an archive of images.
async fn file(mut part: Field<'_>, limits: &Limits, mut receiving: Receiving, index: usize) -> Result<Upload, Error> {
    let limit = limits.image.bytes;
    let archive_limit = limits.images * limit;
    while let Some(chunk) = part.chunk().await.map_err(|error| broken(&error))? {
        receiving.write(&chunk).await?;
        let limit = if receiving.is_archive() { archive_limit } else { limit };
        if receiving.length() > limit {
            let problem = format!("has more than {limit} bytes, the limit");
            let fault = image_fault("image_too_large", index, receiving.file_name(), problem);
            return Err(fault.of_kind(ErrorKind::TooLarge).limit(limit as u64));
        }
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
    let (mut images, mut captions) = (Numbered::default(), Numbered::default());
    while let Some(part) = form.next_field().await.map_err(|error| broken(&error))? {
        let Some(name) = part.name().map(str::to_owned) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                "invalid_multipart",
                "A part of the form has no name.",
            ));
        };
        match list_of(&name) {
            Some((List::Images, number)) => {
                if images.parts.len() == limits.images {
                    return Err(too_many_images(limits));
                }
                let file_name = part.file_name().unwrap_or_default().to_owned();
                let receiving = room.receive(file_name).await?;
                let index = number.map_or(images.parts.len(), |number| number as usize);
                let upload = file(part, limits, receiving, index).await?;
                if !upload.is_archive() {
                    images.push(name, number, (upload, None))?;
                    continue;
                }
                for Unpacked { image, caption } in room.unpack(upload, limits).await? {
                    if images.parts.len() == limits.images {
                        return Err(too_many_images(limits));
                    }
                    images.push("images".to_owned(), None, (image, caption))?;
                }
            }
            Some((List::Captions, number)) => {
                let caption = text(part, &name, TEXT_LIMIT).await?;
                if captions.parts.len() == limits.images {
                    return Err(repeated(name));
                }
                captions.push(name, number, caption)?;
            }
            None => setting(&mut registration, part, name).await?,
        }
    }
    let given = !captions.parts.is_empty();
    let captions = captions_of(captions, &images)?;
    let (uploads, packed): (Vec<Upload>, Vec<Option<String>>) = images.in_order().into_iter().unzip();
    registration.images = uploads;
    registration.captions = match packed.iter().any(Option::is_some) {
        true if given => {
            let problem = "is given, and the archive has captions of its own; leave out one of them";
            return Err(Error::field("invalid_value", "captions", problem));
        }
        true => packed.into_iter().map(Option::unwrap_or_default).collect(),
        false => captions,
    };
    Ok(registration)
}

fn repeated(name: String) -> Error {
    Error::field("repeated_parameter", name, "is given more often than it can be")
}

/// A part's text.
async fn text(part: Field<'_>, name: &str, limit: usize) -> Result<String, Error> {
    let raw = bytes(part, limit)
        .await?
        .ok_or_else(|| too_large("value_too_large", name.to_owned(), limit))?;
    let text = String::from_utf8(raw.to_vec())
        .map_err(|_| Error::field("invalid_value", name.to_owned(), "is not UTF-8 text"))?;
    no_nul(name, &text.as_str().into())?;
    Ok(text)
}

/// Stores the text of a part; whether there was one before.
type Store = fn(&mut Registration, String) -> Result<bool, Error>;

/// How a part that is given at most once is stored; `None`: there is no such parameter.
fn store(name: &str) -> Option<Store> {
    let store: Store = match name {
        "name" => |r, text| Ok(r.name.replace(text).is_some()),
        "kind" => |r, text| Ok(r.kind.replace(text).is_some()),
        "class" => |r, text| Ok(r.class.replace(text).is_some()),
        "method" => |r, text| Ok(r.method.replace(text).is_some()),
        "steps" => |r, text| Ok(r.steps.replace(number("steps", &text)?).is_some()),
        "layers" => |r, text| Ok(r.layers.replace(number("layers", &text)?).is_some()),
        "learning_rate" => |r, text| Ok(r.learning_rate.replace(number("learning_rate", &text)?).is_some()),
        "text_tokens" => |r, text| Ok(r.text_tokens.replace(number("text_tokens", &text)?).is_some()),
        "image_tokens" => |r, text| Ok(r.image_tokens.replace(number("image_tokens", &text)?).is_some()),
        "seed" => |r, text| Ok(r.seed.replace(number("seed", &text)?).is_some()),
        "description" => |r, text| Ok(r.description.replace(text).is_some()),
        "metadata" => |r, text| Ok(r.metadata.replace(json("metadata", &text)?).is_some()),
        "webhook_url" => |r, text| Ok(r.webhook_url.replace(text).is_some()),
        "priority" => |r, text| Ok(r.priority.replace(number("priority", &text)?).is_some()),
        _ => return None,
    };
    Some(store)
}

async fn setting(registration: &mut Registration, part: Field<'_>, name: String) -> Result<(), Error> {
    let Some(store) = store(&name) else {
        let problem = match part.file_name() {
            Some(_) => "is not a parameter of this route; files are sent as `images`",
            None => "is not a parameter of this route",
        };
        return Err(Error::field("unknown_parameter", name, problem));
    };
    let limit = if name == "metadata" { METADATA_LIMIT } else { TEXT_LIMIT };
    let text = text(part, &name, limit).await?;
    if store(registration, text)? {
        return Err(repeated(name));
    }
    Ok(())
}

/// Parts that are given several times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum List {
    Images,
    Captions,
}

/// Which list a part belongs to, and its number there: `images`, `images[]`, or as PHP names them `images[0]`.
fn list_of(name: &str) -> Option<(List, Option<u32>)> {
    let (base, number) = match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
        None => (name, None),
        Some((base, "")) => (base, None),
        Some((base, number)) if number.bytes().all(|b| b.is_ascii_digit()) => (base, Some(number.parse().ok()?)),
        Some(_) => return None,
    };
    match base {
        "images" | "image" => Some((List::Images, number)),
        "captions" | "caption" => Some((List::Captions, number)),
        _ => None,
    }
}

/// Parts of a list, with the numbers that their names have.
#[derive(Debug)]
struct Numbered<T> {
    parts: Vec<(Option<u32>, T)>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { parts: Vec::new() }
    }
}

impl<T> Numbered<T> {
    fn push(&mut self, name: String, number: Option<u32>, part: T) -> Result<(), Error> {
        if number.is_some() && self.parts.iter().any(|(known, _)| *known == number) {
            return Err(repeated(name));
        }
        self.parts.push((number, part));
        Ok(())
    }

    /// By their numbers; those without one as they came, after the others.
    fn in_order(mut self) -> Vec<T> {
        self.parts.sort_by_key(|(number, _)| number.unwrap_or(u32::MAX));
        self.parts.into_iter().map(|(_, part)| part).collect()
    }

    /// The numbers, in that order.
    fn numbers(&self) -> Vec<Option<u32>> {
        let mut numbers: Vec<_> = self.parts.iter().map(|(number, _)| *number).collect();
        numbers.sort_by_key(|number| number.unwrap_or(u32::MAX));
        numbers
    }
}

/// Captions in the order of their images: one with a number is that image's, the others follow in order.
fn captions_of<T>(captions: Numbered<String>, images: &Numbered<T>) -> Result<Vec<String>, Error> {
    let numbers = images.numbers();
    // Where images have no numbers, a caption's is a place.
    let place = |number: u32| match numbers.iter().any(Option::is_some) {
        true => numbers.iter().position(|known| *known == Some(number)),
        false => Some(number as usize).filter(|place| *place < numbers.len()),
    };
    let mut placed: Vec<Option<String>> = Vec::new();
    let mut others = Vec::new();
    for (number, caption) in captions.parts {
        let Some(number) = number else {
            others.push(caption);
            continue;
        };
        let Some(place) = place(number) else {
            let problem = format!("belongs to no image: there is no `images[{number}]`");
            return Err(Error::field("invalid_value", format!("captions[{number}]"), problem));
        };
        if placed.len() <= place {
            placed.resize(place + 1, None);
        }
        placed[place] = Some(caption);
    }
    let mut others = others.into_iter();
    for free in placed.iter_mut().filter(|caption| caption.is_none()) {
        *free = others.next();
    }
    placed.extend(others.map(Some));
    Ok(placed.into_iter().map(Option::unwrap_or_default).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(parts: &[(Option<u32>, &str)]) -> Numbered<String> {
        let mut all = Numbered::default();
        for (number, part) in parts {
            all.push(String::new(), *number, (*part).to_owned()).unwrap();
        }
        all
    }

    #[test]
    fn names_of_lists_may_have_numbers() {
        for name in ["images", "image", "images[]", "image[]"] {
            assert_eq!(list_of(name), Some((List::Images, None)), "{name}");
        }
        assert_eq!(list_of("images[10]"), Some((List::Images, Some(10))));
        assert_eq!(list_of("captions[0]"), Some((List::Captions, Some(0))));
        for name in [
            "images[a]",
            "images[+1]",
            "images[99999999999]",
            "images[0",
            "image_2",
            "[0]",
            "",
        ] {
            assert_eq!(list_of(name), None, "{name}");
        }
    }

    #[test]
    fn parts_are_taken_in_the_order_of_their_numbers() {
        let images = numbered(&[(Some(10), "ten"), (None, "none"), (Some(2), "two"), (Some(0), "zero")]);
        assert_eq!(images.numbers(), [Some(0), Some(2), Some(10), None]);
        let captions = |parts: &[(Option<u32>, &str)]| captions_of(numbered(parts), &images);
        let caption = captions(&[(Some(10), "c"), (Some(0), "a")]).unwrap();
        assert_eq!(caption, ["a", "", "c"]);
        let caption = captions(&[(None, "a"), (Some(2), "b"), (None, "c")]).unwrap();
        assert_eq!(caption, ["a", "b", "c"]);
        let missing = captions(&[(Some(1), "x")]).unwrap_err();
        assert_eq!(missing.field.as_deref(), Some("captions[1]"));
        assert_eq!(images.in_order(), ["zero", "two", "ten", "none"]);
        let plain = numbered(&[(None, "x"), (None, "y")]);
        assert_eq!(captions_of(numbered(&[(Some(1), "b")]), &plain).unwrap(), ["", "b"]);
        let mut twice = numbered(&[(Some(1), "x")]);
        assert!(twice.push("images[1]".to_owned(), Some(1), String::new()).is_err());
    }
}
