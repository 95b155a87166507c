//! Trainings of concepts: queue, list, cancel, retry, read.

use bytes::Bytes;

use super::concepts::no_concept;
use super::{Caller, Service};
use crate::registry::{
    Listed, NewTraining, Page, Queue, Training, TrainingFilter, TrainingStatus, Usage, input_fingerprint,
};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::TrainingId;
use coar_core::training::{StepLosses, TokenMethod, TrainingSpec};

/// Settings of a training; `None` keeps the default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainingSettings {
    /// Applied before the other settings, with the defaults of the method.
    pub method: Option<TokenMethod>,
    pub captions: Option<Vec<String>>,
    pub steps: Option<u32>,
    pub layers: Option<u32>,
    pub learning_rate: Option<f64>,
    pub text_tokens: Option<u32>,
    pub image_tokens: Option<u32>,
    pub seed: Option<u64>,
}

impl TrainingSettings {
    pub(super) fn apply(self, spec: &mut TrainingSpec) {
        fn set<T>(to: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *to = value;
            }
        }
        if let Some(method) = self.method {
            *spec = spec.clone().with_method(method);
        }
        set(&mut spec.captions, self.captions);
        set(&mut spec.steps, self.steps);
        set(&mut spec.layers, self.layers);
        set(&mut spec.learning_rate, self.learning_rate);
        set(&mut spec.text_tokens, self.text_tokens);
        set(&mut spec.image_tokens, self.image_tokens);
        set(&mut spec.seed, self.seed);
    }
}

/// How a training is queued.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queued {
    /// Notified when it ends.
    pub webhook_url: Option<String>,
    /// 0 to [`PRIORITY_LIMIT`](super::PRIORITY_LIMIT).
    pub priority: i32,
}

/// A filter for the list of trainings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainingQuery {
    /// Name or identifier.
    pub concept: Option<String>,
    pub status: Option<TrainingStatus>,
}

/// What a training adds to its tenant's usage.
const ONE: Usage = Usage {
    concepts: 0,
    trainings: 1,
    bytes: 0,
};

fn no_training(id: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        "training_not_found",
        format!("There is no training `{id}`."),
    )
}

impl Service {
    /// Refuses if too many trainings are queued.
    pub(super) async fn check_queue(&self, caller: &Caller) -> Result<(), Error> {
        Ok(self.registry.check_queue(Queue::Trainings, caller.tenant).await?)
    }

    /// Queues another training of a concept from its reference images, with the settings of its newest training except
    /// for those given. The version in use stays active until the new one is ready.
    ///
    /// # Errors
    /// When there is no such concept, it has no images, it is in training, or a setting cannot be used.
    pub async fn retrain(
        &self,
        caller: &Caller,
        name: &str,
        settings: TrainingSettings,
        how: Queued,
    ) -> Result<Training, Error> {
        let concept = self.find_concept(caller, name).await?;
        if concept.images.is_empty() {
            let message = format!(
                "The concept `{}` was imported without reference images; it cannot be trained here.",
                concept.name
            );
            return Err(Error::new(ErrorKind::Conflict, "no_reference_images", message));
        }
        let info = self.executor.info();
        let latest = self.registry.latest_training(caller.tenant, concept.id).await?;
        let class = concept.class_noun.as_deref();
        let preset = || TrainingSpec::preset(info.preset, concept.kind, &concept.name, class, info.layers);
        let mut spec = latest.map_or_else(preset, |training| training.spec);
        spec.name.clone_from(&concept.name);
        settings.apply(&mut spec);
        spec.check(info.layers)?;
        if spec.captions.len() > self.limits.images {
            let limit = self.limits.images;
            let problem = format!("has {} texts; the limit is {limit}", spec.captions.len());
            return Err(Error::field("invalid_value", "captions", problem).limit(limit as u64));
        }
        let webhook_url = self.webhook_url(how.webhook_url)?;
        let quotas = self.check_room(caller, ONE).await?;
        self.check_queue(caller).await?;
        let new = NewTraining {
            spec: &spec,
            input: &input_fingerprint(&concept.images, &spec)?,
            webhook_url: webhook_url.as_deref(),
            priority: how.priority,
            quotas,
        };
        let queued = self.registry.add_training(&concept, new).await?;
        self.wake.now();
        queued.ok_or_else(|| no_concept(name))
    }

    /// A page of the trainings of the caller's tenant, newest first.
    ///
    /// # Errors
    /// When there is no such concept, or the registry fails.
    pub async fn trainings(
        &self,
        caller: &Caller,
        query: TrainingQuery,
        page: Page<TrainingId>,
    ) -> Result<Listed<Training>, Error> {
        let concept = match query.concept {
            None => None,
            Some(name) => {
                let found = self.find_concept(caller, &name).await;
                Some(found.map_err(|error| Error {
                    field: Some("concept".into()),
                    ..error
                })?)
            }
        };
        let filter = TrainingFilter {
            concept: concept.map(|concept| concept.id),
            status: query.status,
        };
        Ok(self.registry.trainings(caller.tenant, filter, page).await?)
    }

    /// A training by its identifier.
    ///
    /// # Errors
    /// When there is none, or the registry fails.
    pub async fn training(&self, caller: &Caller, id: &str) -> Result<Training, Error> {
        let known: TrainingId = id.parse().map_err(|_| no_training(id))?;
        let found = self.registry.training(caller.tenant, known).await?;
        found.ok_or_else(|| no_training(id))
    }

    /// The loss curve of a training, thinned if it is long.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn losses(&self, caller: &Caller, training: &Training) -> Result<Vec<StepLosses>, Error> {
        Ok(self.registry.losses(caller.tenant, training.id).await?)
    }

    /// The preview image of a training after that step, as PNG.
    ///
    /// # Errors
    /// When there is no such training or image.
    pub async fn preview(&self, caller: &Caller, id: &str, step: &str) -> Result<Bytes, Error> {
        let known: TrainingId = id.parse().map_err(|_| no_training(id))?;
        let blob = match step.parse() {
            Ok(step) => self.registry.preview(caller.tenant, known, step).await?,
            Err(_) => None,
        };
        let blob = blob.ok_or_else(|| {
            let message = format!("There is no image of the training `{id}` at step `{step}`.");
            Error::new(ErrorKind::NotFound, "preview_not_found", message)
        })?;
        Ok(self.registry.blobs.get(&blob).await?)
    }

    /// Cancels a training. One that has ended is not changed, which is a conflict.
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
        after.ok_or_else(|| no_training(id))
    }

    /// Queues a failed or cancelled training again.
    ///
    /// # Errors
    /// When there is none, it is queued, running or has succeeded, or another of its concept is queued or running.
    pub async fn retry_training(&self, caller: &Caller, id: &str) -> Result<Training, Error> {
        let before = self.training(caller, id).await?;
        if !matches!(before.status, TrainingStatus::Failed | TrainingStatus::Cancelled) {
            let status = before.status.as_str();
            let message = format!("The training is {status}; only one that failed or was cancelled is tried again.");
            return Err(Error::new(ErrorKind::Conflict, "training_not_failed", message));
        }
        let quotas = self.check_room(caller, ONE).await?;
        self.check_queue(caller).await?;
        let after = self.registry.retry_training(caller.tenant, before.id, quotas).await?;
        self.wake.now();
        after.ok_or_else(|| no_training(id))
    }
}
