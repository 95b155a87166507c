//! Reads third-party JSON files field by field, so errors name file, field and limit.

use std::fs::File;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use coar_engine::model::ModelError;

/// Maximum size of a configuration; the published ones have 4 KB.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a file of at most `limit` bytes.
///
/// # Errors
/// When it is missing, larger, or not UTF-8.
pub(super) fn read_text(file: &Path, limit: u64) -> Result<String, ModelError> {
    let fault = |problem: String| ModelError::file(file, problem);
    let opened = File::open(file).map_err(|error| fault(error.to_string()))?;
    let mut text = String::new();
    opened
        .take(limit + 1)
        .read_to_string(&mut text)
        .map_err(|error| fault(error.to_string()))?;
    match text.len() as u64 > limit {
        true => Err(fault(format!("is larger than {limit} bytes"))),
        false => Ok(text),
    }
}

/// Reads the object in a JSON file.
///
/// # Errors
/// As [`read_text`], or when it is not a JSON object.
pub(super) fn read_object(file: &Path) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(&read_text(file, MAX_BYTES)?)
        .map_err(|error| ModelError::file(file, format!("is not a JSON object: {error}")))
}

/// The fields of one object of a file. `null` is the same as a missing field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a> {
    pub file: &'a Path,
    /// Prefix of field names in errors, such as `text_config.`.
    pub within: &'a str,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn fault(&self, field: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Config {
            file: self.file.to_owned(),
            field: format!("{}{field}", self.within),
            problem: problem.into(),
        }
    }

    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A missing field takes its default; without one it is an error.
    fn or<T>(&self, field: &str, default: Option<T>) -> Result<T, ModelError> {
        default.ok_or_else(|| self.fault(field, "is missing"))
    }

    /// A whole number within limits.
    pub fn whole(&self, field: &str, default: Option<i64>, limits: RangeInclusive<i64>) -> Result<i64, ModelError> {
        let Some(value) = self.get(field) else {
            return self.or(field, default);
        };
        let whole = value.as_i64().filter(|whole| limits.contains(whole));
        whole.ok_or_else(|| {
            let (least, most) = (limits.start(), limits.end());
            self.fault(field, format!("is {}; expected {least} to {most}", shown(value)))
        })
    }

    /// A number above 0 and at most `most`.
    pub fn positive(&self, field: &str, default: f64, most: f64) -> Result<f64, ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        let number = value.as_f64().filter(|&number| number > 0.0 && number <= most);
        number.ok_or_else(|| {
            self.fault(
                field,
                format!("is {}; expected a number above 0, at most {most}", shown(value)),
            )
        })
    }

    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| self.fault(field, format!("is {}; expected true or false", shown(value))))
    }

    pub fn text(&self, field: &str, default: Option<&'a str>) -> Result<&'a str, ModelError> {
        let Some(value) = self.get(field) else {
            return self.or(field, default);
        };
        value
            .as_str()
            .ok_or_else(|| self.fault(field, format!("is {}; expected a text", shown(value))))
    }

    /// Three finite numbers, one per colour, each at most 1000 and at least `least`.
    pub fn colours(&self, field: &str, default: [f64; 3], least: f64) -> Result<[f64; 3], ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        let numbers: Option<Vec<f64>> = value
            .as_array()
            .filter(|list| list.len() == 3)
            .and_then(|list| list.iter().map(Value::as_f64).collect());
        let numbers = numbers.filter(|numbers| numbers.iter().all(|number| (least..=1000.0).contains(number)));
        numbers
            .and_then(|numbers| <[f64; 3]>::try_from(numbers).ok())
            .ok_or_else(|| {
                self.fault(
                    field,
                    format!("is {}; expected three numbers from {least} to 1000", shown(value)),
                )
            })
    }

    /// A nested object; `name` with its dot is the prefix in errors.
    pub fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let object = value.as_object();
        object
            .map(Some)
            .ok_or_else(|| self.fault(field, format!("is {}; expected an object", shown(value))))
    }
}

/// Formats a value for an error, on one line.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(list) if list.len() > 4 => format!("a list of {}", list.len()),
        other => {
            let text = other.to_string();
            match text.chars().count() > 60 {
                true => format!("{}...", text.chars().take(60).collect::<String>()),
                false => text,
            }
        }
    }
}
