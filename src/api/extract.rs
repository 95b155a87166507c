//! A JSON body, read field by field: a wrong type is reported with its field's name, and unknown fields are refused.

use std::ops::RangeInclusive;

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value};

use super::{ApiError, AppState};
use crate::registry::blobs::content_hash;
use coar_core::error::{Error, ErrorKind};

/// Integers up to this limit are exact as 64-bit floats.
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

/// Like [`Fields`], for a body that may be missing or null.
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

/// `request_timeout` if reading the body failed because it paused for too long.
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

/// A body as text, without the byte order mark that PowerShell and .NET write before UTF-8.
fn utf8(bytes: &[u8]) -> Result<&str, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    // JSON begins with an ASCII character: in UTF-16 one of the first two bytes is 0.
    if let [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, ..] | [_, 0, ..] = bytes {
        return Err("UTF-16; send it as UTF-8".to_owned());
    }
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let byte = bytes.get(at).copied().unwrap_or_default();
        format!("not UTF-8: byte {at} is 0x{byte:02x}, perhaps Latin-1 or Windows-1252; send it as UTF-8")
    })
}

impl Fields {
    /// The body of a request with a JSON content type.
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
        let invalid = |message: String| Error::new(ErrorKind::Invalid, "invalid_json", message);
        let text = utf8(bytes).map_err(|problem| invalid(format!("The body is {problem}.")))?;
        let value: Value =
            serde_json::from_str(text).map_err(|error| invalid(format!("The body is not JSON: {error}.")))?;
        match value {
            Value::Object(fields) => {
                for (name, value) in &fields {
                    no_nul(name, value)?;
                }
                Ok(Self(fields))
            }
            _ => Err(invalid("The body must be a JSON object.".to_owned())),
        }
    }

    /// A body of one field.
    pub(super) fn of(name: &str, value: Value) -> Self {
        Self(Map::from_iter([(name.to_owned(), value)]))
    }

    /// Hash of all parameters, independent of their order and of white space, by which idempotency keys are compared.
    pub(super) fn content(&self) -> String {
        // The maps of serde_json are sorted.
        content_hash(Value::Object(self.0.clone()).to_string().as_bytes())
    }

    /// Takes a field; `None` if it is missing or null.
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

    /// Like [`Self::text`], but null is distinguished from absence: `Some(None)`.
    pub(super) fn nullable_text(&mut self, name: &'static str) -> Result<Option<Option<String>>, Error> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(None));
        }
        Ok(self.text(name)?.map(Some))
    }

    /// A text; `None` if it is missing, null or empty: some clients send `""` for a field that is not set.
    pub(super) fn filled_text(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        Ok(self.text(name)?.filter(|text| !text.is_empty()))
    }

    /// An integer within bounds.
    pub(super) fn integer(&mut self, name: &'static str, bounds: RangeInclusive<u64>) -> Result<Option<u64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let (low, high) = (bounds.start(), bounds.end());
        match integral(&value) {
            Some(number) if bounds.contains(&number) => Ok(Some(number)),
            Some(number) => {
                let error = Error::field("invalid_value", name, format!("is {number}; expected {low} to {high}"));
                Err(if number > *high { error.limit(*high) } else { error })
            }
            None => Err(wrong_type(name, &format!("an integer from {low} to {high}"), &value)),
        }
    }

    /// An integer whose bounds are checked later.
    pub(super) fn whole(&mut self, name: &'static str) -> Result<Option<u32>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match integral(&value).map(u32::try_from) {
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(_)) => Err(Error::field(
                "invalid_value",
                name,
                format!("is {value}, which is too large"),
            )),
            None => Err(wrong_type(name, "an integer of 0 or more", &value)),
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

    /// A list of texts.
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

    /// The fields of a nested object.
    pub(super) fn object(&mut self, name: &'static str) -> Result<Option<Self>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self(fields))),
            Some(other) => Err(wrong_type(name, "an object", &other)),
        }
    }

    /// Like [`Self::integer`], but null is distinguished from absence: `Some(None)`.
    pub(super) fn nullable_integer<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        high: u64,
    ) -> Result<Option<Option<T>>, Error> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(None));
        }
        let number = self.integer(name, 0..=high)?;
        Ok(number.map(|number| T::try_from(number).ok()))
    }

    /// Accepts a field of another API only with the value that describes what coar does anyway.
    pub(super) fn no_op(&mut self, name: &'static str, accepted: &[&str]) -> Result<Option<String>, Error> {
        match self.filled_text(name)? {
            Some(value) if !accepted.contains(&value.as_str()) => Err(Error::field(
                "unsupported_value",
                name,
                format!(
                    "is `{value}`, which is not supported; leave it out or send {}",
                    choices(accepted)
                ),
            )),
            value => Ok(value),
        }
    }

    /// Refuses unknown fields. Nulls are ignored: typed clients send one for every field that is not set.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.0.into_iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => Err(Error::field(
                "unknown_parameter",
                name,
                "is not a parameter of this route",
            )),
        }
    }
}

