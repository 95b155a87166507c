//! The parameters of OpenAI's route: those with effect, those without, and those of other servers.

use serde::Deserialize;
use utoipa::ToSchema;

use super::super::drawing::{self, word};
use super::super::extract::Fields;
use crate::config::{ImagesArgs, ModelAlias, ResponseFormat};
use crate::service::{GenerateInput, NamedConcept, Service};
use coar_core::concept::is_slug;
use coar_core::error::{Error, ErrorKind};

/// A request for images in OpenAI's format.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
#[schema(example = json!({"model": "coar", "prompt": "a photo of <rex> cat on the beach", "n": 2, "seed": 7}))]
pub(super) struct CreateImages {
    /// At most 4000 characters. `<name>` uses a concept.
    #[schema(example = "a photo of <rex> cat on the beach", max_length = 4000)]
    prompt: String,
    /// `coar`, the base model's own id, `coar:<concept>`, `coar:<subject>+<style>`, or an alias that the operator has
    /// configured (`GET /v1/models`). Concepts that the prompt does not name are placed in it: a subject before the
    /// first occurrence of its class noun, or else as "a photo of <name> class, " at the beginning; a style as " in
    /// <name> style" at the end.
    #[schema(example = "coar:rex+ink")]
    model: Option<String>,
    /// Names of concepts, which are placed in the prompt as with `model`.
    concepts: Option<Vec<String>>,
    #[schema(minimum = 1, maximum = 10, default = 1)]
    n: Option<u32>,
    /// `auto` or WIDTHxHEIGHT, one of the model's sizes (`GET /v1/models`). If the server is configured with
    /// `size_policy` `nearest`, any size is accepted and the one with the nearest aspect ratio is used.
    #[schema(example = "auto")]
    size: Option<String>,
    /// `b64_json` (default, unless the operator has configured another): not stored. `url`: stored as a generation.
    #[schema(example = "b64_json")]
    response_format: Option<String>,
    /// `png` (default), `jpeg` or `webp`.
    #[schema(example = "png")]
    output_format: Option<String>,
    /// Quality of JPEG (default 90) and of WebP (default 100, which is lossless). With PNG only 100.
    #[schema(minimum = 0, maximum = 100)]
    output_compression: Option<u32>,
    /// Respond with server-sent events: `image_generation.partial_image`, `image_generation.completed`, `error`. Images
    /// are not stored; disconnecting cancels the request.
    stream: Option<bool>,
    /// Number of partial versions of each image in a stream.
    #[schema(minimum = 0, maximum = 3)]
    partial_images: Option<u32>,
    /// Image i uses the random stream (seed, first_index + i). Default, and with -1: a random seed, which the response
    /// contains.
    #[schema(minimum = -1, maximum = 9007199254740991_i64)]
    seed: Option<i64>,
    /// Index of the first image. With `n` 1, it generates one image of a larger request alone.
    #[schema(minimum = 0, maximum = 1000000, default = 0)]
    first_index: Option<u32>,
    /// How strongly the prompt counts; 1: off.
    #[schema(minimum = 1, maximum = 20)]
    guidance_scale: Option<f64>,
    /// 0: always the most likely code.
    #[schema(minimum = 0, maximum = 5)]
    temperature: Option<f64>,
    /// Codes to choose from at each step; 0: all.
    top_k: Option<u32>,
    /// Prevents concepts of one prompt from attending to each other.
    #[schema(default = true)]
    identity_mask: Option<bool>,
    /// `auto`, `low`, `medium`, `high`, `xhigh`, `max`, `standard` or `hd`. No effect.
    quality: Option<String>,
    /// `auto` or `opaque`. No effect.
    background: Option<String>,
    /// `auto` or `low`. No effect.
    moderation: Option<String>,
    /// `vivid` or `natural`. No effect.
    style: Option<String>,
    /// `low`, `medium` or `high`. No effect.
    complexity: Option<String>,
    /// Repeated in the response. No other effect.
    safety_identifier: Option<String>,
    /// As `safety_identifier`, which takes precedence if both are given.
    user: Option<String>,
}

/// The form in which images are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Url,
    Base64,
    Stream,
}

impl From<ResponseFormat> for Answer {
    fn from(format: ResponseFormat) -> Self {
        match format {
            ResponseFormat::Base64 => Self::Base64,
            ResponseFormat::Url => Self::Url,
        }
    }
}

/// Request fields that the response repeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Echo {
    pub quality: &'static str,
    pub safety_identifier: Option<String>,
}

/// A parsed request.
#[derive(Debug)]
pub(super) struct Asked {
    pub input: GenerateInput,
    pub answer: Answer,
    pub echo: Echo,
}

/// Values of `quality` and the value in the response. There is only one quality; OpenAI's schema of responses allows
/// five values.
const QUALITIES: [(&str, &str); 8] = [
    ("auto", "high"),
    ("low", "low"),
    ("medium", "medium"),
    ("high", "high"),
    ("xhigh", "xhigh"),
    ("max", "max"),
    ("standard", "medium"),
    ("hd", "high"),
];

