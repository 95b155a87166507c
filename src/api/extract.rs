//! A JSON body, field by field: every wrong type names its field, and nothing unknown passes silently.

use axum::body::Body;
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind};

/// The largest JSON body.
const JSON_LIMIT: usize = 1 << 20;

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

impl Fields {
    /// Reads a JSON object.
    pub(super) async fn read(headers: &HeaderMap, body: Body) -> Result<Self, Error> {
        if !media_type(headers).eq_ignore_ascii_case("application/json") {
            let message = "The body must be JSON, sent with `Content-Type: application/json`.";
            return Err(Error::new(
                ErrorKind::UnsupportedMediaType,
                "unsupported_media_type",
                message,
            ));
        }
        let bytes = axum::body::to_bytes(body, JSON_LIMIT).await.map_err(|_| {
            Error::new(
                ErrorKind::TooLarge,
                "body_too_large",
                format!("The body is larger than {JSON_LIMIT} bytes, or broke off."),
            )
            .limit(JSON_LIMIT as u64)
        })?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
            Error::new(
                ErrorKind::Invalid,
                "invalid_json",
                format!("The body is not JSON: {error}."),
            )
        })?;
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                "invalid_json",
                "The body must be a JSON object.",
            )),
        }
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

    pub(super) fn integer(&mut self, name: &'static str, high: u64) -> Result<Option<u64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64() {
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

fn wrong_type(name: &'static str, expected: &str, value: &Value) -> Error {
    let mut shown = value.to_string();
    if shown.len() > 60 {
        shown = format!("{}…", shown.chars().take(60).collect::<String>());
    }
    Error::field("invalid_value", name, format!("is {shown}; expected {expected}"))
}
