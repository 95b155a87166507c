//! `/v1/generations`: images that are stored. Callers wait for them, stream them, or fetch them later.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Generate, Read};
use super::drawing::{self, DrawRefusals};
use super::extract::Fields;
use super::idempotency::{Answers, IdempotencyHeader, OfGeneration, Once};
use super::openapi::{ErrorBody, List, ServerEvent};
use super::pagination::{PageQuery, invalid_query};
use super::{ApiError, AppState};
use crate::registry::GenerationStatus;
use crate::service::{GenerationInput, GenerationView, Service};
use coar_core::error::Error;
use coar_core::ids::GenerationId;
use mode::{LONGEST_WAIT, Mode, PreferHeader, mode};
use object::{AnswerObject, CreateGeneration, GenerationObject, object, plan_object};
use stream::streamed;

pub(super) mod mode;
pub(super) mod object;
mod stream;

pub(super) fn routes(state: &AppState) -> OpenApiRouter<AppState> {
    let limited = OpenApiRouter::new()
        .routes(routes!(create))
        .layer(from_fn_with_state(state.clone(), super::quota::rate_headers));
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show, delete))
        .routes(routes!(cancel))
        .merge(limited)
}

pub(super) fn read(mut fields: Fields) -> Result<GenerationInput, Error> {
    let input = GenerationInput {
        draw: drawing::input(&mut fields)?,
        metadata: fields.take("metadata"),
        webhook_url: fields.text("webhook_url")?,
        priority: drawing::priority(&mut fields)?,
    };
    fields.finish()?;
    Ok(input)
}

/// The body of a request for a generation.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct CreateQuery {
    /// `true`: only check the request, resolve its settings and count its tokens.
    #[param(value_type = Option<bool>)]
    validate_only: Option<String>,
}

/// Generate and store images
///
/// Waits for the end, for at most 60 seconds unless `Prefer` says otherwise. With `Accept: text/event-stream` it sends
/// events: `queued`, `progress`, `partial_image`, `image`, and last `completed`, `failed` or `cancelled`. Disconnecting
/// while waiting or listening cancels the generation. A generation that was answered with 202 continues, also after a
/// restart of the server.
#[utoipa::path(
    post, path = "/v1/generations", tag = "Generations", operation_id = "createGeneration",
    params(CreateQuery, PreferHeader, IdempotencyHeader),
    request_body = CreateGeneration,
    responses(
        (status = 200, description = "It has ended; or events; or with `validate_only` the checked request", content(
            (AnswerObject = "application/json"), (ServerEvent = "text/event-stream"),
        )),
        (status = 202, description = "It continues; poll the address in `Location`", body = GenerationObject),
        DrawRefusals,
    ),
)]
async fn create(
    State(state): State<AppState>,
    Generate(caller): Generate,
    Query(query): Query<CreateQuery>,
    headers: HeaderMap,
    once: Once,
    fields: Fields,
) -> Result<Response, ApiError> {
    let validate_only = match query.validate_only.as_deref() {
        None | Some("false") => false,
        Some("true" | "") => true,
        Some(other) => {
            let problem = format!("is `{other}`; expected `true` or `false`");
            return Err(Error::field("invalid_value", "validate_only", problem).into());
        }
    };
    let content = fields.content();
    let base = drawing::base(&state, &headers);
    let mode = mode(&headers);
    let work = {
        let state = state.clone();
        async move {
            let service = state.service()?;
            let plan = service.plan_generation(&caller, read(fields)?).await?;
            if validate_only {
                return Ok(Json(plan_object(&plan)).into_response());
            }
            let (id, mut response) = match mode {
                Mode::Async => {
                    let view = service.queue_generation(&caller, plan).await?;
                    (view.generation.id, accepted(service, &view, &base))
                }
                Mode::Wait(seconds) => {
                    let begun = service.begin_generation(&caller, plan).await?;
                    let view = service.wait_begun(&caller, begun, Duration::from_secs(seconds)).await?;
                    let response = match view.generation.status.is_final() {
                        true => Json(object(service, &view, &base)).into_response(),
                        false => accepted(service, &view, &base),
                    };
                    (view.generation.id, response)
                }
                Mode::Stream => {
                    let place = service.stream_place(&caller).await?;
                    let begun = service.begin_generation(&caller, plan).await?;
                    (begun.view.generation.id, streamed(service, caller, begun, base, place))
                }
            };
            response.extensions_mut().insert(OfGeneration(id));
            Ok(response)
        }
    };
    if validate_only {
        // Nothing is created, so there is nothing to replay.
        return work.await;
    }
    let once = once.answering(Answers::Generation);
    once.run(&state, &caller, &content, work).await
}

