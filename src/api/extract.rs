//! A JSON body, field by field: every wrong type names its field, and nothing unknown passes silently.

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value};

use super::{ApiError, AppState};
use crate::registry::blobs::content_hash;
use coar_core::error::{Error, ErrorKind};

/// Up to here a 64-bit float is exact.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A JSON object whose fields are taken one by one.
pub(super) struct Fields(Map<String, Value>);

/// The content type without its parameters.
pub(super) fn media_type(headers: &HeaderMap) -> &str {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    value.split(';').next().unwrap_or("").trim()
}

impl FromRequest<AppState> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        Ok(Self::parse(&Self::bytes(request, state).await?)?)
    }
}

/// As [`Fields`], of a body that may be left out or null.
pub(super) struct MaybeFields(pub Fields);

impl FromRequest<AppState> for MaybeFields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let headers = request.headers();
        let length = headers
            .get(header::CONTENT_LENGTH)
            .map(axum::http::HeaderValue::as_bytes);
        let empty = matches!(length, None | Some(b"0")) && !headers.contains_key(header::TRANSFER_ENCODING);
        match empty {
            true => Ok(Self(Fields(Map::new()))),
            false => {
                let bytes = Fields::bytes(request, state).await?;
                match bytes.trim_ascii() {
                    b"null" => Ok(Self(Fields(Map::new()))),
                    _ => Ok(Self(Fields::parse(&bytes)?)),
                }
            }
        }
    }
}

/// The error of a body that paused for too long, if that was it.
pub(super) fn too_slow(error: &(dyn std::error::Error + 'static)) -> Option<Error> {
    let mut causes = std::iter::successors(Some(error), |cause| cause.source());
    let slow = causes.any(<dyn std::error::Error>::is::<tower_http::timeout::TimeoutError>);
    slow.then(|| Error::new(ErrorKind::Timeout, "body_timeout", "The body did not come in time."))
}

/// Why a body could not be read: too slow, or larger than `limit` bytes.
pub(super) fn unread(error: &(dyn std::error::Error + 'static), limit: usize) -> Error {
    if let Some(slow) = too_slow(error) {
        return slow;
    }
    Error::new(
        ErrorKind::TooLarge,
        "body_too_large",
        format!("The body is larger than {limit} bytes, or broke off."),
    )
    .limit(limit as u64)
}

impl Fields {
    /// The body of a request that says it is JSON.
    async fn bytes(request: Request, state: &AppState) -> Result<axum::body::Bytes, Error> {
        if !media_type(request.headers()).eq_ignore_ascii_case("application/json") {
            let message = "The body must be JSON, sent with `Content-Type: application/json`.";
            return Err(Error::new(
                ErrorKind::UnsupportedMediaType,
                "unsupported_media_type",
                message,
            ));
        }
        let limit = state.config().limits.json_limit << 10;
        let bytes = axum::body::to_bytes(request.into_body(), limit).await;
        bytes.map_err(|error| unread(&error, limit))
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            Error::new(
                ErrorKind::Invalid,
                "invalid_json",
                format!("The body is not JSON: {error}."),
            )
        })?;
        match value {
            Value::Object(fields) => {
                for (name, value) in &fields {
                    no_nul(name, value)?;
                }
                Ok(Self(fields))
            }
            _ => Err(Error::new(
                ErrorKind::Invalid,
                "invalid_json",
                "The body must be a JSON object.",
            )),
        }
    }

    /// Hash of all that was sent, whatever the order and the spaces: what an idempotency key is compared by.
    pub(super) fn content(&self) -> String {
        // A map of serde_json is sorted.
        content_hash(Value::Object(self.0.clone()).to_string().as_bytes())
    }

    /// A field, absent where it is missing or null.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    /// As [`Self::text`], with null distinguished from absence: `Some(None)`.
    pub(super) fn nullable_text(&mut self, name: &'static str) -> Result<Option<Option<String>>, Error> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(None));
        }
        Ok(self.text(name)?.map(Some))
    }

    pub(super) fn integer(&mut self, name: &'static str, high: u64) -> Result<Option<u64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // To JSON 2.0 is as good an integer as 2.
        let integral = |number: &f64| number.fract() == 0.0 && (0.0..=EXACT).contains(number);
        let number = value
            .as_u64()
            .or_else(|| value.as_f64().filter(integral).map(|number| number as u64));
        match number {
            Some(number) if number <= high => Ok(Some(number)),
            _ => Err(wrong_type(name, &format!("an integer from 0 to {high}"), &value)),
        }
    }

    pub(super) fn number(&mut self, name: &'static str) -> Result<Option<f64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| wrong_type(name, "a number", &value))
    }

    pub(super) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| wrong_type(name, "true or false", &value))
    }

    /// Words of a list.
    pub(super) fn texts(&mut self, name: &'static str) -> Result<Option<Vec<String>>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let words = value
            .as_array()
            .map(|words| words.iter().map(|word| word.as_str().map(str::to_owned)).collect());
        match words.flatten() {
            Some(words) => Ok(Some(words)),
            None => Err(wrong_type(name, "a list of strings", &value)),
        }
    }

    /// Fields of an object within.
    pub(super) fn object(&mut self, name: &'static str) -> Result<Option<Self>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self(fields))),
            Some(other) => Err(wrong_type(name, "an object", &other)),
        }
    }

    /// As [`Self::integer`], with null distinguished from absence: `Some(None)`.
    pub(super) fn nullable_integer<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        high: u64,
    ) -> Result<Option<Option<T>>, Error> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(None));
        }
        let number = self.integer(name, high)?;
        Ok(number.map(|number| T::try_from(number).ok()))
    }

    /// Accepts a field of another API only where it asks for what happens anyway.
    pub(super) fn no_op(&mut self, name: &'static str, accepted: &[&str]) -> Result<(), Error> {
        match self.text(name)? {
            Some(value) if !accepted.contains(&value.as_str()) => Err(Error::field(
                "unsupported_value",
                name,
                format!(
                    "is `{value}`, which is not supported; leave it out or send {}",
                    accepted.join(" or ")
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Refuses what is left.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(Error::field(
                "unknown_parameter",
                name,
                "is not a parameter of this route",
            )),
        }
    }
}

/// Refuses the character U+0000 anywhere in a field: PostgreSQL cannot store it, and no text needs it.
///
/// # Errors
/// Naming the field.
pub(super) fn no_nul(field: &str, value: &Value) -> Result<(), Error> {
    fn has_nul(value: &Value) -> bool {
        match value {
            Value::String(text) => text.contains('\0'),
            Value::Array(values) => values.iter().any(has_nul),
            Value::Object(fields) => fields.iter().any(|(key, value)| key.contains('\0') || has_nul(value)),
            _ => false,
        }
    }
    match has_nul(value) {
        true => Err(Error::field(
            "invalid_value",
            field.to_owned(),
            "has the character U+0000, which no text may have",
        )),
        false => Ok(()),
    }
}

fn wrong_type(name: &'static str, expected: &str, value: &Value) -> Error {
    let mut shown = value.to_string();
    if shown.len() > 60 {
        shown = format!("{}…", shown.chars().take(60).collect::<String>());
    }
    Error::field("invalid_value", name, format!("is {shown}; expected {expected}"))
}
