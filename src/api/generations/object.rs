//! Generations as JSON: request and response bodies.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::super::drawing::{UsageObject, UsedConceptObject};
use super::super::openapi::metadata_schema;
use crate::registry::{Generation, GenerationSettings, StoredImage};
use crate::service::{GenerationView, Links, Plan, Service};

/// A request for a generation.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
#[schema(example = json!({"prompt": "a photo of <rex> cat on the beach", "n": 2, "seed": 7, "partial_images": 2}))]
pub(super) struct CreateGeneration {
    /// At most 4000 characters. `<name>` uses a concept.
    #[schema(example = "a photo of <rex> cat on the beach", max_length = 4000)]
    prompt: String,
    /// Names of concepts. Those that the prompt does not name are placed in it: a subject before the first occurrence
    /// of its class noun, or else as "a photo of <name> class, " at the beginning; a style as " in <name> style" at the
    /// end.
    concepts: Option<Vec<String>>,
    #[schema(minimum = 1, maximum = 10, default = 1)]
    n: Option<u32>,
    /// `auto` or WIDTHxHEIGHT, one of the model's sizes. If the server is configured with `size_policy` `nearest`, any
    /// size is accepted and the one with the nearest aspect ratio is used.
    #[schema(example = "auto")]
    size: Option<String>,
    /// Image i uses the random stream (seed, first_index + i). Default, and with -1: a random seed.
    #[schema(minimum = -1, maximum = 9007199254740991_i64)]
    seed: Option<i64>,
    #[schema(minimum = 0, maximum = 1000000, default = 0)]
    first_index: Option<u32>,
    #[schema(minimum = 1, maximum = 20)]
    guidance_scale: Option<f64>,
    #[schema(minimum = 0, maximum = 5)]
    temperature: Option<f64>,
    /// 0: all.
    top_k: Option<u32>,
    #[schema(default = true)]
    identity_mask: Option<bool>,
    /// `png` (default), `jpeg` or `webp`.
    #[schema(example = "png")]
    output_format: Option<String>,
    /// Quality of JPEG (default 90) and of WebP (default 100, which is lossless). With PNG only 100.
    #[schema(minimum = 0, maximum = 100)]
    output_compression: Option<u32>,
    /// Number of partial versions of each image in a stream of events.
    #[schema(minimum = 0, maximum = 3, default = 0)]
    partial_images: Option<u32>,
    /// Receives a signed POST (Standard Webhooks) when the generation ends. A public address with port 80 or 443.
    #[schema(example = "https://example.com/hooks/coar")]
    webhook_url: Option<String>,
    /// Among the queued generations of the tenant, the highest priority is run first. It does not affect other tenants.
    #[schema(minimum = 0, maximum = 100, default = 0)]
    priority: Option<u32>,
    /// At most 16 pairs; keys of 64, values of 512 characters.
    #[schema(schema_with = metadata_schema)]
    metadata: Option<Value>,
}

/// A generation.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Generation)]
pub(in crate::api) struct GenerationObject {
    #[schema(example = "generation_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "generation")]
    object: &'static str,
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[schema(example = "succeeded")]
    status: &'static str,
    /// Number of generations ahead of it while it is queued.
    queue_position: Option<u32>,
    /// Among the queued generations of the tenant, the highest priority is run first.
    #[schema(example = 0)]
    priority: i32,
    progress: ProgressObject,
    /// The prompt as it is used, with all concepts placed in it.
    #[schema(example = "a photo of <rex> cat on the beach")]
    prompt: String,
    request: SettingsObject,
    concepts: Vec<UsedConceptObject>,
    images: Vec<StoredImageObject>,
    usage: Option<UsageObject>,
    /// Why it failed.
    #[schema(value_type = Option<FailureObject>)]
    error: Option<Value>,
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    metadata: Value,
    /// Unix seconds, as for all times.
    created_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
}

/// Progress in image tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProgressObject {
    #[schema(example = 288)]
    pub done: u32,
    #[schema(example = 288)]
    pub total: u32,
}

/// All settings, resolved. Sent again with the prompt, they give the same images.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GenerationSettings)]
struct SettingsObject {
    #[schema(example = 2)]
    n: u32,
    #[schema(example = "96x96")]
    size: String,
    #[schema(example = 7)]
    seed: u64,
    #[schema(example = 0)]
    first_index: u32,
    #[schema(example = 3.0)]
    guidance_scale: f64,
    #[schema(example = 1.0)]
    temperature: f64,
    #[schema(example = 100)]
    top_k: u32,
    identity_mask: bool,
    #[schema(example = "png")]
    output_format: &'static str,
    #[schema(example = 100)]
    output_compression: u8,
    #[schema(example = 0)]
    partial_images: u32,
}

