//! `/v1/trainings`

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Read, Train};
use super::concepts::{object::File, png, word};
use super::idempotency::{IdempotencyHeader, Once};
use super::openapi::{ErrorBody, List, ServerEvent};
use super::pagination::{PageQuery, Paged, invalid_query};
use super::{ApiError, AppState, sse};
use crate::service::TrainingQuery;
use coar_core::ids::TrainingId;
use object::{TrainingObject, TrainingWithLosses};

mod events;
pub(super) mod object;
mod watch;

pub(super) use watch::Followed;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(cancel))
        .routes(routes!(retry))
        .routes(routes!(follow))
        .routes(routes!(preview))
}

/// Filters for trainings.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Name or id of a concept.
    #[param(example = "rex")]
    concept: Option<String>,
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[param(value_type = Option<object::StatusName>)]
    status: Option<String>,
}

/// List trainings
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/trainings", tag = "Trainings", operation_id = "listTrainings",
    params(PageQuery, ListQuery),
    responses(
        (status = 200, description = "Trainings", body = List<TrainingObject>),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
    ),
)]
async fn list(
    State(state): State<AppState>,
    Read(caller): Read,
    Paged(page): Paged<TrainingId>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<List<TrainingObject>>, ApiError> {
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let query = TrainingQuery {
        status: word("status", query.status.as_ref())?,
        concept: query.concept,
    };
    let listed = state.service()?.trainings(&caller, query, page).await?;
    Ok(Json(List::of(&listed, |training| training.into())))
}

/// Show a training
#[utoipa::path(
    get, path = "/v1/trainings/{id}", tag = "Trainings", operation_id = "showTraining",
    params(("id" = String, Path, description = "The training's id")),
    responses(
        (status = 200, description = "The training with its loss curve", body = TrainingWithLosses),
        (status = 404, description = "`training_not_found`", body = ErrorBody),
    ),
)]
async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(id): Path<String>,
) -> Result<Json<TrainingWithLosses>, ApiError> {
    let service = state.service()?;
    let training = service.training(&caller, &id).await?;
    let losses = service.losses(&caller, &training).await?;
    Ok(Json(TrainingWithLosses {
        training: (&training).into(),
        losses: losses.iter().map(Into::into).collect(),
    }))
}

/// Cancel a training
///
/// It ends within a step. Its saved state is deleted; its previews are kept. Cancelling it again has no effect.
#[utoipa::path(
    post, path = "/v1/trainings/{id}/cancel", tag = "Trainings", operation_id = "cancelTraining",
    params(("id" = String, Path, description = "The training's id")),
    responses(
        (status = 200, description = "The training, cancelled", body = TrainingObject),
        (status = 404, description = "`training_not_found`", body = ErrorBody),
        (status = 409, description = "`training_ended`: it has succeeded or failed", body = ErrorBody),
    ),
)]
async fn cancel(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(id): Path<String>,
) -> Result<Json<TrainingObject>, ApiError> {
    Ok(Json((&state.service()?.cancel_training(&caller, &id).await?).into()))
}

/// Retry a training
///
/// Requeues a training that failed or was cancelled. It resumes from its saved state if it has one, otherwise it starts
/// from the beginning.
#[utoipa::path(
    post, path = "/v1/trainings/{id}/retry", tag = "Trainings", operation_id = "retryTraining",
    params(("id" = String, Path, description = "The training's id"), IdempotencyHeader),
    responses(
        (status = 202, description = "The training, queued", body = TrainingObject,
         headers(("location" = String, description = "The training's address"))),
        (status = 404, description = "`training_not_found`", body = ErrorBody),
        (status = 409, description = "`training_not_failed`, `training_in_progress`", body = ErrorBody),
        (status = 429, description = "`quota_exceeded`, `overloaded`", body = ErrorBody),
    ),
)]
async fn retry(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(id): Path<String>,
    once: Once,
) -> Result<Response, ApiError> {
    let service = state.service()?.clone();
    let work = async move {
        let training = service.retry_training(&caller, &id).await?;
        Ok(accepted(&training))
    };
    // The request has no body.
    once.run(&state, &caller, "", work).await
}

/// The response of a route that queues a training.
pub(super) fn accepted(training: &crate::registry::Training) -> Response {
    let location = [(header::LOCATION, format!("/v1/trainings/{}", training.id))];
    (StatusCode::ACCEPTED, location, Json(TrainingObject::from(training))).into_response()
}

/// Follow a training
///
/// Server-sent events: the current state first, then changes. `progress` has `status`, `step`, `total_steps`, `loss`,
/// `steps_per_second` and `eta_seconds`; `preview` has `step` and `url`; `ended` has the training and is the last
/// event. A comment is sent every 10 seconds if there is no event. `Last-Event-ID` is not needed: a client that
/// reconnects gets the current state. Every preview that is stored when the training ends is sent before `ended`; a
/// later one appears only in the training's `previews`. If the server stops or the training is deleted, the stream ends
/// without `ended`.
#[utoipa::path(
    get, path = "/v1/trainings/{id}/events", tag = "Trainings", operation_id = "followTraining",
    params(
        ("id" = String, Path, description = "The training's id"),
        ("Last-Event-ID" = Option<String>, Header, description = "Accepted and ignored"),
    ),
    responses(
        (status = 200, description = "Events", body = ServerEvent, content_type = "text/event-stream",
         example = "event: progress\nid: 24\ndata: {\"status\":\"running\",\"step\":24,\"total_steps\":60,\"loss\":3.87,\
                    \"steps_per_second\":2.1,\"eta_seconds\":18}\n\n"),
        (status = 429, description = "`too_many_streams`", body = ErrorBody),
        (status = 404, description = "`training_not_found`", body = ErrorBody),
    ),
)]
async fn follow(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let training = service.training(&caller, &id).await?;
    let place = service.stream_place(&caller).await?;
    Ok(sse::stream(sse::holding(
        events::follow(&state, caller, training),
        place,
    )))
}

/// Show a training's preview
///
/// An image that was generated after this step with the concept at that time. The prompt and the seed are always the
/// same.
#[utoipa::path(
    get, path = "/v1/trainings/{id}/previews/{step}", tag = "Trainings", operation_id = "showPreview",
    params(
        ("id" = String, Path, description = "The training's id"),
        ("step" = u32, Path, description = "One of the training's `previews`", example = 15),
    ),
    responses(
        (status = 200, description = "The image", body = File, content_type = "image/png"),
        (status = 404, description = "`preview_not_found`", body = ErrorBody),
    ),
)]
async fn preview(
    State(state): State<AppState>,
    Read(caller): Read,
    Path((id, step)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    Ok(png(state.service()?.preview(&caller, &id, &step).await?))
}
