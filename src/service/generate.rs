//! Drawing pictures: concepts resolved, limits checked, the engine asked.

use std::sync::Arc;

use super::concepts::{no_concept, not_ready};
use super::{Caller, ConceptView, Service};
use crate::concept::{concept_names, parse_prompt};
use crate::engine::{ConceptUse, GenerateRequest, GenerationEvent};
use crate::error::{Error, ErrorKind};
use crate::picture::RgbPicture;

/// What a caller wants drawn; absent values take the model's defaults.
#[derive(Debug, Clone, Default)]
pub struct GenerateInput {
    pub prompt: String,
    pub count: Option<u32>,
    pub size: Option<(u32, u32)>,
    pub seed: Option<u64>,
    pub guidance_scale: Option<f64>,
    pub temperature: Option<f64>,
    pub top_k: Option<u32>,
    pub identity_mask: Option<bool>,
}

/// A concept and the version of it that was used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsedConcept {
    pub name: String,
    pub version: String,
}

/// One drawn picture.
#[derive(Debug, Clone)]
pub struct GeneratedImage {
    pub index: u32,
    pub picture: RgbPicture,
}

/// What was drawn, and with what.
#[derive(Debug, Clone)]
pub struct Generated {
    pub request: GenerateRequest,
    pub images: Vec<GeneratedImage>,
    pub concepts: Vec<UsedConcept>,
    pub text_tokens: u64,
    pub image_tokens: u64,
}

/// Seeds beyond this are not exact in every JSON reader.
pub const SEED_LIMIT: u64 = (1 << 53) - 1;
const GUIDANCE_LIMIT: f64 = 20.0;
const TEMPERATURE_LIMIT: f64 = 5.0;

impl Service {
    /// Checks and completes a request.
    ///
    /// # Errors
    /// The first value that cannot be used; a concept that is unknown or not trained.
    pub async fn plan(&self, caller: &Caller, input: GenerateInput) -> Result<GenerateRequest, Error> {
        let info = self.engine.info();
        let characters = input.prompt.chars().count();
        if characters > self.limits.prompt {
            return Err(Error::field(
                "prompt_too_long",
                "prompt",
                format!("has {characters} characters; the limit is {}", self.limits.prompt),
            )
            .limit(self.limits.prompt as u64));
        }
        let pieces =
            parse_prompt(&input.prompt).map_err(|error| Error::field("invalid_value", "prompt", error.to_string()))?;
        let count = input.count.unwrap_or(1);
        if !(1..=self.limits.count).contains(&count) {
            return Err(Error::field(
                "invalid_value",
                "n",
                format!("is {count}; expected 1 to {}", self.limits.count),
            )
            .limit(self.limits.count.into()));
        }
        let (width, height) = input.size.unwrap_or(info.sizes[0]);
        if !info.sizes.contains(&(width, height)) {
            let known: Vec<String> = info.sizes.iter().map(|(w, h)| format!("{w}x{h}")).collect();
            return Err(Error::field(
                "invalid_size",
                "size",
                format!("is {width}x{height}; this model draws {}", known.join(", ")),
            ));
        }
        let range = |field: &'static str, value: f64, low: f64, high: f64| match value.is_finite()
            && (low..=high).contains(&value)
        {
            true => Ok(value),
            false => Err(Error::field(
                "invalid_value",
                field,
                format!("is {value}; expected {low} to {high}"),
            )),
        };
        let guidance_scale = range(
            "guidance_scale",
            input.guidance_scale.unwrap_or(info.default_guidance_scale),
            1.0,
            GUIDANCE_LIMIT,
        )?;
        let temperature = range(
            "temperature",
            input.temperature.unwrap_or(info.default_temperature),
            0.0,
            TEMPERATURE_LIMIT,
        )?;
        let seed = input.seed.unwrap_or_else(|| rand::random::<u64>() & SEED_LIMIT);
        if seed > SEED_LIMIT {
            return Err(Error::field(
                "invalid_value",
                "seed",
                format!("is {seed}; expected 0 to {SEED_LIMIT}"),
            )
            .limit(SEED_LIMIT));
        }
        let mut concepts = Vec::new();
        for name in concept_names(&pieces) {
            concepts.push(self.use_concept(caller, name).await?);
        }
        Ok(GenerateRequest {
            tenant: caller.tenant.to_string(),
            prompt: input.prompt,
            concepts,
            width,
            height,
            count,
            seed,
            guidance_scale,
            temperature,
            top_k: input.top_k.unwrap_or(info.default_top_k),
            identity_mask: input.identity_mask.unwrap_or(true),
            partial_images: 0,
        })
    }

    /// Draws the pictures and waits for them. Dropping the future cancels the drawing.
    ///
    /// # Errors
    /// As [`Self::plan`]; when the engine is overloaded, stopping, or fails.
    #[tracing::instrument(name = "service.generate", skip_all)]
    pub async fn generate(&self, caller: &Caller, input: GenerateInput) -> Result<Generated, Error> {
        let request = self.plan(caller, input).await?;
        let mut stream = self.engine.generate(request.clone())?;
        let used = |concept: &ConceptUse| UsedConcept {
            name: concept.name.clone(),
            version: concept.content_hash.clone(),
        };
        let concepts = request.concepts.iter().map(used).collect();
        let mut images = Vec::new();
        loop {
            match stream.next().await {
                Some(GenerationEvent::Picture { index, picture }) => images.push(GeneratedImage { index, picture }),
                Some(GenerationEvent::Done {
                    text_tokens,
                    image_tokens,
                }) => {
                    // They arrive as they are finished; callers number them by place.
                    images.sort_by_key(|image: &GeneratedImage| image.index);
                    return Ok(Generated {
                        request,
                        images,
                        concepts,
                        text_tokens,
                        image_tokens,
                    });
                }
                Some(GenerationEvent::Failed(error)) => return Err(error.into()),
                Some(GenerationEvent::Started | GenerationEvent::Progress { .. } | GenerationEvent::Partial { .. }) => {
                }
                None => {
                    return Err(Error::new(
                        ErrorKind::Unavailable,
                        "stopping",
                        "The server is stopping.",
                    ));
                }
            }
        }
    }

    async fn use_concept(&self, caller: &Caller, name: &str) -> Result<ConceptUse, Error> {
        let missing = || crate::error::Error {
            field: Some("prompt".into()),
            ..no_concept(name)
        };
        let concept = self.registry.concept(caller.tenant, name).await?.ok_or_else(missing)?;
        let Some(version) = concept.version.clone() else {
            let training = self.registry.latest_training(caller.tenant, concept.id).await?;
            return Err(not_ready(&ConceptView { concept, training }));
        };
        let bytes = self.registry.blobs.get(&version).await?;
        let file = self.engine.info().read_concept(&bytes).map_err(|error| {
            Error::new(
                ErrorKind::Conflict,
                "concept_unusable",
                format!("The concept `{name}` cannot be used: {error}."),
            )
        })?;
        Ok(ConceptUse {
            name: name.to_owned(),
            content_hash: version,
            kind: concept.kind,
            tensors: Arc::new(file.tensors),
        })
    }
}
