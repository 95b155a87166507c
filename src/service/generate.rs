//! From a caller's input to the engine's request: resolves and places concepts, checks limits, counts costs.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::concepts::{no_concept, not_ready};
use super::placement::{Placeable, place};
use super::size::choose;
use super::{Caller, ConceptView, Service};
use crate::cluster::Prepared;
use crate::jobs::{DrawEvent, Waiting};
use crate::registry::{BlobError, Concept, GenerationConcept, GenerationSettings, NewGeneration};
use coar_core::concept::{concept_names, near_placeholders, parse_prompt, placeholder_at};
use coar_core::engine::{ConceptTokens, Cost, SamplingParams};
use coar_core::error::{Error, ErrorKind};
use coar_core::image::ImageFormat;

/// A concept that is named outside the prompt, and the parameter that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedConcept {
    pub name: String,
    pub field: &'static str,
}

/// The input of a generation; absent values take the model's defaults.
#[derive(Debug, Clone, Default)]
pub struct GenerateInput {
    pub prompt: String,
    /// Concepts that are placed in the prompt unless it names them: see `placement`.
    pub concepts: Vec<NamedConcept>,
    pub count: Option<u32>,
    pub size: Option<(u32, u32)>,
    pub seed: Option<u64>,
    pub first_index: Option<u32>,
    pub guidance_scale: Option<f64>,
    pub temperature: Option<f64>,
    pub top_k: Option<u32>,
    pub identity_mask: Option<bool>,
    /// PNG by default.
    pub output_format: Option<ImageFormat>,
    /// 0 to 100; for JPEG files the quality.
    pub output_compression: Option<u8>,
    pub partial_images: Option<u32>,
}

/// A request that was checked and can be drawn.
#[derive(Debug, Clone)]
pub struct Plan {
    /// In the form in which it would be stored; the prompt contains every concept.
    pub new: NewGeneration,
    pub prepared: Prepared,
    pub cost: Cost,
}

/// A generation that is not stored. Dropping it cancels it.
#[derive(Debug)]
pub struct Transient {
    /// Ends with [`DrawEvent::Ended`].
    pub events: mpsc::Receiver<DrawEvent>,
    _waiting: Waiting,
}

/// Many JSON parsers do not represent larger integers exactly.
pub const SEED_LIMIT: u64 = (1 << 53) - 1;
/// Maximum number of images of one seed.
pub const INDEX_LIMIT: u32 = 1_000_000;
const GUIDANCE_LIMIT: f64 = 20.0;
const TEMPERATURE_LIMIT: f64 = 5.0;
/// How long a request waits while other requests of its tenant are checked.
const PREPARING: Duration = Duration::from_secs(10);
/// The quality if none is given.
const JPEG_QUALITY: u8 = 90;

fn within(field: &'static str, value: f64, low: f64, high: f64) -> Result<f64, Error> {
    if value.is_finite() && (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::field(
        "invalid_value",
        field,
        format!("is {value}; expected {low} to {high}"),
    ))
}

fn at_most<T: Copy + PartialOrd + std::fmt::Display + Into<u64>>(
    field: &'static str,
    value: T,
    (low, high): (T, T),
) -> Result<T, Error> {
    if value >= low && value <= high {
        return Ok(value);
    }
    let error = Error::field("invalid_value", field, format!("is {value}; expected {low} to {high}"));
    Err(error.limit(high.into()))
}

/// Quality of JPEG, and of WebP below 100; WebP at 100 and PNG are lossless.
fn quality(format: ImageFormat, compression: Option<u8>) -> Result<u8, Error> {
    match (format, compression) {
        (_, Some(above)) if above > 100 => {
            let problem = format!("is {above}; expected 0 to 100");
            Err(Error::field("invalid_value", "output_compression", problem).limit(100))
        }
        (ImageFormat::Jpeg, given) => Ok(given.unwrap_or(JPEG_QUALITY).max(1)),
        (_, None | Some(100)) => Ok(100),
        (ImageFormat::WebP, Some(below)) => Ok(below),
        (format @ ImageFormat::Png, Some(below)) => Err(Error::field(
            "unsupported_value",
            "output_compression",
            format!(
                "is {below}, but {format} files are written without loss; leave it out or send 100, or ask for jpeg or webp"
            ),
        )),
    }
}

