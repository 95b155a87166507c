//! `/v1/trainings`

use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::auth::{Read, Train};
use super::{ApiError, AppState};
use crate::registry::{Training, TrainingStatus};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/v1/trainings/{id}", get(show))
        .route("/v1/trainings/{id}/cancel", post(cancel))
}

/// A training as JSON.
pub(super) fn training_json(training: &Training) -> Value {
    let left = f64::from(training.total_steps.saturating_sub(training.step));
    let eta = match (training.status, training.steps_per_second) {
        (TrainingStatus::Running, Some(rate)) if rate > 0.0 => Some((left / rate).ceil()),
        _ => None,
    };
    json!({
        "id": training.id.to_string(),
        "object": "training",
        "concept_id": training.concept_id.to_string(),
        "status": training.status,
        "progress": {
            "step": training.step,
            "total_steps": training.total_steps,
            "loss": training.loss,
            "eta_seconds": eta,
        },
        "attempt": training.attempt,
        "checkpoint_step": training.checkpoint_step,
        "resumed_from_step": training.resumed_from_step,
        "error": training.error,
        "created_at": training.created_at / 1000,
        "started_at": training.started_at.map(|at| at / 1000),
        "finished_at": training.finished_at.map(|at| at / 1000),
        "hyper_parameters": training.spec,
    })
}

async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let training = state.service()?.training(&caller, &id).await?;
    let mut body = training_json(&training);
    // The loss curve is long: only this route tells it.
    body["report"] = training.report.unwrap_or(Value::Null);
    Ok(Json(body))
}

async fn cancel(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(training_json(
        &state.service()?.cancel_training(&caller, &id).await?,
    )))
}
