//! Trainings as JSON.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::registry::{Training, TrainingStatus};
use coar_core::training::{StepLosses, TrainingSpec};

/// How a training is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = TrainingStatus)]
pub(in crate::api) enum StatusName {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl From<TrainingStatus> for StatusName {
    fn from(status: TrainingStatus) -> Self {
        match status {
            TrainingStatus::Queued => Self::Queued,
            TrainingStatus::Running => Self::Running,
            TrainingStatus::Succeeded => Self::Succeeded,
            TrainingStatus::Failed => Self::Failed,
            TrainingStatus::Cancelled => Self::Cancelled,
        }
    }
}

/// How far a training is.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = TrainingProgress)]
pub(in crate::api) struct ProgressObject {
    #[schema(example = 24)]
    pub step: u32,
    #[schema(example = 60)]
    pub total_steps: u32,
    /// Of that step; null before the first.
    #[schema(example = 3.87)]
    pub loss: Option<f64>,
    /// Over the last steps of the present attempt.
    #[schema(example = 2.1)]
    pub steps_per_second: Option<f64>,
    /// At that rate. Null while it is not known: before the second step of an attempt (start words are chosen, class
    /// images drawn), and when it does not run.
    #[schema(example = 18)]
    pub eta_seconds: Option<u64>,
}

impl From<&Training> for ProgressObject {
    fn from(training: &Training) -> Self {
        let rate = training.steps_per_second.filter(|&rate| rate > 0.0);
        let rate = rate.filter(|_| training.status == TrainingStatus::Running);
        let left = f64::from(training.total_steps.saturating_sub(training.step));
        Self {
            step: training.step,
            total_steps: training.total_steps,
            loss: training.loss,
            steps_per_second: rate,
            eta_seconds: rate.map(|rate| (left / rate).ceil() as u64),
        }
    }
}

/// An image that a training drew on its way: always of the same prompt and seed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TrainingPreview)]
pub(in crate::api) struct PreviewObject {
    /// The step after which it was drawn.
    #[schema(example = 15)]
    pub step: u32,
    /// Of a PNG; needs the key like every route.
    #[schema(example = "/v1/trainings/training_01990000000070008000000000000000/previews/15")]
    pub url: String,
}

impl PreviewObject {
    pub(super) fn of(training: &Training, step: u32) -> Self {
        Self {
            step,
            url: format!("/v1/trainings/{}/previews/{step}", training.id),
        }
    }
}

/// Why a training failed.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = TrainingError)]
pub(in crate::api) struct FaultObject {
    #[schema(example = "training_failed")]
    code: String,
    message: String,
    /// The setting that is to blame.
    field: Option<String>,
}

/// A training of a concept.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Training)]
pub(in crate::api) struct TrainingObject {
    #[schema(example = "training_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "training")]
    object: &'static str,
    /// The concept's name at present.
    #[schema(example = "rex")]
    concept: String,
    #[schema(example = "concept_01990000000070008000000000000000")]
    concept_id: String,
    status: StatusName,
    /// Number of the version that it made; null before.
    #[schema(example = 1)]
    version: Option<u32>,
    progress: ProgressObject,
    previews: Vec<PreviewObject>,
    /// How often it was begun; beginning anew after a failure counts, going on after a stop of the server does not.
    #[schema(example = 1)]
    attempt: u32,
    /// Where it would go on if the server failed now.
    checkpoint_step: Option<u32>,
    /// Where the present attempt began.
    resumed_from_step: u32,
    error: Option<FaultObject>,
    webhook_url: Option<String>,
    /// Among those of the same tenant that wait, the higher one comes first.
    #[schema(example = 0)]
    priority: i32,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds.
    started_at: Option<i64>,
    /// Unix seconds.
    finished_at: Option<i64>,
    /// Every setting, as `docs/reference/concept-format.md` describes them.
    #[schema(value_type = Object)]
    hyper_parameters: TrainingSpec,
}

impl From<&Training> for TrainingObject {
    fn from(training: &Training) -> Self {
        let seconds = |ms: i64| ms / 1000;
        let fault = training
            .error
            .clone()
            .and_then(|error| serde_json::from_value(error).ok());
        Self {
            id: training.id.to_string(),
            object: "training",
            concept: training.concept.clone(),
            concept_id: training.concept_id.to_string(),
            status: training.status.into(),
            version: training.version,
            progress: training.into(),
            previews: training
                .previews
                .iter()
                .map(|&step| PreviewObject::of(training, step))
                .collect(),
            attempt: training.attempt,
            checkpoint_step: training.checkpoint_step,
            resumed_from_step: training.resumed_from_step,
            error: fault,
            webhook_url: training.webhook_url.clone(),
            priority: training.priority,
            created_at: seconds(training.created_at),
            started_at: training.started_at.map(seconds),
            finished_at: training.finished_at.map(seconds),
            hyper_parameters: training.spec.clone(),
        }
    }
}

/// Losses of one step; terms that are switched off are null.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TrainingLosses)]
pub(in crate::api) struct LossesObject {
    #[schema(example = 1)]
    step: u32,
    /// What is minimised.
    #[schema(example = 4.12)]
    total: f32,
    #[schema(example = 4.12)]
    next_token: f32,
    prior: Option<f32>,
    regularisation: Option<f32>,
}

impl From<&StepLosses> for LossesObject {
    fn from(losses: &StepLosses) -> Self {
        Self {
            step: losses.step,
            total: losses.total,
            next_token: losses.next_token,
            prior: losses.prior,
            regularisation: losses.regularisation,
        }
    }
}

/// A training with its loss curve.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::api) struct TrainingWithLosses {
    #[serde(flatten)]
    pub training: TrainingObject,
    /// In steps' order, up to a few seconds ago; of long trainings about 500 points.
    pub losses: Vec<LossesObject>,
}
