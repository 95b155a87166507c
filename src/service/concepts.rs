//! Registering, listing, deleting, exporting and importing concepts; their trainings.

use bytes::Bytes;
use serde::Serialize;

use super::{Addition, Caller, Service};
use crate::concept::{ConceptKind, is_slug};
use crate::error::{Error, ErrorKind};
use crate::ids::TrainingId;
use crate::picture::{OutputFormat, PictureError, PictureLimits, decode, encode};
use crate::registry::{Concept, NewConcept, Training, TrainingStatus};
use crate::training::TrainingSpec;

/// What a caller wants to register, as parsed; values are checked here.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Registration {
    pub name: Option<String>,
    pub kind: Option<String>,
    pub class: Option<String>,
    /// Encoded pictures.
    #[serde(serialize_with = "crate::registry::blobs::hashes")]
    pub images: Vec<Bytes>,
    pub captions: Vec<String>,
    pub steps: Option<u32>,
    pub layers: Option<u32>,
    pub learning_rate: Option<f64>,
    pub text_tokens: Option<u32>,
    pub image_tokens: Option<u32>,
    pub seed: Option<u64>,
}

/// A concept with its newest training.
#[derive(Debug, Clone)]
pub struct ConceptView {
    pub concept: Concept,
    pub training: Option<Training>,
}

impl ConceptView {
    /// `ready`, or what its training says: `training`, `failed`, `cancelled`.
    pub fn status(&self) -> &'static str {
        match (
            &self.concept.version,
            self.training.as_ref().map(|training| training.status),
        ) {
            (Some(_), _) => "ready",
            (None, Some(TrainingStatus::Failed)) => "failed",
            (None, Some(TrainingStatus::Cancelled)) => "cancelled",
            (None, _) => "training",
        }
    }
}

fn check_name(name: Option<String>) -> Result<String, Error> {
    let name = name.ok_or_else(|| Error::field("missing_parameter", "name", "is missing"))?;
    match is_slug(&name) {
        true => Ok(name),
        false => Err(Error::field(
            "invalid_value",
            "name",
            "must be 1 to 63 of a-z, 0-9 and -, the first not a hyphen",
        )),
    }
}

/// Decodes a foreign picture under `limits` and encodes it anew: what is stored carries none of the original's bytes.
fn clean(bytes: &Bytes, limits: &PictureLimits) -> Result<Vec<u8>, PictureError> {
    encode(&decode(bytes, limits)?, OutputFormat::Png, &[])
}

fn picture_error(error: &PictureError) -> Error {
    let (code, kind, limit) = match error {
        PictureError::UnknownFormat => ("unknown_picture_format", ErrorKind::Invalid, None),
        PictureError::TooManyBytes { limit, .. } => ("picture_too_large", ErrorKind::TooLarge, Some(*limit as u64)),
        PictureError::TooManyPixels { pixels, .. } => ("picture_too_many_pixels", ErrorKind::Invalid, Some(*pixels)),
        PictureError::NoPixels { .. } | PictureError::Truncated { .. } | PictureError::Damaged(_) => {
            ("damaged_picture", ErrorKind::Invalid, None)
        }
    };
    let told = Error::field(code, "images", error.to_string()).of_kind(kind);
    match limit {
        Some(limit) => told.limit(limit),
        None => told,
    }
}

impl Service {
    /// Checks a registration, stores its pictures, and queues its training. Nothing is left of a refused one.
    ///
    /// # Errors
    /// The first value that cannot be used; a name that is taken.
    pub async fn register(&self, caller: &Caller, registration: Registration) -> Result<ConceptView, Error> {
        let name = check_name(registration.name)?;
        let kind = registration
            .kind
            .ok_or_else(|| Error::field("missing_parameter", "kind", "is missing; expected `subject` or `style`"))?;
        let kind: ConceptKind = kind
            .parse()
            .map_err(|problem: String| Error::field("invalid_value", "kind", problem))?;
        let class = registration.class.map(|class| class.trim().to_owned());
        let info = self.engine.info();
        let mut spec = TrainingSpec::preset(info.preset, kind, &name, class.as_deref(), info.layers);
        spec.seed = registration.seed.unwrap_or(0);
        spec.captions = registration.captions;
        let pick = |value: Option<u32>, default: u32| value.unwrap_or(default);
        spec.steps = pick(registration.steps, spec.steps);
        spec.layers = pick(registration.layers, spec.layers);
        spec.text_tokens = pick(registration.text_tokens, spec.text_tokens);
        spec.image_tokens = pick(registration.image_tokens, spec.image_tokens);
        spec.learning_rate = registration.learning_rate.unwrap_or(spec.learning_rate);
        spec.check(info.layers)?;
        let count = registration.images.len();
        if count == 0 || count > self.limits.pictures {
            return Err(Error::field(
                "invalid_value",
                "images",
                format!("has {count} pictures; expected 1 to {}", self.limits.pictures),
            )
            .limit(self.limits.pictures as u64));
        }
        let addition = Addition {
            concepts: 1,
            trainings: 1,
        };
        let _turn = self.turn(caller, addition).await?;
        if self.registry.concept(caller.tenant, &name).await?.is_some() {
            return Err(crate::registry::RegistryError::NameTaken(name).into());
        }
        let waiting = self.registry.waiting_trainings().await?;
        if waiting >= self.limits.queued_trainings {
            return Err(Error::new(
                ErrorKind::Overloaded,
                "overloaded",
                "Too many trainings are waiting; try again later.",
            )
            .limit(self.limits.queued_trainings as u64));
        }
        let limits = self.limits.picture;
        let images = registration.images;
        let cleaned = tokio::task::spawn_blocking(move || {
            images
                .iter()
                .map(|bytes| clean(bytes, &limits))
                .collect::<Result<Vec<_>, _>>()
        })
        .await
        .map_err(Error::internal)?
        .map_err(|error| picture_error(&error))?;
        let mut pictures = Vec::with_capacity(cleaned.len());
        for png in cleaned {
            pictures.push(self.registry.blobs.put(png.into()).await?);
        }
        let new = NewConcept {
            name,
            kind,
            class_noun: spec.class_noun.clone(),
            pictures,
        };
        match self.registry.add_concept(caller.tenant, &new, &spec).await {
            Ok((concept, training)) => {
                self.wake.now();
                Ok(ConceptView {
                    concept,
                    training: Some(training),
                })
            }
            Err(error) => {
                // Another request took the name in between: the pictures of this one go.
                self.registry.remove_unreferenced(&new.pictures).await?;
                Err(error.into())
            }
        }
    }

