//! Registering, listing, changing, deleting, exporting and importing concepts.

use bytes::Bytes;
use serde::Serialize;

use super::facts::{check_description, read_metadata};
use super::trainings::TrainingSettings;
use super::{Caller, PRIORITY_LIMIT, Service, Upload};
use crate::registry::{
    Concept, ConceptChange, ConceptFilter, ConceptStatus, Listed, NewConcept, Page, RegistryError, Training,
    TrainingStatus, Usage, Version, input_fingerprint,
};
use coar_core::concept::{ConceptKind, is_slug};
use coar_core::engine::ConceptTokens;
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ConceptId;
use coar_core::training::{TokenMethod, TrainingSpec};

/// A registration as parsed; its values are checked here.
#[derive(Debug, Default, Serialize)]
pub struct Registration {
    pub name: Option<String>,
    pub kind: Option<String>,
    pub class: Option<String>,
    pub images: Vec<Upload>,
    pub captions: Vec<String>,
    /// `coar`, `coar-text`, `textual-inversion`; `None`: that of the preset.
    pub method: Option<String>,
    pub steps: Option<u32>,
    pub layers: Option<u32>,
    pub learning_rate: Option<f64>,
    pub text_tokens: Option<u32>,
    pub image_tokens: Option<u32>,
    pub seed: Option<u64>,
    pub description: Option<String>,
    /// A JSON object of strings.
    pub metadata: Option<serde_json::Value>,
    pub webhook_url: Option<String>,
    /// Priority of the training, 0 to [`PRIORITY_LIMIT`](super::PRIORITY_LIMIT).
    pub priority: Option<i32>,
}

/// Changes to a concept; `None` keeps the value.
#[derive(Debug, Clone, Default)]
pub struct Change {
    pub name: Option<String>,
    /// `Some(None)` removes it.
    pub description: Option<Option<String>>,
    /// A JSON object of strings that replaces the present one.
    pub metadata: Option<serde_json::Value>,
    /// Number of the version to use.
    pub version: Option<u32>,
}

/// The result of a registration.
#[derive(Debug, Clone)]
pub struct Registered {
    pub view: ConceptView,
    /// The name of another concept that was trained from the same images and settings.
    pub duplicate_of: Option<String>,
}

/// A concept with its newest training.
#[derive(Debug, Clone)]
pub struct ConceptView {
    pub concept: Concept,
    pub training: Option<Training>,
}

impl ConceptView {
    /// Whether it can be used, otherwise the status of its training.
    pub fn status(&self) -> ConceptStatus {
        let training = self.training.as_ref().map(|training| training.status);
        match (&self.concept.version, training) {
            (Some(_), _) => ConceptStatus::Ready,
            (None, Some(TrainingStatus::Failed)) => ConceptStatus::Failed,
            (None, Some(TrainingStatus::Cancelled)) => ConceptStatus::Cancelled,
            (None, _) => ConceptStatus::Training,
        }
    }
}

/// Names that routes use.
const RESERVED: [&str; 1] = ["import"];

fn check_name(name: Option<String>) -> Result<String, Error> {
    let name = name.ok_or_else(|| Error::field("missing_parameter", "name", "is missing"))?;
    match is_slug(&name) {
        true if RESERVED.contains(&name.as_str()) => Err(Error::field(
            "invalid_value",
            "name",
            format!("is `{name}`, which is reserved"),
        )),
        true => Ok(name),
        false => Err(Error::field(
            "invalid_value",
            "name",
            "must be 1 to 63 of a-z, 0-9 and -, the first not a hyphen",
        )),
    }
}

fn check_priority(priority: Option<i32>) -> Result<i32, Error> {
    match priority.unwrap_or(0) {
        good @ 0..=PRIORITY_LIMIT => Ok(good),
        other => {
            let problem = format!("is {other}; expected 0 to {PRIORITY_LIMIT}");
            Err(Error::field("invalid_value", "priority", problem).limit(PRIORITY_LIMIT.unsigned_abs().into()))
        }
    }
}