/// The error for a name in the prompt that is no concept, and may have been meant as text.
fn no_placeholder(name: &str, at: usize) -> Error {
    let error = no_concept(name);
    let message = format!(
        "{} `<{name}>` at character {at} of the prompt names one; as text write `< {name}>`, with a space.",
        error.message
    );
    Error {
        field: Some("prompt".into()),
        message,
        ..error
    }
}

impl Service {
    /// Checks and completes a request.
    ///
    /// # Errors
    /// The first value that cannot be used; a concept that is unknown or not trained.
    pub async fn plan(&self, caller: &Caller, input: GenerateInput) -> Result<Plan, Error> {
        let settings = self.settings(&input)?;
        self.check_length(&input.prompt, "has")?;
        let preparing = self.shares.preparations.take(caller.tenant, 1, PREPARING).await;
        let _preparing = preparing.map_err(|_| {
            let message = "Too many requests of yours are being checked; try again soon.";
            Error::new(ErrorKind::Overloaded, "overloaded", message).retry_after(Duration::from_secs(1))
        })?;
        let (prompt, found) = self.placed(caller, &input).await?;
        // The placed class nouns are not the caller's text, but they are tokenized as well.
        self.check_length(&prompt, "with its concepts has")?;
        let (mut concepts, mut tokens) = (Vec::new(), Vec::new());
        for concept in found {
            let (Some(hash), Some(version)) = (concept.version.clone(), concept.version_number) else {
                let training = self.registry.latest_training(caller.tenant, concept.id).await?;
                return Err(not_ready(&ConceptView { concept, training }));
            };
            tokens.push(match concept.tokens {
                Some(tokens) => tokens,
                None => self.count_tokens(&concept, version, &hash).await?,
            });
            concepts.push(GenerationConcept {
                name: concept.name,
                kind: concept.kind,
                version,
                hash,
            });
        }
        let mut new = NewGeneration {
            tenant: caller.tenant,
            background: false,
            prompt,
            settings,
            concepts,
            metadata: Value::Object(Map::new()),
            webhook_url: None,
            total: 0,
            priority: 0,
        };
        let prepared = self.executor.prepare(&new, &tokens)?;
        let cost = prepared.cost;
        new.total = u32::try_from(cost.image).unwrap_or(u32::MAX);
        Ok(Plan { new, prepared, cost })
    }

    fn check_length(&self, prompt: &str, has: &str) -> Result<(), Error> {
        let (characters, limit) = (prompt.chars().count(), self.limits.prompt);
        if characters <= limit {
            return Ok(());
        }
        let problem = format!(
            "{has} {characters} characters; the limit is {limit}, because every token of it takes room beside each image"
        );
        Err(Error::field("prompt_too_long", "prompt", problem).limit(limit as u64))
    }

    fn settings(&self, input: &GenerateInput) -> Result<GenerationSettings, Error> {
        let info = self.executor.info();
        let (width, height) = choose(input.size, &info.sizes, self.limits.size_policy)?;
        let output_format = input.output_format.unwrap_or(ImageFormat::Png);
        let temperature = input.temperature.unwrap_or(info.default_temperature);
        let guidance = input.guidance_scale.unwrap_or(info.default_guidance_scale);
        Ok(GenerationSettings {
            n: at_most("n", input.count.unwrap_or(1), (1, self.limits.count))?,
            sampling: SamplingParams {
                width,
                height,
                seed: match input.seed {
                    Some(seed) => at_most("seed", seed, (0, SEED_LIMIT))?,
                    None => rand::random::<u64>() & SEED_LIMIT,
                },
                guidance_scale: within("guidance_scale", guidance, 1.0, GUIDANCE_LIMIT)?,
                temperature: within("temperature", temperature, 0.0, TEMPERATURE_LIMIT)?,
                top_k: input.top_k.unwrap_or(info.default_top_k),
                identity_mask: input.identity_mask.unwrap_or(true),
            },
            first_index: at_most("first_index", input.first_index.unwrap_or(0), (0, INDEX_LIMIT))?,
            output_format,
            output_compression: quality(output_format, input.output_compression)?,
            partial_images: at_most("partial_images", input.partial_images.unwrap_or(0), (0, 3))?,
        })
    }

