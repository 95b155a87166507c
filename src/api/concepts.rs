//! `/v1/concepts`

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use futures::StreamExt as _;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Read, Train};
use super::extract::{Fields, MaybeFields, media_type, unread};
use super::idempotency::{IdempotencyHeader, Once, content_of};
use super::openapi::{ErrorBody, List};
use super::pagination::{PageQuery, Paged, invalid_query};
use super::trainings::object::TrainingObject;
use super::{ApiError, AppState, multipart};
use crate::config::Config;
use crate::registry::ConceptFilter;
use crate::registry::blobs::content_hash;
use crate::service::{Change, Limits, Queued, Room, TrainingSettings};
use coar_core::concept::file::FILE_LIMIT;
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::ConceptId;
use object::{ChangeConcept, ConceptObject, File, RegisterConcept, TrainConcept, VersionObject};

pub(super) mod object;

/// Bytes of a form in addition to its images.
const FORM_EXTRA: usize = 1 << 20;

/// Bytes of a whole form.
fn form_limit(limits: &Limits) -> usize {
    limits.images * limits.image.bytes + FORM_EXTRA
}

/// The body's `Content-Length`; `limit` bytes without one.
fn declared_length(headers: &HeaderMap, limit: usize) -> usize {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|text| text.to_str().ok()?.parse().ok());
    length.unwrap_or(limit).min(limit)
}

pub(super) fn routes(config: &Config) -> OpenApiRouter<AppState> {
    let form = form_limit(&Limits::of(config));
    let registration = OpenApiRouter::new().routes(routes!(register, list));
    OpenApiRouter::new()
        .merge(registration.layer(DefaultBodyLimit::max(form)))
        .routes(routes!(import))
        .routes(routes!(show, change, delete))
        .routes(routes!(versions))
        .routes(routes!(image))
        .routes(routes!(train))
        .routes(routes!(weights))
}

/// The response of a route that creates a concept.
pub(super) fn created(status: StatusCode, concept: ConceptObject, name: &str) -> Response {
    let location = [(header::LOCATION, format!("/v1/concepts/{name}"))];
    (status, location, Json(concept)).into_response()
}

/// Register a concept
///
/// Stores the images and queues a training. The concept can be used when its `status` is `ready`.
#[utoipa::path(
    post, path = "/v1/concepts", tag = "Concepts", operation_id = "registerConcept",
    params(IdempotencyHeader),
    request_body(content = RegisterConcept, content_type = "multipart/form-data"),
    responses(
        (status = 202, description = "The concept, in training", body = ConceptObject,
         headers(("location" = String, description = "The concept's address"))),
        (status = 409, description = "`name_taken`", body = ErrorBody),
        (status = 413, description = "`image_too_large`, `body_too_large`", body = ErrorBody),
        (status = 429, description = "`quota_exceeded`, `overloaded`", body = ErrorBody),
    ),
)]
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
    let service = state.service()?.clone();
    let form_limit = form_limit(&service.limits);
    let space = service
        .upload_space(&caller, declared_length(request.headers(), form_limit) as u64)
        .await?;
    let form = Multipart::from_request(request, &state).await.map_err(|error| {
        Error::new(
            ErrorKind::Invalid,
            "invalid_multipart",
            format!("The form cannot be read: {}.", error.body_text()),
        )
    })?;
    let registration = multipart::registration(form, &service.limits, Room::Disk(&service, &space)).await?;
    // Each file keeps its share as long as it exists.
    drop(space);
    let content = content_of(&registration)?;
    let work = async move {
        let registered = service.register(&caller, registration).await?;
        let mut concept = ConceptObject::from(&registered.view);
        concept.duplicate_of = registered.duplicate_of;
        Ok(created(StatusCode::ACCEPTED, concept, &registered.view.concept.name))
    };
    once.run(&state, &caller, &content, work).await
}

/// Filters for concepts.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ConceptQuery {
    /// `subject` or `style`.
    #[param(value_type = Option<object::KindName>)]
    kind: Option<String>,
    /// `training`, `ready`, `failed` or `cancelled`.
    #[param(value_type = Option<object::StatusName>)]
    status: Option<String>,
}

/// An enumerated value of a query, parsed.
pub(super) fn word<T: std::str::FromStr<Err = String>>(
    field: &'static str,
    text: Option<&String>,
) -> Result<Option<T>, Error> {
    let parsed = text.map(|text| text.parse()).transpose();
    parsed.map_err(|problem| Error::field("invalid_value", field, problem))
}