impl Service {
    /// Checks a registration, stores its images, and queues its training. A refused one stores nothing.
    ///
    /// # Errors
    /// The first value that cannot be used; a name that is taken.
    pub async fn register(&self, caller: &Caller, mut registration: Registration) -> Result<Registered, Error> {
        let images = std::mem::take(&mut registration.images);
        let (mut new, spec) = self.check(registration)?;
        let count = images.len();
        if count == 0 || count > self.limits.images {
            return Err(Error::field(
                "invalid_value",
                "images",
                format!("has {count} images; expected 1 to {}", self.limits.images),
            )
            .limit(self.limits.images as u64));
        }
        let uploads: Vec<String> = images.iter().map(|upload| upload.hash().to_owned()).collect();
        if let Some(taken) = self.registry.concept(caller.tenant, &new.name).await? {
            return Err(self.name_taken(&taken, &uploads, &spec).await);
        }
        let mut addition = Usage {
            concepts: 1,
            trainings: 1,
            bytes: 1,
        };
        // Checked before the images are decoded and stored, and again when the concept is added: no lock is held in
        // between.
        new.quotas = self.check_room(caller, addition).await?;
        self.check_queue(caller).await?;
        new.uploads = uploads;
        let mut stored = self.registry.begin_storing();
        for (index, upload) in images.into_iter().enumerate() {
            let added = async {
                let cleaned = self.clean(caller, upload, index).await?;
                new.bytes += cleaned.png.len() as u64;
                addition.bytes = new.bytes;
                new.quotas.check(self.registry.usage(caller.tenant).await?, addition)?;
                self.registry.store_more(&mut stored, cleaned.png.clone()).await?;
                Ok::<_, Error>(())
            };
            if let Err(error) = added.await {
                self.registry.settle(stored, false).await;
                return Err(error);
            }
        }
        new.images = stored.hashes().to_vec();
        let input = input_fingerprint(&new.images, &spec)?;
        let added = self.registry.add_concept(caller.tenant, &new, &spec).await;
        // If another request took the name or the last place in the meantime, this one's images are removed.
        self.registry.settle(stored, added.is_ok()).await;
        let (concept, training) = added?;
        self.wake.now();
        let duplicate_of = self.registry.trained_alike(caller.tenant, &input, concept.id).await?;
        let training = Some(training);
        Ok(Registered {
            view: ConceptView { concept, training },
            duplicate_of,
        })
    }

    /// Checks everything of a registration but its images.
    fn check(&self, registration: Registration) -> Result<(NewConcept, TrainingSpec), Error> {
        let name = check_name(registration.name)?;
        let kind = registration
            .kind
            .ok_or_else(|| Error::field("missing_parameter", "kind", "is missing; expected `subject` or `style`"))?;
        let kind: ConceptKind = kind
            .parse()
            .map_err(|problem: String| Error::field("invalid_value", "kind", problem))?;
        let class = registration.class.map(|class| class.trim().to_owned());
        let info = self.executor.info();
        let mut spec = TrainingSpec::preset(info.preset, kind, &name, class.as_deref(), info.layers);
        let method = registration
            .method
            .map(|method| method.parse::<TokenMethod>())
            .transpose();
        let settings = TrainingSettings {
            method: method.map_err(|problem| Error::field("invalid_value", "method", problem))?,
            captions: Some(registration.captions),
            steps: registration.steps,
            layers: registration.layers,
            learning_rate: registration.learning_rate,
            text_tokens: registration.text_tokens,
            image_tokens: registration.image_tokens,
            seed: registration.seed,
        };
        settings.apply(&mut spec);
        spec.check(info.layers)?;
        let new = NewConcept {
            class_noun: spec.class_noun.clone(),
            description: check_description(registration.description)?,
            metadata: registration
                .metadata
                .map(read_metadata)
                .transpose()?
                .unwrap_or_default(),
            webhook_url: self.webhook_url(registration.webhook_url)?,
            priority: check_priority(registration.priority)?,
            ..NewConcept::new(name, kind)
        };
        Ok((new, spec))
    }

    /// The conflict with a concept of the same name. Detects without decoding an image whether the registration is
    /// identical.
    async fn name_taken(&self, taken: &Concept, uploads: &[String], spec: &TrainingSpec) -> Error {
        let conflict = Error::from(RegistryError::NameTaken(taken.name.clone()));
        let same = async {
            if !self.registry.was_uploaded_as(taken.id, uploads).await? {
                return Ok(false);
            }
            let input = input_fingerprint(&taken.images, spec)?;
            self.registry.is_trained_from(taken.id, &input).await
        };
        match same.await {
            Ok(false) => conflict,
            Ok(true) => Error {
                message: format!(
                    "`name` is `{0}`: `{0}` is trained already from these images with these settings, so there is nothing to do",
                    taken.name
                ),
                ..conflict
            },
            Err(error) => error.into(),
        }
    }