/// A stored image.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GeneratedImage)]
pub(in crate::api) struct StoredImageObject {
    #[schema(example = "image_01990000000070008000000000000000")]
    id: String,
    /// Index of the image under its seed.
    #[schema(example = 0)]
    index: u32,
    #[schema(example = 7)]
    seed: u64,
    /// Needs no key. Expires with the image.
    url: String,
    #[schema(example = 96)]
    width: u32,
    #[schema(example = 96)]
    height: u32,
    /// SHA-256 of the file.
    content_hash: String,
}

/// Why a generation failed.
#[derive(ToSchema)]
#[allow(dead_code)]
#[schema(as = GenerationFailure)]
struct FailureObject {
    #[schema(example = "interrupted")]
    code: String,
    message: String,
    field: Option<String>,
}

/// A request that was checked but not run.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GenerationPlan)]
pub(super) struct PlanObject {
    /// Always true: an invalid request gets an error.
    valid: bool,
    /// The prompt as it would be used, with all concepts placed in it.
    prompt: String,
    request: SettingsObject,
    concepts: Vec<UsedConceptObject>,
    /// The tokens that it would take.
    usage: UsageObject,
}

/// A generation, or with `validate_only` a checked request.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = GenerationOrPlan)]
#[allow(dead_code)]
pub(super) enum AnswerObject {
    Generation(Box<GenerationObject>),
    Plan(PlanObject),
}

fn settings_object(settings: &GenerationSettings) -> SettingsObject {
    SettingsObject {
        n: settings.n,
        size: format!("{}x{}", settings.sampling.width, settings.sampling.height),
        seed: settings.sampling.seed,
        first_index: settings.first_index,
        guidance_scale: settings.sampling.guidance_scale,
        temperature: settings.sampling.temperature,
        top_k: settings.sampling.top_k,
        identity_mask: settings.sampling.identity_mask,
        output_format: settings.output_format.as_str(),
        output_compression: settings.output_compression,
        partial_images: settings.partial_images,
    }
}

/// An image as JSON; its URL begins with `base`.
pub(super) fn image_object(image: &StoredImage, links: &Links, base: &str) -> StoredImageObject {
    StoredImageObject {
        id: image.id.to_string(),
        index: image.index,
        seed: image.seed.unwrap_or_default(),
        url: format!("{base}{}", links.path(image)),
        width: image.size.0,
        height: image.size.1,
        content_hash: image.blob.clone(),
    }
}

/// A generation as JSON; the URLs of its images begin with `base`.
pub(in crate::api) fn generation_object(
    generation: &Generation,
    images: &[StoredImage],
    queue_position: Option<u32>,
    (links, base): (&Links, &str),
) -> GenerationObject {
    let (new, seconds) = (&generation.new, |ms: i64| ms / 1000);
    GenerationObject {
        id: generation.id.to_string(),
        object: "generation",
        status: generation.status.as_str(),
        queue_position,
        priority: new.priority,
        progress: ProgressObject {
            done: generation.done,
            total: new.total,
        },
        prompt: new.prompt.clone(),
        request: settings_object(&new.settings),
        concepts: new.concepts.iter().map(Into::into).collect(),
        images: images.iter().map(|image| image_object(image, links, base)).collect(),
        usage: generation.usage.map(Into::into),
        error: generation.error.clone(),
        metadata: new.metadata.clone(),
        created_at: seconds(generation.created_at),
        started_at: generation.started_at.map(seconds),
        finished_at: generation.finished_at.map(seconds),
    }
}

/// Like [`generation_object`], for a [`GenerationView`].
pub(super) fn object(service: &Service, view: &GenerationView, base: &str) -> GenerationObject {
    let links = (service.links.as_ref(), base);
    generation_object(&view.generation, &view.images, view.queue_position, links)
}

/// A plan as JSON.
pub(super) fn plan_object(plan: &Plan) -> PlanObject {
    PlanObject {
        valid: true,
        prompt: plan.new.prompt.clone(),
        request: settings_object(&plan.new.settings),
        concepts: plan.new.concepts.iter().map(Into::into).collect(),
        usage: crate::registry::TokenUsage {
            text_tokens: plan.cost.text,
            image_tokens: plan.cost.image,
        }
        .into(),
    }
}
