//! What callers attach to their objects: description, metadata, webhook address.

use serde_json::Value;

use crate::registry::Metadata;
use coar_core::error::Error;

const DESCRIPTION_LIMIT: usize = 1000;
const PAIRS_LIMIT: usize = 16;
const KEY_LIMIT: usize = 64;
const VALUE_LIMIT: usize = 512;
const URL_LIMIT: usize = 2048;

/// # Errors
/// When it is too long.
pub(super) fn check_description(description: Option<String>) -> Result<Option<String>, Error> {
    let characters = description.as_ref().map_or(0, |text| text.chars().count());
    if characters > DESCRIPTION_LIMIT {
        let problem = format!("has {characters} characters; the limit is {DESCRIPTION_LIMIT}");
        return Err(Error::field("value_too_large", "description", problem).limit(DESCRIPTION_LIMIT as u64));
    }
    Ok(description.filter(|text| !text.is_empty()))
}

/// Reads a JSON object of strings: at most 16 pairs, keys of 1 to 64 characters, values of at most 512.
///
/// # Errors
/// What is wrong with it.
pub fn read_metadata(value: Value) -> Result<Metadata, Error> {
    let invalid = |problem: String| Error::field("invalid_value", "metadata", problem);
    let Value::Object(pairs) = value else {
        return Err(invalid("is no object of strings".to_owned()));
    };
    if pairs.len() > PAIRS_LIMIT {
        let problem = format!("has {} pairs; the limit is {PAIRS_LIMIT}", pairs.len());
        return Err(invalid(problem).limit(PAIRS_LIMIT as u64));
    }
    let mut metadata = Metadata::new();
    for (key, value) in pairs {
        let Value::String(value) = value else {
            return Err(invalid(format!("has a value under `{key}` that is no string")));
        };
        if key.is_empty() || key.chars().count() > KEY_LIMIT {
            return Err(
                invalid(format!("has a key that is not of 1 to {KEY_LIMIT} characters")).limit(KEY_LIMIT as u64)
            );
        }
        if value.chars().count() > VALUE_LIMIT {
            let problem = format!("has more than {VALUE_LIMIT} characters under `{key}`");
            return Err(invalid(problem).limit(VALUE_LIMIT as u64));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Checks the form of a webhook's URL. Whether it may be used is decided when it is connected to.
///
/// # Errors
/// When it is not `http(s)://host…`, or contains a user.
pub(super) fn webhook_form(url: Option<String>) -> Result<Option<String>, Error> {
    let Some(url) = url else { return Ok(None) };
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let host = rest.and_then(|rest| rest.split(['/', '?', '#']).next()).unwrap_or("");
    let plain = url.bytes().all(|b| b.is_ascii_graphic()) && url.len() <= URL_LIMIT;
    if plain && !host.is_empty() && !host.contains('@') {
        return Ok(Some(url));
    }
    let problem =
        format!("is no address of the form https://host/path with at most {URL_LIMIT} characters and no user");
    Err(Error::field("invalid_value", "webhook_url", problem))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_is_a_small_object_of_strings() {
        assert_eq!(read_metadata(json!({"shop": "1"})).unwrap()["shop"], "1");
        assert!(read_metadata(json!({"k".repeat(64): "v".repeat(512)})).is_ok());
        let many: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!(""))).collect();
        for bad in [
            json!("x"),
            json!({"a": 1}),
            json!({"": "x"}),
            json!({"k".repeat(65): ""}),
            json!({"k": "v".repeat(513)}),
            Value::Object(many),
        ] {
            assert_eq!(read_metadata(bad).unwrap_err().field.as_deref(), Some("metadata"));
        }
    }

    #[test]
    fn web_hooks_go_to_plain_addresses() {
        let check = |url: &str| webhook_form(Some(url.to_owned())).is_ok();
        assert!(check("https://example.com") && check("http://example.com:8080/x?y=1"));
        for bad in [
            "",
            "https://",
            "ftp://example.com",
            "https://a@example.com/",
            "https://exa mple.com",
        ] {
            assert!(!check(bad), "{bad}");
        }
    }
}
