//! Concepts as JSON.

use serde::Serialize;
use utoipa::ToSchema;

use super::super::trainings::object::TrainingObject;
use crate::api::openapi::metadata_schema;
use crate::registry::{Concept, ConceptStatus, Metadata, Version};
use crate::service::ConceptView;
use coar_core::concept::ConceptKind;

/// Bytes of a file.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code)]
pub(in crate::api) struct File(Vec<u8>);

/// What a concept describes.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ConceptKind)]
pub(in crate::api) enum KindName {
    Subject,
    Style,
}

impl From<ConceptKind> for KindName {
    fn from(kind: ConceptKind) -> Self {
        match kind {
            ConceptKind::Subject => Self::Subject,
            ConceptKind::Style => Self::Style,
        }
    }
}

/// How a concept is learned.
#[derive(serde::Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = TrainingMethod)]
#[allow(dead_code)]
pub(in crate::api) enum MethodName {
    Coar,
    CoarText,
    TextualInversion,
}

/// `ready` as soon as the concept has a version, also while it is trained again. Before that, the state of its newest
/// training.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ConceptStatus)]
pub(in crate::api) enum StatusName {
    Training,
    Ready,
    Failed,
    Cancelled,
}

impl From<ConceptStatus> for StatusName {
    fn from(status: ConceptStatus) -> Self {
        match status {
            ConceptStatus::Training => Self::Training,
            ConceptStatus::Ready => Self::Ready,
            ConceptStatus::Failed => Self::Failed,
            ConceptStatus::Cancelled => Self::Cancelled,
        }
    }
}

/// The active version of a concept.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VersionInUse)]
pub(in crate::api) struct InUse {
    /// From 1.
    #[schema(example = 2)]
    pub number: u32,
    /// SHA-256 of the concept file.
    #[schema(example = "9f2c1d5e7a3b48c60d1e2f3a4b5c6d7e8f901a2b3c4d5e6f708192a3b4c5d6e7")]
    pub hash: String,
    /// Unix seconds.
    pub created_at: i64,
}

impl InUse {
    pub(in crate::api) fn of(concept: &Concept) -> Option<Self> {
        Some(Self {
            number: concept.version_number?,
            hash: concept.version.clone()?,
            created_at: concept.version_created_at.unwrap_or(concept.created_at) / 1000,
        })
    }
}

/// A subject or a style that the model has learned or is learning.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Concept)]
pub(in crate::api) struct ConceptObject {
    #[schema(example = "concept_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "concept")]
    object: &'static str,
    /// Name of the concept, written `<rex>` in prompts.
    #[schema(example = "rex")]
    name: String,
    kind: KindName,
    /// The noun of a subject; null for styles.
    #[schema(example = "dog")]
    class: Option<String>,
    status: StatusName,
    /// The version that prompts use; null until a training has succeeded.
    version: Option<InUse>,
    /// Number of versions.
    #[schema(example = 2)]
    versions: u32,
    /// Number of reference images; 0 if the concept was imported.
    #[schema(example = 5)]
    images: usize,
    #[schema(example = "The dog of the shop window")]
    description: Option<String>,
    #[schema(example = json!({"order": "4711"}))]
    metadata: Metadata,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds: the last change, including a new version.
    updated_at: i64,
    /// The newest training; null if the concept was imported.
    training: Option<TrainingObject>,
    /// Only in the response to a registration: the name of another concept that was trained from the same images and
    /// settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duplicate_of: Option<String>,
}

impl From<&ConceptView> for ConceptObject {
    fn from(view: &ConceptView) -> Self {
        let concept = &view.concept;
        Self {
            id: concept.id.to_string(),
            object: "concept",
            name: concept.name.clone(),
            kind: concept.kind.into(),
            class: concept.class_noun.clone(),
            status: view.status().into(),
            version: InUse::of(concept),
            versions: concept.versions,
            images: concept.images.len(),
            description: concept.description.clone(),
            metadata: concept.metadata.clone(),
            created_at: concept.created_at / 1000,
            updated_at: concept.updated_at / 1000,
            training: view.training.as_ref().map(Into::into),
            duplicate_of: None,
        }
    }
}

/// A version of a concept. It stays until the concept is deleted.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ConceptVersion)]
pub(in crate::api) struct VersionObject {
    /// The number as a string, for the list's `after`.
    #[schema(example = "1")]
    id: String,
    #[schema(example = "concept.version")]
    object: &'static str,
    /// From 1; numbers are not reused.
    #[schema(example = 1)]
    number: u32,
    /// SHA-256 of the concept file.
    #[schema(example = "9f2c1d5e7a3b48c60d1e2f3a4b5c6d7e8f901a2b3c4d5e6f708192a3b4c5d6e7")]
    hash: String,
    /// The training that made it; null if it was imported.
    #[schema(example = "training_01990000000070008000000000000000")]
    training_id: Option<String>,
    /// Unix seconds.
    created_at: i64,
}

