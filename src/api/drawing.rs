//! What `/v1/images` and `/v1/generations` have in common: parameters, objects, and refusals.

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

use super::AppState;
use super::extract::{Fields, choices};
use super::openapi::ErrorBody;
use crate::registry::{GenerationConcept, TokenUsage};
use crate::service::{COUNT_LIMIT, GenerateInput, INDEX_LIMIT, NamedConcept, PRIORITY_LIMIT, SEED_LIMIT};
use coar_core::error::Error;
use coar_core::image::{ImageFormat, OutputFormat, RgbImage, encode};

/// A concept that was used.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UsedConcept)]
pub(super) struct UsedConceptObject {
    #[schema(example = "rex")]
    pub name: String,
    /// The version's number.
    #[schema(example = 1)]
    pub version: u32,
    /// SHA-256 of the concept file.
    #[schema(example = "2f7c1b1f0d6a4c0a9e9e6d5c4b3a291817161514131211100f0e0d0c0b0a0908")]
    pub hash: String,
}

impl From<&GenerationConcept> for UsedConceptObject {
    fn from(concept: &GenerationConcept) -> Self {
        Self {
            name: concept.name.clone(),
            version: concept.version,
            hash: concept.hash.clone(),
        }
    }
}

/// Tokens that a request took.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Usage)]
pub(super) struct UsageObject {
    #[schema(example = 168)]
    pub total_tokens: u64,
    /// Tokens of the prompt.
    #[schema(example = 24)]
    pub input_tokens: u64,
    /// Tokens of the images.
    #[schema(example = 144)]
    pub output_tokens: u64,
    pub input_tokens_details: InputTokens,
    pub output_tokens_details: OutputTokens,
}

/// Input tokens by kind.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct InputTokens {
    #[schema(example = 24)]
    pub text_tokens: u64,
    /// Always 0: the model takes no images as input.
    #[schema(example = 0)]
    pub image_tokens: u64,
}

/// Output tokens by kind.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OutputTokens {
    /// Always 0: the model outputs no text.
    #[schema(example = 0)]
    pub text_tokens: u64,
    #[schema(example = 144)]
    pub image_tokens: u64,
}

impl From<TokenUsage> for UsageObject {
    fn from(usage: TokenUsage) -> Self {
        Self {
            total_tokens: usage.text_tokens + usage.image_tokens,
            input_tokens: usage.text_tokens,
            output_tokens: usage.image_tokens,
            input_tokens_details: InputTokens {
                text_tokens: usage.text_tokens,
                image_tokens: 0,
            },
            output_tokens_details: OutputTokens {
                text_tokens: 0,
                image_tokens: usage.image_tokens,
            },
        }
    }
}

/// Errors of both routes.
#[derive(IntoResponses)]
#[allow(dead_code)]
pub(super) enum DrawRefusals {
    /// An invalid parameter, which `param` names
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// `concept_not_found`; in OpenAI's format also `model_not_found`
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// `concept_not_ready`
    #[response(status = 409)]
    NotReady(ErrorBody),
    /// `overloaded`, `quota_exceeded`
    #[response(status = 429)]
    TooMany(ErrorBody),
}

fn size(text: &str) -> Result<Option<(u32, u32)>, Error> {
    if text == "auto" {
        return Ok(None);
    }
    let sides = text
        .split_once(['x', 'X'])
        .and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides.map(Some).ok_or_else(|| {
        Error::field(
            "invalid_size",
            "size",
            format!("is `{text}`; expected `auto` or WIDTHxHEIGHT in pixels"),
        )
    })
}

/// The seed; -1 or no value means a random one.
fn seed(fields: &mut Fields) -> Result<Option<u64>, Error> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    if value.as_f64() == Some(-1.0) {
        return Ok(None);
    }
    let mut alone = Fields::of("seed", value);
    alone.integer("seed", 0..=SEED_LIMIT).map_err(|error| Error {
        message: format!("{}, or -1 for a random seed", error.message),
        ..error
    })
}

/// The priority among the tenant's own requests.
pub(super) fn priority(fields: &mut Fields) -> Result<i32, Error> {
    let most = PRIORITY_LIMIT.unsigned_abs().into();
    Ok(fields.integer("priority", 0..=most)?.unwrap_or(0) as i32)
}

/// One of the words in `known`.
pub(super) fn word<T: Copy>(
    fields: &mut Fields,
    name: &'static str,
    known: &[(&'static str, T)],
) -> Result<Option<T>, Error> {
    let Some(text) = fields.filled_text(name)? else {
        return Ok(None);
    };
    let found = known.iter().find(|(word, _)| *word == text);
    found.map(|(_, value)| Some(*value)).ok_or_else(|| {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        Error::field(
            "invalid_value",
            name,
            format!("is `{text}`; expected {}", choices(&words)),
        )
    })
}

/// Reads the parameters that both routes have.
pub(super) fn input(fields: &mut Fields) -> Result<GenerateInput, Error> {
    let formats = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP].map(|format| (format.as_str(), format));
    let named = |name| NamedConcept {
        name,
        field: "concepts",
    };
    Ok(GenerateInput {
        prompt: fields
            .text("prompt")?
            .ok_or_else(|| Error::field("missing_parameter", "prompt", "is missing"))?,
        concepts: fields
            .texts("concepts")?
            .unwrap_or_default()
            .into_iter()
            .map(named)
            .collect(),
        count: fields.integer("n", 1..=COUNT_LIMIT.into())?.map(|n| n as u32),
        size: fields
            .filled_text("size")?
            .map(|text| size(&text))
            .transpose()?
            .flatten(),
        seed: seed(fields)?,
        first_index: fields
            .integer("first_index", 0..=INDEX_LIMIT.into())?
            .map(|index| index as u32),
        guidance_scale: fields.number("guidance_scale")?,
        temperature: fields.number("temperature")?,
        top_k: fields.whole("top_k")?,
        identity_mask: fields.boolean("identity_mask")?,
        output_format: word(fields, "output_format", &formats)?,
        output_compression: fields.integer("output_compression", 0..=100)?.map(|value| value as u8),
        partial_images: fields.integer("partial_images", 0..=3)?.map(|count| count as u32),
    })
}

/// The base of image URLs: the configured public URL, otherwise the one by which this caller reached the server.
pub(super) fn base(state: &AppState, headers: &HeaderMap) -> String {
    let host = || headers.get(header::HOST).and_then(|host| host.to_str().ok());
    match (&state.config().public_url, host()) {
        (Some(url), _) => url.trim_end_matches('/').to_owned(),
        (None, Some(host)) => format!("http://{host}"),
        (None, None) => String::new(),
    }
}

/// An unfinished image in base64, without metadata.
pub(super) async fn partial(image: RgbImage, format: OutputFormat) -> Result<String, Error> {
    let encoded = tokio::task::spawn_blocking(move || encode(&image, format, &[])).await;
    Ok(STANDARD.encode(encoded.map_err(Error::internal)?.map_err(Error::internal)?))
}
