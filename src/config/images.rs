//! Compatibility of OpenAI's route with clients that were written for other servers.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use coar_core::concept::is_slug;
use serde::{Serialize, Serializer};

/// Defaults of image requests, and how unsupported values are handled.
#[derive(Debug, Clone, Args, Serialize)]
pub struct ImagesArgs {
    /// How `/v1/images/generations` answers a request without `response_format`. `b64_json`, as OpenAI does: the images
    /// are in the response and are not stored. `url`: they are stored, and the response has their addresses.
    #[arg(long, env = "COAR_RESPONSE_FORMAT", default_value = "b64_json")]
    pub response_format: ResponseFormat,
    /// Further names of models, separated by commas, for clients with a fixed list of them: gpt-image-2=coar,
    /// dall-e-3=coar:rex.
    #[arg(long, env = "COAR_MODEL_ALIAS", value_delimiter = ',', value_name = "NAME=MODEL")]
    pub model_alias: Vec<ModelAlias>,
    /// What happens to a size that the model does not support. `exact`: it is refused. `nearest`: the size with the
    /// nearest aspect ratio is used, and the response says which.
    #[arg(long, env = "COAR_SIZE_POLICY", default_value = "exact")]
    pub size_policy: SizePolicy,
}

/// How images are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
pub enum ResponseFormat {
    #[value(name = "b64_json")]
    #[serde(rename = "b64_json")]
    Base64,
    #[value(name = "url")]
    #[serde(rename = "url")]
    Url,
}

/// What happens to a size that the model does not support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SizePolicy {
    #[default]
    Exact,
    Nearest,
}

/// Another name of the base model or of concepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelAlias {
    pub name: String,
    /// `coar` or `coar:<concept>`, with `+` between several.
    pub model: String,
}

/// Maximum length of a name.
const NAME_LIMIT: usize = 100;

impl FromStr for ModelAlias {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, model) = text.split_once('=').ok_or("expected NAME=MODEL")?;
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:@".contains(&b));
        if name.is_empty() || name.len() > NAME_LIMIT || !plain {
            return Err(format!("a name has 1 to {NAME_LIMIT} letters, digits and -_.:@"));
        }
        if name == "coar" || name.starts_with("coar:") {
            return Err(format!("`{name}` is the server's own name of a model"));
        }
        let concepts = model.strip_prefix("coar:").map(|names| names.split('+').all(is_slug));
        match model == "coar" || concepts == Some(true) {
            true => Ok(Self {
                name: name.to_owned(),
                model: model.to_owned(),
            }),
            false => Err(format!(
                "`{model}` is no model; expected `coar`, `coar:<concept>` or `coar:<subject>+<style>`"
            )),
        }
    }
}

impl std::fmt::Display for ModelAlias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.name, self.model)
    }
}

impl Serialize for ModelAlias {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_name_models_of_this_server() {
        for good in ["gpt-image-2=coar", "dall-e-3=coar:rex", "a:b@1=coar:rex+ink"] {
            assert_eq!(good.parse::<ModelAlias>().unwrap().to_string(), good);
        }
        for bad in [
            "gpt-image-2",
            "=coar",
            "a/b=coar",
            "a b=coar",
            "coar=coar:rex",
            "coar:rex=coar",
            "x=dall-e-3",
            "x=coar:",
            "x=coar:Rex",
            "x=coar:a=b",
        ] {
            assert!(bad.parse::<ModelAlias>().is_err(), "{bad}");
        }
    }
}