    /// A page of the concepts of the caller's tenant, newest first.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn concepts(
        &self,
        caller: &Caller,
        filter: ConceptFilter,
        page: Page<ConceptId>,
    ) -> Result<Listed<ConceptView>, Error> {
        let Listed { rows, has_more } = self.registry.concepts_page(caller.tenant, filter, page).await?;
        let ids: Vec<ConceptId> = rows.iter().map(|concept| concept.id).collect();
        let mut trainings = self.registry.latest_trainings(caller.tenant, &ids).await?;
        let rows = rows
            .into_iter()
            .map(|concept| {
                let at = trainings.iter().position(|training| training.concept_id == concept.id);
                let training = at.map(|at| trainings.swap_remove(at));
                ConceptView { concept, training }
            })
            .collect();
        Ok(Listed { rows, has_more })
    }

    /// Every concept of the caller's tenant that is ready, oldest first.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn ready_concepts(&self, caller: &Caller) -> Result<Vec<Concept>, Error> {
        let mut concepts = self.registry.concepts(caller.tenant).await?;
        concepts.retain(|concept| concept.version.is_some());
        Ok(concepts)
    }

    pub(super) async fn find_concept(&self, caller: &Caller, name: &str) -> Result<Concept, Error> {
        let found = self.registry.concept(caller.tenant, name).await?;
        found.ok_or_else(|| no_concept(name))
    }

    /// A concept by its name or identifier.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn concept(&self, caller: &Caller, name: &str) -> Result<ConceptView, Error> {
        let concept = self.find_concept(caller, name).await?;
        let training = self.registry.latest_training(caller.tenant, concept.id).await?;
        Ok(ConceptView { concept, training })
    }

    /// Renames or describes a concept, or puts another version to use.
    ///
    /// # Errors
    /// When there is no such concept or version, a value cannot be used, or the name is taken.
    pub async fn change_concept(&self, caller: &Caller, name: &str, change: Change) -> Result<ConceptView, Error> {
        let change = ConceptChange {
            name: change.name.map(|name| check_name(Some(name))).transpose()?,
            description: change.description.map(check_description).transpose()?,
            metadata: change.metadata.map(read_metadata).transpose()?,
            version: change.version,
        };
        let concept = self.find_concept(caller, name).await?;
        let changed = self.registry.change_concept(concept.id, &change).await?;
        let concept = changed.ok_or_else(|| no_concept(name))?;
        let training = self.registry.latest_training(caller.tenant, concept.id).await?;
        Ok(ConceptView { concept, training })
    }

    /// A page of a concept's versions, newest first.
    ///
    /// # Errors
    /// When there is no such concept, or the registry fails.
    pub async fn versions(&self, caller: &Caller, name: &str, page: Page<u32>) -> Result<Listed<Version>, Error> {
        let concept = self.find_concept(caller, name).await?;
        Ok(self.registry.versions(concept.id, page).await?)
    }

    /// A reference image of a concept, as PNG.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn reference_image(&self, caller: &Caller, name: &str, index: &str) -> Result<Bytes, Error> {
        let concept = self.find_concept(caller, name).await?;
        let blob = index.parse().ok().and_then(|index: usize| concept.images.get(index));
        let blob = blob.ok_or_else(|| {
            let count = concept.images.len();
            let message = format!("The concept has no image `{index}`; it has {count}, counted from 0.");
            Error::new(ErrorKind::NotFound, "image_not_found", message)
        })?;
        Ok(self.registry.blobs.get(blob).await?)
    }

    /// Deletes a concept with its images, versions, trainings and previews. A running training ends; a generation that
    /// has begun continues with the tensors that it has loaded.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn delete_concept(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let deleted = self.registry.delete_concept(caller.tenant, name).await?;
        self.wake.now();
        if deleted { Ok(()) } else { Err(no_concept(name)) }
    }

    /// A concept's file, of the version in use or another, and that version's hash.
    ///
    /// # Errors
    /// When there is no such concept or version, or it is not trained.
    pub async fn concept_file(
        &self,
        caller: &Caller,
        name: &str,
        version: Option<u32>,
    ) -> Result<(String, Bytes), Error> {
        let view = self.concept(caller, name).await?;
        let hash = match version {
            None => view.concept.version.clone().ok_or_else(|| not_ready(&view))?,
            Some(number) => {
                let found = self.registry.version(view.concept.id, number).await?;
                found.ok_or(RegistryError::NoVersion(number))?.hash
            }
        };
        let bytes = self.registry.blobs.get(&hash).await?;
        Ok((hash, bytes))
    }

    /// Imports a concept file, under the name in its header or another.
    ///
    /// # Errors
    /// When the file is refused, or the name is taken.
    pub async fn import_concept(
        &self,
        caller: &Caller,
        bytes: Bytes,
        name: Option<String>,
    ) -> Result<ConceptView, Error> {
        let file = self.executor.info().read_concept(&bytes).map_err(|error| {
            Error::new(
                ErrorKind::Invalid,
                "invalid_concept_file",
                format!("The concept file is refused: {error}."),
            )
        })?;
        let name = check_name(Some(name.unwrap_or_else(|| file.header.name.clone())))?;
        let addition = Usage {
            concepts: 1,
            trainings: 0,
            bytes: bytes.len() as u64,
        };
        let new = NewConcept {
            class_noun: file.header.class_noun,
            bytes: addition.bytes,
            quotas: self.check_room(caller, addition).await?,
            ..NewConcept::new(name, file.header.kind)
        };
        let tokens = ConceptTokens::from(&file.tensors);
        let stored = self.registry.store(vec![bytes]).await?;
        let added = self
            .registry
            .add_ready_concept(caller.tenant, &new, (stored.first(), tokens))
            .await;
        self.registry.settle(stored, added.is_ok()).await;
        let concept = added?;
        Ok(ConceptView {
            concept,
            training: None,
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
        ConceptStatus::Training => format!(
            "The concept `{}` is still in training{training}; poll it and try again.",
            view.concept.name
        ),
        status => format!(
            "The concept `{}` cannot be used: its training was not successful ({}){training}.",
            view.concept.name,
            status.as_str()
        ),
    };
    Error::new(ErrorKind::Conflict, "concept_not_ready", sentence)
}