/// List concepts
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/concepts", tag = "Concepts", operation_id = "listConcepts",
    params(PageQuery, ConceptQuery),
    responses((status = 200, description = "Concepts", body = List<ConceptObject>)),
)]
async fn list(
    State(state): State<AppState>,
    Read(caller): Read,
    Paged(page): Paged<ConceptId>,
    query: Result<Query<ConceptQuery>, QueryRejection>,
) -> Result<Json<List<ConceptObject>>, ApiError> {
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let filter = ConceptFilter {
        kind: word("kind", query.kind.as_ref())?,
        status: word("status", query.status.as_ref())?,
    };
    let listed = state.service()?.concepts(&caller, filter, page).await?;
    Ok(Json(List::of(&listed, |view| view.into())))
}

/// Show a concept
#[utoipa::path(
    get, path = "/v1/concepts/{name}", tag = "Concepts", operation_id = "showConcept",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex")),
    responses(
        (status = 200, description = "The concept", body = ConceptObject),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
    ),
)]
async fn show(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(name): Path<String>,
) -> Result<Json<ConceptObject>, ApiError> {
    Ok(Json((&state.service()?.concept(&caller, &name).await?).into()))
}

/// Change a concept
///
/// Changes its name, description, metadata or active version. Another version is used from the next request on.
#[utoipa::path(
    patch, path = "/v1/concepts/{name}", tag = "Concepts", operation_id = "changeConcept",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex")),
    request_body = ChangeConcept,
    responses(
        (status = 200, description = "The concept as it is now", body = ConceptObject),
        (status = 404, description = "`concept_not_found`, `version_not_found`", body = ErrorBody),
        (status = 409, description = "`name_taken`", body = ErrorBody),
    ),
)]
async fn change(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(name): Path<String>,
    mut fields: Fields,
) -> Result<Json<ConceptObject>, ApiError> {
    let change = Change {
        name: fields.text("name")?,
        description: fields.nullable_text("description")?,
        metadata: fields.take("metadata"),
        version: fields.whole("version")?,
    };
    fields.finish()?;
    let view = state.service()?.change_concept(&caller, &name, change).await?;
    Ok(Json((&view).into()))
}

/// Delete a concept
///
/// Also deletes its images, versions, trainings and previews. A running training ends; running generations finish.
#[utoipa::path(
    delete, path = "/v1/concepts/{name}", tag = "Concepts", operation_id = "deleteConcept",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex")),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
    ),
)]
async fn delete(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.service()?.delete_concept(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A page of versions.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
struct VersionsQuery {
    /// Maximum number of versions.
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<u32>,
    /// The last number of the previous page.
    #[param(minimum = 0)]
    #[param(value_type = Option<u64>, maximum = 4_294_967_295_u32)]
    after: Option<u32>,
}

/// List a concept's versions
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/concepts/{name}/versions", tag = "Concepts", operation_id = "listConceptVersions",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex"), VersionsQuery),
    responses(
        (status = 200, description = "Versions", body = List<VersionObject>),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
    ),
)]
async fn versions(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(name): Path<String>,
    Paged(page): Paged<u32>,
) -> Result<Json<List<VersionObject>>, ApiError> {
    let listed = state.service()?.versions(&caller, &name, page).await?;
    Ok(Json(List::of(&listed, |version| version.into())))
}

/// Show a reference image
///
/// The image as it is stored: re-encoded, without metadata.
#[utoipa::path(
    get, path = "/v1/concepts/{name}/images/{index}", tag = "Concepts", operation_id = "showReferenceImage",
    params(
        ("name" = String, Path, description = "The concept's name or id", example = "rex"),
        ("index" = u32, Path, description = "0 to the concept's `images` minus 1", example = 0),
    ),
    responses(
        (status = 200, description = "The image", body = File, content_type = "image/png"),
        (status = 404, description = "`concept_not_found`, `image_not_found`", body = ErrorBody),
    ),
)]
async fn image(
    State(state): State<AppState>,
    Read(caller): Read,
    Path((name, index)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    Ok(png(state.service()?.reference_image(&caller, &name, &index).await?))
}

/// A PNG as a response. Only its tenant may see it: shared caches must not store it.
pub(super) fn png(bytes: Bytes) -> Response {
    let headers = [(header::CONTENT_TYPE, "image/png"), (header::CACHE_CONTROL, "private")];
    (headers, bytes).into_response()
}

/// Train a concept again
///
/// Makes another version from the same images. Until it is ready, and if the training fails, the current version stays
/// active.
#[utoipa::path(
    post, path = "/v1/concepts/{name}/trainings", tag = "Concepts", operation_id = "trainConcept",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex"), IdempotencyHeader),
    request_body = Option<TrainConcept>,
    responses(
        (status = 202, description = "The training, queued", body = TrainingObject,
         headers(("location" = String, description = "The training's address"))),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
        (status = 409, description = "`training_in_progress`, `no_reference_images`", body = ErrorBody),
        (status = 429, description = "`quota_exceeded`, `overloaded`", body = ErrorBody),
    ),
)]
async fn train(
    State(state): State<AppState>,
    Train(caller): Train,
    Path(name): Path<String>,
    once: Once,
    MaybeFields(mut fields): MaybeFields,
) -> Result<Response, ApiError> {
    let content = fields.content();
    let mut number = |field| fields.whole(field);
    let settings = TrainingSettings {
        method: None,
        steps: number("steps")?,
        layers: number("layers")?,
        text_tokens: number("text_tokens")?,
        image_tokens: number("image_tokens")?,
        learning_rate: fields.number("learning_rate")?,
        seed: fields.integer("seed", 0..=u64::MAX)?,
        captions: fields.texts("captions")?,
    };
    let queued = Queued {
        webhook_url: fields.text("webhook_url")?,
        priority: super::drawing::priority(&mut fields)?,
    };
    fields.finish()?;
    let service = state.service()?.clone();
    let work = async move {
        let training = service.retrain(&caller, &name, settings, queued).await?;
        Ok(super::trainings::accepted(&training))
    };
    once.run(&state, &caller, &content, work).await
}