/// An integer, also when it is written as 2.0.
fn integral(value: &Value) -> Option<u64> {
    let exact = |number: &f64| number.fract() == 0.0 && (0.0..=EXACT).contains(number);
    value
        .as_u64()
        .or_else(|| value.as_f64().filter(exact).map(|number| number as u64))
}

/// `` `a`, `b` or `c` ``
pub(super) fn choices(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} or {last}", before.join(", ")),
        _ => quoted.concat(),
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
    let quoted = value.as_str().is_some_and(|text| text.trim().parse::<f64>().is_ok());
    let hint = if quoted { ", without quotes" } else { "" };
    Error::field("invalid_value", name, format!("is {shown}; expected {expected}{hint}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn encodings_are_named() {
        let message = |bytes: &[u8]| Fields::parse(bytes).map(|_| ()).map_err(|error| error.message);
        assert_eq!(message(b"\xef\xbb\xbf{\"prompt\": \"a\"}"), Ok(()));
        let utf16 = |bytes: fn(u16) -> [u8; 2], mark: bool| -> Vec<u8> {
            let text = if mark { "\u{feff}{}" } else { "{}" };
            text.encode_utf16().flat_map(bytes).collect()
        };
        for body in [
            utf16(u16::to_le_bytes, true),
            utf16(u16::to_be_bytes, true),
            utf16(u16::to_le_bytes, false),
            utf16(u16::to_be_bytes, false),
        ] {
            assert_eq!(
                message(&body),
                Err("The body is UTF-16; send it as UTF-8.".to_owned()),
                "{body:?}"
            );
        }
        let latin = message(b"{\"prompt\": \"caf\xe9\"}").unwrap_err();
        assert!(latin.contains("byte 15 is 0xe9, perhaps Latin-1"), "{latin}");
    }

    #[test]
    fn integers_have_one_bound() {
        let told = |value: Value| {
            let error = fields(&json!({"n": value})).integer("n", 1..=10).unwrap_err();
            (error.message, error.limit)
        };
        assert_eq!(told(json!(11)), ("`n` is 11; expected 1 to 10".to_owned(), Some(10)));
        assert_eq!(told(json!(0)), ("`n` is 0; expected 1 to 10".to_owned(), None));
        assert_eq!(told(json!(-1)).0, "`n` is -1; expected an integer from 1 to 10");
        assert_eq!(
            told(json!("1")).0,
            "`n` is \"1\"; expected an integer from 1 to 10, without quotes"
        );
        assert_eq!(fields(&json!({"n": 2.0})).integer("n", 1..=10).unwrap(), Some(2));
        let steps = |value: Value| fields(&json!({"steps": value})).whole("steps").map_err(|e| e.message);
        assert_eq!(steps(json!(7)), Ok(Some(7)));
        assert_eq!(
            steps(json!(-7)),
            Err("`steps` is -7; expected an integer of 0 or more".to_owned())
        );
        assert_eq!(
            steps(json!(5_000_000_000_u64)),
            Err("`steps` is 5000000000, which is too large".to_owned())
        );
    }

    #[test]
    fn nulls_and_empty_words_are_absent() {
        let mut body = fields(&json!({"style": "", "image": null, "size": "", "user": null}));
        assert!(body.no_op("style", &["vivid"]).is_ok());
        assert_eq!(body.filled_text("size").unwrap(), None);
        assert!(body.finish().is_ok());
        let left = fields(&json!({"image": null, "wings": 2})).finish().unwrap_err();
        assert_eq!(left.field.as_deref(), Some("wings"));
    }
}