    /// Every concept of the caller's tenant.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn concepts(&self, caller: &Caller) -> Result<Vec<ConceptView>, Error> {
        let mut views = Vec::new();
        for concept in self.registry.concepts(caller.tenant).await? {
            let training = self.registry.latest_training(caller.tenant, concept.id).await?;
            views.push(ConceptView { concept, training });
        }
        Ok(views)
    }

    /// A concept by its name.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn concept(&self, caller: &Caller, name: &str) -> Result<ConceptView, Error> {
        let concept = self
            .registry
            .concept(caller.tenant, name)
            .await?
            .ok_or_else(|| no_concept(name))?;
        let training = self.registry.latest_training(caller.tenant, concept.id).await?;
        Ok(ConceptView { concept, training })
    }

    /// Deletes a concept with its pictures, tensors and trainings; a running training ends.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn delete_concept(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let deleted = self.registry.delete_concept(caller.tenant, name).await?;
        self.wake.now();
        if deleted { Ok(()) } else { Err(no_concept(name)) }
    }

    /// A concept's file.
    ///
    /// # Errors
    /// When there is none, or it is not trained.
    pub async fn concept_file(&self, caller: &Caller, name: &str) -> Result<Bytes, Error> {
        let view = self.concept(caller, name).await?;
        let version = view.concept.version.as_ref().ok_or_else(|| not_ready(&view))?;
        Ok(self.registry.blobs.get(version).await?)
    }

    /// Takes in a concept file, under the name that its header has or another.
    ///
    /// # Errors
    /// When the file is refused, or the name is taken.
    pub async fn import_concept(
        &self,
        caller: &Caller,
        bytes: Bytes,
        name: Option<String>,
    ) -> Result<ConceptView, Error> {
        let file = self.engine.info().read_concept(&bytes).map_err(|error| {
            Error::new(
                ErrorKind::Invalid,
                "invalid_concept_file",
                format!("The concept file is refused: {error}."),
            )
        })?;
        let name = check_name(Some(name.unwrap_or_else(|| file.header.name.clone())))?;
        let addition = Addition {
            concepts: 1,
            trainings: 0,
        };
        let _turn = self.turn(caller, addition).await?;
        let version = self.registry.blobs.put(bytes).await?;
        let new = NewConcept {
            name,
            kind: file.header.kind,
            class_noun: file.header.class_noun,
            pictures: vec![],
        };
        let concept = self.registry.add_ready_concept(caller.tenant, &new, &version).await?;
        Ok(ConceptView {
            concept,
            training: None,
        })
    }

    /// A training by its identifier.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn training(&self, caller: &Caller, id: &str) -> Result<Training, Error> {
        let missing = || {
            Error::new(
                ErrorKind::NotFound,
                "training_not_found",
                format!("There is no training `{id}`."),
            )
        };
        let id: TrainingId = id.parse().map_err(|_| missing())?;
        self.registry.training(caller.tenant, id).await?.ok_or_else(missing)
    }

    /// Cancels a training; one that has ended stays as it is, and that is a conflict.
    ///
    /// # Errors
    /// When there is none, it has ended already, or the registry fails.
    pub async fn cancel_training(&self, caller: &Caller, id: &str) -> Result<Training, Error> {
        let before = self.training(caller, id).await?;
        if before.status.is_final() && before.status != TrainingStatus::Cancelled {
            return Err(Error::new(
                ErrorKind::Conflict,
                "training_ended",
                format!("The training has {} already.", before.status.as_str()),
            ));
        }
        let after = self.registry.cancel_training(caller.tenant, before.id).await?;
        self.wake.now();
        after.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                "training_not_found",
                format!("There is no training `{id}`."),
            )
        })
    }
}

pub(super) fn no_concept(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        "concept_not_found",
        format!("There is no concept `{name}`."),
    )
}

pub(super) fn not_ready(view: &ConceptView) -> Error {
    let training = view
        .training
        .as_ref()
        .map_or_else(String::new, |t| format!(" (training {})", t.id));
    let sentence = match view.status() {
        "training" => format!(
            "The concept `{}` is still in training{training}; poll it and try again.",
            view.concept.name
        ),
        status => format!(
            "The concept `{}` cannot be used: its training {status}{training}.",
            view.concept.name
        ),
    };
    Error::new(ErrorKind::Conflict, "concept_not_ready", sentence)
}