/// A version.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct WeightsQuery {
    /// Number of the version. Default: the active version.
    #[param(value_type = Option<u32>, minimum = 1)]
    version: Option<String>,
}

/// Download a concept
///
/// The response is a concept file in the safetensors format. It can be imported on any server with the same base model.
#[utoipa::path(
    get, path = "/v1/concepts/{name}/weights", tag = "Concepts", operation_id = "downloadConcept",
    params(("name" = String, Path, description = "The concept's name or id", example = "rex"), WeightsQuery),
    responses(
        (status = 200, description = "The file; its SHA-256 is the `etag`", body = File,
         content_type = "application/octet-stream"),
        (status = 404, description = "`concept_not_found`, `version_not_found`", body = ErrorBody),
        (status = 409, description = "`concept_not_ready`", body = ErrorBody),
    ),
)]
async fn weights(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(name): Path<String>,
    query: Result<Query<WeightsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let version = query.version.map(|text| {
        text.parse().map_err(|_| {
            Error::field(
                "invalid_value",
                "version",
                format!("is `{text}`; expected a version's number"),
            )
        })
    });
    let (hash, bytes) = state
        .service()?
        .concept_file(&caller, &name, version.transpose()?)
        .await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}.safetensors\""),
        ),
        (header::ETAG, format!("\"{hash}\"")),
    ];
    Ok((headers, bytes).into_response())
}

/// Receives an imported file. If it is too large, the rest is read as well, up to the limit for any model: a client
/// that is still sending would not read the response.
async fn concept_file(body: Body, limit: usize) -> Result<Bytes, Error> {
    let (mut pieces, mut file, mut length) = (body.into_data_stream(), BytesMut::new(), 0);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| unread(&error, limit))?;
        length += piece.len();
        if length > FILE_LIMIT {
            break;
        }
        match length <= limit {
            true => file.extend_from_slice(&piece),
            false => file = BytesMut::new(),
        }
    }
    if length > limit {
        let message = format!("The file is larger than {limit} bytes, the most that a concept of this model can have.");
        return Err(Error::new(ErrorKind::TooLarge, "body_too_large", message).limit(limit as u64));
    }
    Ok(file.freeze())
}

/// Options of an import.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ImportQuery {
    /// Name of the new concept. Default: the name in the file.
    #[param(example = "rex")]
    name: Option<String>,
}

/// Import a concept
///
/// Creates a concept from a concept file. It is ready at once and has no reference images.
#[utoipa::path(
    post, path = "/v1/concepts/import", tag = "Concepts", operation_id = "importConcept",
    params(ImportQuery, IdempotencyHeader),
    request_body(content = File, content_type = "application/octet-stream"),
    responses(
        (status = 201, description = "The concept", body = ConceptObject,
         headers(("location" = String, description = "The concept's address"))),
        (status = 400, description = "`invalid_concept_file`: damaged, or of another base model", body = ErrorBody),
        (status = 409, description = "`name_taken`", body = ErrorBody),
        (status = 413, description = "`body_too_large`", body = ErrorBody),
        (status = 429, description = "`quota_exceeded`", body = ErrorBody),
    ),
)]
async fn import(
    State(state): State<AppState>,
    Train(caller): Train,
    once: Once,
    query: Result<Query<ImportQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|error| invalid_query(&error))?;
    let service = state.service()?.clone();
    let limit = service.executor.info().concept_limit();
    // The file, and its numbers while they are checked.
    let bytes = 2 * declared_length(request.headers(), limit);
    let memory = service.upload_memory(&caller, bytes as u64).await?;
    let body = concept_file(request.into_body(), limit).await?;
    // The concept's name is in the query, and so part of the route that is compared.
    let content = content_hash(&body);
    let work = async move {
        let _memory = memory;
        let view = service.import_concept(&caller, body, query.name).await?;
        Ok(created(StatusCode::CREATED, (&view).into(), &view.concept.name))
    };
    once.run(&state, &caller, &content, work).await
}
