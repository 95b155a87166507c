//! Trainings as JSON.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::registry::{Training, TrainingStatus};
use coar_core::training::{StepLosses, TrainingSpec};

/// State of a training.
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

/// Progress of a training.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = TrainingProgress)]
pub(in crate::api) struct ProgressObject {
    #[schema(example = 24)]
    pub step: u32,
    #[schema(example = 60)]
    pub total_steps: u32,
    /// Loss of that step; null before the first step.
    #[schema(example = 3.87)]
    pub loss: Option<f64>,
    /// Speed over the last steps of the current attempt.
    #[schema(example = 2.1)]
    pub steps_per_second: Option<f64>,
    /// Remaining time at that speed. Null while it is unknown: before the second step of an attempt, while start words
    /// are chosen and class images are generated, and when the training is not running.
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

/// An image that was generated during a training, always with the same prompt and seed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TrainingPreview)]
pub(in crate::api) struct PreviewObject {
    /// The step after which it was generated.
    #[schema(example = 15)]
    pub step: u32,
    /// Address of the PNG. It needs a key, as every route does.
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
    /// The setting that caused the failure.
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
    /// The concept's current name.
    #[schema(example = "rex")]
    concept: String,
    #[schema(example = "concept_01990000000070008000000000000000")]
    concept_id: String,
    status: StatusName,
    /// Number of the version that the training made; null until then.
    #[schema(example = 1)]
    version: Option<u32>,
    progress: ProgressObject,
    previews: Vec<PreviewObject>,
    /// Number of attempts. A retry after a failure counts; resuming after the server was stopped does not.
    #[schema(example = 1)]
    attempt: u32,
    /// The step from which it would resume if the server failed now.
    checkpoint_step: Option<u32>,
    /// The step at which the current attempt began.
    resumed_from_step: u32,
    error: Option<FaultObject>,
    webhook_url: Option<String>,
    /// Among the queued trainings of the tenant, the highest priority is run first.
    #[schema(example = 0)]
    priority: i32,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds.
    started_at: Option<i64>,
    /// Unix seconds.
    finished_at: Option<i64>,
    /// All settings, as `docs/reference/concept-format.md` describes them.
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

/// Losses of one step. Disabled terms are null.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TrainingLosses)]
pub(in crate::api) struct LossesObject {
    #[schema(example = 1)]
    step: u32,
    /// The loss that is minimised.
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
    /// In the order of the steps, up to a few seconds ago. For long trainings, about 500 points.
    pub losses: Vec<LossesObject>,
}