/// The response for a generation that continues without its caller.
pub(super) fn accepted(service: &Service, view: &GenerationView, base: &str) -> Response {
    let location = format!("/v1/generations/{}", view.generation.id);
    let mut response = (StatusCode::ACCEPTED, Json(object(service, view, base))).into_response();
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Filters for generations.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[param(value_type = Option<super::trainings::object::StatusName>, example = "succeeded")]
    status: Option<String>,
}

/// List generations
///
/// Newest first, with their images. The list includes requests to `/v1/images/generations` with `url`.
#[utoipa::path(
    get, path = "/v1/generations", tag = "Generations", operation_id = "listGenerations",
    params(PageQuery, ListQuery),
    responses((status = 200, description = "Generations", body = List<GenerationObject>)),
)]
async fn list(
    State(state): State<AppState>,
    Read(caller): Read,
    page: Result<Query<PageQuery>, axum::extract::rejection::QueryRejection>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Json<List<GenerationObject>>, ApiError> {
    let Query(page) = page.map_err(|error| invalid_query(&error))?;
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let status = match &query.status {
        None => None,
        Some(word) => Some(GenerationStatus::of_word(word).ok_or_else(|| {
            let words = GenerationStatus::ALL.map(GenerationStatus::as_str).join(", ");
            Error::field(
                "invalid_value",
                "status",
                format!("is `{word}`; expected one of {words}"),
            )
        })?),
    };
    let (service, base) = (state.service()?, drawing::base(&state, &headers));
    let listed = service
        .generations(&caller, status, page.page::<GenerationId>()?)
        .await?;
    Ok(Json(List::of(&listed, |view| object(service, view, &base))))
}

/// How long to wait.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Seconds to wait for the end of the generation, 0 to 60.
    #[param(value_type = Option<u64>, minimum = 0, maximum = 60, default = 0)]
    wait: Option<String>,
}

/// Show a generation
#[utoipa::path(
    get, path = "/v1/generations/{id}", tag = "Generations", operation_id = "showGeneration",
    params(("id" = String, Path, description = "The generation's id"), WaitQuery),
    responses(
        (status = 200, description = "The generation", body = GenerationObject),
        (status = 404, description = "`generation_not_found`", body = ErrorBody),
        (status = 429, description = "`too_many_streams`", body = ErrorBody),
    ),
)]
async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
    headers: HeaderMap,
) -> Result<Json<GenerationObject>, ApiError> {
    let wait = match query.wait.as_deref() {
        None => 0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|seconds| *seconds <= LONGEST_WAIT)
            .ok_or_else(|| {
                let problem = format!("is `{text}`; expected 0 to {LONGEST_WAIT} seconds");
                Error::field("invalid_value", "wait", problem).limit(LONGEST_WAIT)
            })?,
    };
    let service = state.service()?;
    let _place = match wait {
        0 => None,
        _ => Some(service.stream_place(&caller).await?),
    };
    let view = service.generation(&caller, &id, Duration::from_secs(wait)).await?;
    Ok(Json(object(service, &view, &drawing::base(&state, &headers))))
}

/// Cancel a generation
///
/// Frees the device at the next token. Finished images are kept.
#[utoipa::path(
    post, path = "/v1/generations/{id}/cancel", tag = "Generations", operation_id = "cancelGeneration",
    params(("id" = String, Path, description = "The generation's id")),
    responses(
        (status = 200, description = "Cancelled", body = GenerationObject),
        (status = 404, description = "`generation_not_found`", body = ErrorBody),
        (status = 409, description = "`generation_ended`", body = ErrorBody),
    ),
)]
async fn cancel(
    State(state): State<AppState>,
    Generate(caller): Generate,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<GenerationObject>, ApiError> {
    let service = state.service()?;
    let view = service.cancel_generation(&caller, &id).await?;
    Ok(Json(object(service, &view, &drawing::base(&state, &headers))))
}

/// Delete a generation
///
/// Also deletes its images. A generation that has not ended is cancelled first.
#[utoipa::path(
    delete, path = "/v1/generations/{id}", tag = "Generations", operation_id = "deleteGeneration",
    params(("id" = String, Path, description = "The generation's id")),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`generation_not_found`", body = ErrorBody),
    ),
)]
async fn delete(
    State(state): State<AppState>,
    Generate(caller): Generate,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.service()?.delete_generation(&caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}
