//! `/v1/concepts`

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::auth::{Read, Train};
use super::extract::{media_type, unread};
use super::idempotency::{Once, content_of};
use super::pagination::invalid_query;
use super::trainings::training_json;
use super::{ApiError, AppState, multipart};
use crate::concept::file::FILE_LIMIT;
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::registry::blobs::content_hash;
use crate::service::ConceptView;

/// Bytes of a form beside its pictures.
const FORM_EXTRA: usize = 1 << 20;

pub(super) fn routes(config: &Config) -> Router<AppState> {
    let limits = crate::service::Limits::of(config);
    let form = limits.pictures * limits.picture.bytes + FORM_EXTRA;
    Router::new()
        .route(
            "/v1/concepts",
            post(register).layer(DefaultBodyLimit::max(form)).get(list),
        )
        .route(
            "/v1/concepts/import",
            post(import).layer(DefaultBodyLimit::max(FILE_LIMIT)),
        )
        .route("/v1/concepts/{name}", get(show).delete(delete))
        .route("/v1/concepts/{name}/weights", get(weights))
}

/// A concept as JSON.
pub(super) fn concept_json(view: &ConceptView) -> Value {
    let concept = &view.concept;
    json!({
        "id": concept.id.to_string(),
        "object": "concept",
        "name": concept.name,
        "kind": concept.kind,
        "class": concept.class_noun,
        "status": view.status(),
        "version": concept.version,
        "images": concept.pictures.len(),
        "created_at": concept.created_at / 1000,
        "training": view.training.as_ref().map(training_json),
    })
}

async fn register(
    State(state): State<AppState>,
    Train(caller): Train,
    once: Once,
    request: Request,
) -> Result<Response, ApiError> {
    if !media_type(request.headers()).eq_ignore_ascii_case("multipart/form-data") {
        let message = "The body must be a form, sent with `Content-Type: multipart/form-data`.";
        return Err(Error::new(ErrorKind::UnsupportedMediaType, "unsupported_media_type", message).into());
    }
    let form = Multipart::from_request(request, &state).await.map_err(|error| {
        Error::new(
            ErrorKind::Invalid,
            "invalid_multipart",
            format!("The form cannot be read: {}.", error.body_text()),
        )
    })?;
    let service = state.service()?.clone();
    let registration = multipart::registration(form, &service.limits).await?;
    let content = content_of(&registration)?;
    let work = async move {
        let view = service.register(&caller, registration).await?;
        Ok(created(StatusCode::ACCEPTED, &view))
    };
    once.run(&state, &caller, &content, work).await
}

/// The answer of a route that makes a concept.
fn created(status: StatusCode, view: &ConceptView) -> Response {
    let location = format!("/v1/concepts/{}", view.concept.name);
    (status, [(header::LOCATION, location)], Json(concept_json(view))).into_response()
}

async fn list(State(state): State<AppState>, Read(caller): Read) -> Result<Json<Value>, ApiError> {
    let views = state.service()?.concepts(&caller).await?;
    Ok(Json(
        json!({"object": "list", "data": views.iter().map(concept_json).collect::<Vec<_>>()}),
    ))
}

async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(concept_json(&state.service()?.concept(&caller, &name).await?)))
}

async fn delete(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.service()?.delete_concept(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn weights(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let bytes = state.service()?.concept_file(&caller, &name).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}.safetensors\""),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, bytes).into_response())
}

#[derive(Debug, serde::Deserialize)]
struct ImportQuery {
    name: Option<String>,
}

async fn import(
    State(state): State<AppState>,
    Train(caller): Train,
    once: Once,
    query: Result<Query<ImportQuery>, axum::extract::rejection::QueryRejection>,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let body = body.map_err(|error| unread(&error, FILE_LIMIT))?;
    let service = state.service()?.clone();
    // The route that is compared has the name: it is in the query.
    let content = content_hash(&body);
    let work = async move {
        let view = service.import_concept(&caller, body, query.name).await?;
        Ok(created(StatusCode::CREATED, &view))
    };
    once.run(&state, &caller, &content, work).await
}