impl From<&Version> for VersionObject {
    fn from(version: &Version) -> Self {
        Self {
            id: version.number.to_string(),
            object: "concept.version",
            number: version.number,
            hash: version.hash.clone(),
            training_id: version.training.map(|id| id.to_string()),
            created_at: version.created_at / 1000,
        }
    }
}

/// A registration. Each part except `images` and `captions` may be given at most once.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(in crate::api) struct RegisterConcept {
    /// 1 to 63 of a-z, 0-9 and -, the first not a hyphen; not `import`.
    #[schema(example = "rex", pattern = "^[a-z0-9][a-z0-9-]{0,62}$")]
    name: String,
    kind: KindName,
    /// The noun of a subject; styles have none.
    #[schema(example = "dog", nullable = false)]
    class: Option<String>,
    /// 1 to 10 images: PNG, JPEG or WebP; or a ZIP archive of them, with `NAME.txt` as the caption of `NAME.png`. Also
    /// `images[0]`, `images[1]`, …, in the order of the numbers.
    #[schema(min_items = 1, max_items = 10)]
    images: Vec<File>,
    /// What else each image shows, in the order of the images; without control tokens (`</s>`) and names of concepts.
    #[schema(max_items = 10, nullable = false)]
    captions: Option<Vec<String>>,
    /// What is learned: context tokens for text and image, for text only, or one input embedding. Default: the model's
    /// preset.
    #[schema(nullable = false)]
    method: Option<MethodName>,
    #[schema(minimum = 1, maximum = 20_000, nullable = false)]
    steps: Option<u32>,
    /// Number of decoder layers, from the first, that get context tokens.
    #[schema(minimum = 1, nullable = false)]
    layers: Option<u32>,
    #[schema(exclusive_minimum = 0.0, maximum = 1.0, nullable = false)]
    learning_rate: Option<f64>,
    #[schema(minimum = 1, maximum = 16, nullable = false)]
    text_tokens: Option<u32>,
    #[schema(minimum = 0, maximum = 16, nullable = false)]
    image_tokens: Option<u32>,
    #[schema(nullable = false)]
    seed: Option<u64>,
    #[schema(max_length = 1000, nullable = false)]
    description: Option<String>,
    /// A JSON object of strings: at most 16 pairs, keys of 1 to 64 characters, values of at most 512.
    #[schema(example = "{\"order\": \"4711\"}", nullable = false)]
    metadata: Option<String>,
    /// Notified when the training ends.
    #[schema(example = "https://example.com/hooks/coar", nullable = false)]
    webhook_url: Option<String>,
    /// Among the queued trainings of the tenant, the highest priority is run first. It does not affect other tenants.
    #[schema(minimum = 0, maximum = 100, default = 0, nullable = false)]
    priority: Option<u32>,
}

/// Changes to a concept. Absent: unchanged.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
pub(in crate::api) struct ChangeConcept {
    #[schema(example = "max", pattern = "^[a-z0-9][a-z0-9-]{0,62}$")]
    name: Option<String>,
    /// Null: removes the description.
    #[schema(max_length = 1000)]
    description: Option<String>,
    /// Replaces the current metadata. At most 16 pairs, keys of 1 to 64 characters, values of at most 512.
    #[schema(schema_with = metadata_schema)]
    metadata: Option<std::collections::BTreeMap<String, String>>,
    /// Number of the version to make active, older or newer.
    #[schema(example = 1, minimum = 1)]
    version: Option<u32>,
}

/// Settings of another training. Default: those of the concept's newest training.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
pub(in crate::api) struct TrainConcept {
    #[schema(minimum = 1, maximum = 20_000, example = 80)]
    steps: Option<u32>,
    #[schema(minimum = 1)]
    layers: Option<u32>,
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    learning_rate: Option<f64>,
    #[schema(minimum = 1, maximum = 16)]
    text_tokens: Option<u32>,
    #[schema(minimum = 0, maximum = 16)]
    image_tokens: Option<u32>,
    seed: Option<u64>,
    /// In the order of the images.
    #[schema(max_items = 10)]
    captions: Option<Vec<String>>,
    /// Notified when the training ends.
    #[schema(example = "https://example.com/hooks/coar")]
    webhook_url: Option<String>,
    /// Among the queued trainings of the tenant, the highest priority is run first. It does not affect other tenants.
    #[schema(minimum = 0, maximum = 100, default = 0)]
    priority: Option<u32>,
}