const NO_GIF: &str =
    "is for GIF files, which this server does not write; ask for `output_format` `png`, `jpeg` or `webp`";
const NO_SVG: &str =
    "is for SVG files, which this server does not write; ask for `output_format` `png`, `jpeg` or `webp`";
const NO_INPUT: &str = "is not supported: the model draws from text and concepts. Register what an image shows with \
                        `POST /v1/concepts`, and name the concept in the prompt";
const GUIDANCE: &str = "is not a parameter of this route; it is called `guidance_scale` here";

/// Parameters of other servers, and what to do instead.
const FOREIGN: [(&str, &str); 11] = [
    ("frame_count", NO_GIF),
    ("frame_duration_ms", NO_GIF),
    ("svg", NO_SVG),
    ("markup", NO_SVG),
    ("image", NO_INPUT),
    ("images", NO_INPUT),
    ("mask", NO_INPUT),
    ("input_fidelity", NO_INPUT),
    ("cfg_scale", GUIDANCE),
    ("guidance", GUIDANCE),
    (
        "negative_prompt",
        "is not supported; say in `prompt` what the image shows, and raise `guidance_scale` if that counts too little",
    ),
];

/// The concepts that a model name refers to.
fn model_concepts(service: &Service, aliases: &[ModelAlias], asked: &str) -> Result<Vec<NamedConcept>, Error> {
    let id = &service.executor.info().id;
    let alias = aliases.iter().find(|alias| alias.name == asked);
    let model = alias.map_or(asked, |alias| alias.model.as_str());
    if model == id || model == "coar" {
        return Ok(vec![]);
    }
    let names = model.strip_prefix("coar:").map(|names| names.split('+'));
    match names {
        Some(names) if names.clone().all(is_slug) => Ok(names
            .map(|name| NamedConcept {
                name: name.to_owned(),
                field: "model",
            })
            .collect()),
        _ => {
            let more: String = aliases.iter().map(|alias| format!(", `{}`", alias.name)).collect();
            let problem = format!(
                "is `{asked}`; this server has `coar`, which is `{id}`, `coar:<concept>`{more}. Its operator can add names \
                 with `--model-alias`"
            );
            Err(Error::field("model_not_found", "model", problem).of_kind(ErrorKind::NotFound))
        }
    }
}

/// Reads the fields that have no effect, and those that the response repeats.
fn echo(fields: &mut Fields) -> Result<Echo, Error> {
    let asked = fields.no_op("quality", &QUALITIES.map(|(word, _)| word))?;
    let quality = QUALITIES.into_iter().find(|(word, _)| asked.as_deref() == Some(*word));
    fields.no_op("background", &["auto", "opaque"])?;
    fields.no_op("moderation", &["auto", "low"])?;
    fields.no_op("style", &["vivid", "natural"])?;
    fields.no_op("complexity", &["low", "medium", "high"])?;
    let user = fields.filled_text("user")?;
    Ok(Echo {
        quality: quality.map_or("high", |(_, shown)| shown),
        safety_identifier: fields.filled_text("safety_identifier")?.or(user),
    })
}

/// Refuses the parameters of other servers, with what to do instead.
fn refuse_foreign(fields: &mut Fields) -> Result<(), Error> {
    for (name, instead) in FOREIGN {
        if fields.take(name).is_some() {
            return Err(Error::field("unknown_parameter", name, instead));
        }
    }
    // LiteLLM sends it empty. OpenAI's package merges its content into the other parameters.
    match fields.take("extra_body") {
        None => Ok(()),
        Some(serde_json::Value::Object(inner)) if inner.is_empty() => Ok(()),
        Some(_) => Err(Error::field(
            "unknown_parameter",
            "extra_body",
            "is not a parameter of this route; send what is in it beside the other parameters",
        )),
    }
}

/// Reads a request.
///
/// # Errors
/// The first parameter that cannot be used.
pub(super) fn read(service: &Service, settings: &ImagesArgs, mut fields: Fields) -> Result<Asked, Error> {
    let model = fields.filled_text("model")?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let formats = [("url", Answer::Url), ("b64_json", Answer::Base64)];
    let format = word(&mut fields, "response_format", &formats)?;
    let mut input = drawing::input(&mut fields)?;
    let echo = echo(&mut fields)?;
    refuse_foreign(&mut fields)?;
    fields.finish()?;
    if input.partial_images.is_some_and(|count| count > 0) && !stream {
        let problem = "is above 0, and there is nothing to send them with; ask for `stream` too";
        return Err(Error::field("unsupported_value", "partial_images", problem));
    }
    if let Some(model) = model {
        input
            .concepts
            .extend(model_concepts(service, &settings.model_alias, &model)?);
    }
    let answer = match stream {
        true => Answer::Stream,
        false => format.unwrap_or_else(|| settings.response_format.into()),
    };
    Ok(Asked { input, answer, echo })
}