    /// Counts the context tokens of a version that an earlier release has stored, from its file, and stores the count.
    async fn count_tokens(&self, concept: &Concept, version: u32, hash: &str) -> Result<ConceptTokens, Error> {
        let info = self.executor.info();
        let bytes = match self.registry.blobs.get_within(hash, info.concept_limit() as u64).await {
            Err(error @ BlobError::TooLarge(..)) => return Err(Error::concept_unusable(&concept.name, error)),
            read => read?,
        };
        let file = info
            .read_concept(&bytes)
            .map_err(|error| Error::concept_unusable(&concept.name, error))?;
        let tokens = ConceptTokens::from(&file.tensors);
        self.registry.note_tokens(concept.id, version, tokens).await?;
        Ok(tokens)
    }

    /// The prompt with every concept in it, and the concepts.
    async fn placed(&self, caller: &Caller, input: &GenerateInput) -> Result<(String, Vec<Concept>), Error> {
        let unusable =
            |error: coar_core::concept::PromptError| Error::field("invalid_value", "prompt", error.to_string());
        let written = parse_prompt(&input.prompt).map_err(unusable)?;
        let mut named: Vec<(&str, &'static str)> = Vec::new();
        let beside = input.concepts.iter().map(|named| (named.name.as_str(), named.field));
        let inside = concept_names(&written).into_iter().map(|name| (name, "prompt"));
        for (name, field) in inside.chain(beside) {
            if named.iter().any(|(known, _)| *known == name) {
                continue;
            }
            if named.len() == self.limits.concepts {
                let limit = self.limits.concepts;
                let problem = format!("makes more than {limit} concepts, the limit of one request");
                return Err(Error::field("too_many_concepts", field, problem).limit(limit as u64));
            }
            named.push((name, field));
        }
        let mut found: Vec<Concept> = Vec::new();
        for (name, field) in named {
            if found.iter().any(|concept| concept.name == name) {
                continue;
            }
            let missing = || match placeholder_at(&input.prompt, name).filter(|_| field == "prompt") {
                Some(at) => no_placeholder(name, at),
                None => Error {
                    field: Some(field.into()),
                    ..no_concept(name)
                },
            };
            found.push(self.registry.concept(caller.tenant, name).await?.ok_or_else(missing)?);
        }
        self.check_near(caller, &input.prompt).await?;
        let placeable: Vec<Placeable> = found
            .iter()
            .map(|concept| Placeable {
                name: &concept.name,
                kind: concept.kind,
                class: concept.class_noun.as_deref(),
            })
            .collect();
        let prompt = place(&input.prompt, &placeable);
        Ok((prompt, found))
    }

    /// Refuses `<Rex>` if there is a concept `rex`: it would silently be drawn as text.
    async fn check_near(&self, caller: &Caller, prompt: &str) -> Result<(), Error> {
        for (inner, name) in near_placeholders(prompt).into_iter().take(self.limits.concepts) {
            if self.registry.concept(caller.tenant, &name).await?.is_some() {
                let at = placeholder_at(prompt, inner).unwrap_or_default();
                let problem = format!(
                    "has `<{inner}>` at character {at}, which names no concept; did you mean `<{name}>`? As text write \
                     `< {inner}>`"
                );
                return Err(Error::field("invalid_value", "prompt", problem));
            }
        }
        Ok(())
    }

    /// Draws without storing anything. Dropping the result cancels it.
    ///
    /// # Errors
    /// When the engine is overloaded or stopping.
    #[tracing::instrument(name = "service.generate", skip_all)]
    pub async fn draw(&self, plan: &Plan) -> Result<Transient, Error> {
        let (events, waiting) = self.drawings.begin_transient(plan.new.clone(), &plan.prepared).await?;
        Ok(Transient {
            events,
            _waiting: waiting,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_quality_where_there_is_one() {
        let code = |outcome: Result<u8, Error>| outcome.map_err(|error| error.code);
        assert_eq!(code(quality(ImageFormat::Jpeg, None)), Ok(JPEG_QUALITY));
        assert_eq!(code(quality(ImageFormat::Jpeg, Some(0))), Ok(1));
        assert_eq!(code(quality(ImageFormat::Jpeg, Some(100))), Ok(100));
        assert_eq!(code(quality(ImageFormat::Jpeg, Some(101))), Err("invalid_value"));
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            assert_eq!(code(quality(format, None)), Ok(100));
            assert_eq!(code(quality(format, Some(100))), Ok(100));
        }
        assert_eq!(code(quality(ImageFormat::WebP, Some(0))), Ok(0));
        assert_eq!(code(quality(ImageFormat::Png, Some(99))), Err("unsupported_value"));
    }
}
