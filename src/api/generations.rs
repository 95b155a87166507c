//! `/v1/generations`: pictures that are kept; waited for, streamed, or fetched later.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Generate, Read};
use super::drawing::{self, UsageObject, UsedConceptObject, event, partial};
use super::extract::Fields;
use super::idempotency::{IdempotencyHeader, Once};
use super::openapi::{ErrorBody, List, ServerEvent, metadata_schema};
use super::pagination::{PageQuery, invalid_query};
use super::{ApiError, AppState};
use crate::error::Error;
use crate::ids::GenerationId;
use crate::jobs::DrawEvent;
use crate::registry::{Generation, GenerationSettings, GenerationStatus, StoredImage};
use crate::service::{Begun, Caller, GenerationInput, GenerationView, Links, Plan, Service};

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

/// What is to be drawn. The handler reads it field by field; this is its description.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
#[schema(example = json!({"prompt": "a photo of <rex> cat on the beach", "n": 2, "seed": 7, "partial_images": 2}))]
struct CreateGeneration {
    /// At most 4000 characters; `<name>` is a concept.
    #[schema(example = "a photo of <rex> cat on the beach", max_length = 4000)]
    prompt: String,
    /// Concepts to place where the prompt does not name them: a subject before the first occurrence of its class noun, or
    /// in "a photo of <name> class, " at the beginning; a style as " in <name> style" at the end.
    concepts: Option<Vec<String>>,
    #[schema(minimum = 1, maximum = 10, default = 1)]
    n: Option<u32>,
    /// `auto` or WIDTHxHEIGHT, one of the model's sizes.
    #[schema(example = "auto")]
    size: Option<String>,
    /// Picture i is drawn from the stream of (seed, first_index + i). Random by default.
    #[schema(minimum = 0, maximum = 9007199254740991_u64)]
    seed: Option<u64>,
    #[schema(minimum = 0, maximum = 1000000, default = 0)]
    first_index: Option<u32>,
    #[schema(minimum = 1, maximum = 20)]
    guidance_scale: Option<f64>,
    #[schema(minimum = 0, maximum = 5)]
    temperature: Option<f64>,
    /// 0: all.
    top_k: Option<u32>,
    #[schema(default = true)]
    identity_mask: Option<bool>,
    /// `png` (default), `jpeg` or `webp`. WebP is lossless.
    #[schema(example = "png")]
    output_format: Option<String>,
    /// Quality of JPEG, default 90. With the lossless formats only 100.
    #[schema(minimum = 0, maximum = 100)]
    output_compression: Option<u32>,
    /// Unfinished pictures in a stream of events, of each picture.
    #[schema(minimum = 0, maximum = 3, default = 0)]
    partial_images: Option<u32>,
    /// Told of the end: POST, signed (Standard Webhooks). Port 80 or 443 of a public address.
    #[schema(example = "https://example.com/hooks/coar")]
    webhook_url: Option<String>,
    /// At most 16 pairs; keys of 64, values of 512 characters.
    #[schema(schema_with = metadata_schema)]
    metadata: Option<Value>,
}

/// A generation.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Generation)]
pub(super) struct GenerationObject {
    #[schema(example = "generation_01990000000070008000000000000000")]
    id: String,
    #[schema(example = "generation")]
    object: &'static str,
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[schema(example = "succeeded")]
    status: &'static str,
    /// How many are before it, while it is queued.
    queue_position: Option<u32>,
    progress: ProgressObject,
    /// As it is drawn, with every concept in it.
    #[schema(example = "a photo of <rex> cat on the beach")]
    prompt: String,
    request: SettingsObject,
    concepts: Vec<UsedConceptObject>,
    images: Vec<StoredImageObject>,
    usage: Option<UsageObject>,
    /// Why it failed.
    #[schema(value_type = Option<FailureObject>)]
    error: Option<Value>,
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    metadata: Value,
    /// Unix seconds, as all times.
    created_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
}

/// How far it is, in image tokens.
#[derive(Debug, Serialize, ToSchema)]
struct ProgressObject {
    #[schema(example = 288)]
    done: u32,
    #[schema(example = 288)]
    total: u32,
}

/// Every setting, resolved: sent again with the prompt they draw the same pictures.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GenerationSettings)]
struct SettingsObject {
    #[schema(example = 2)]
    n: u32,
    #[schema(example = "96x96")]
    size: String,
    #[schema(example = 7)]
    seed: u64,
    #[schema(example = 0)]
    first_index: u32,
    #[schema(example = 3.0)]
    guidance_scale: f64,
    #[schema(example = 1.0)]
    temperature: f64,
    #[schema(example = 100)]
    top_k: u32,
    identity_mask: bool,
    #[schema(example = "png")]
    output_format: &'static str,
    #[schema(example = 100)]
    output_compression: u8,
    #[schema(example = 0)]
    partial_images: u32,
}

/// A kept picture.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GeneratedImage)]
pub(super) struct StoredImageObject {
    #[schema(example = "image_01990000000070008000000000000000")]
    id: String,
    /// Which picture of the seed.
    #[schema(example = 0)]
    index: u32,
    #[schema(example = 7)]
    seed: u64,
    /// Needs no key; expires with the picture.
    url: String,
    #[schema(example = 96)]
    width: u32,
    #[schema(example = 96)]
    height: u32,
    /// SHA-256 of the file.
    content_hash: String,
}

/// Why a generation failed.
#[derive(ToSchema)]
#[allow(dead_code)]
#[schema(as = GenerationFailure)]
struct FailureObject {
    #[schema(example = "interrupted")]
    code: String,
    message: String,
    field: Option<String>,
}

/// A checked request that was not drawn.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GenerationPlan)]
struct PlanObject {
    /// Always true; what is not valid is an error.
    valid: bool,
    /// As it would be drawn, with every concept in it.
    prompt: String,
    request: SettingsObject,
    concepts: Vec<UsedConceptObject>,
    /// What it would cost.
    usage: UsageObject,
}

/// A generation, or with `validate_only` what it would be.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = GenerationOrPlan)]
#[allow(dead_code)]
enum AnswerObject {
    Generation(Box<GenerationObject>),
    Plan(PlanObject),
}

fn settings_object(settings: &GenerationSettings) -> SettingsObject {
    SettingsObject {
        n: settings.n,
        size: format!("{}x{}", settings.width, settings.height),
        seed: settings.seed,
        first_index: settings.first_index,
        guidance_scale: settings.guidance_scale,
        temperature: settings.temperature,
        top_k: settings.top_k,
        identity_mask: settings.identity_mask,
        output_format: settings.output_format.as_str(),
        output_compression: settings.output_compression,
        partial_images: settings.partial_images,
    }
}

fn image_object(image: &StoredImage, links: &Links, base: &str) -> StoredImageObject {
    StoredImageObject {
        id: image.id.to_string(),
        index: image.index,
        seed: image.seed.unwrap_or_default(),
        url: format!("{base}{}", links.path(image)),
        width: image.size.0,
        height: image.size.1,
        content_hash: image.blob.clone(),
    }
}

/// A generation as JSON; `base` begins the addresses of its pictures.
pub(super) fn generation_object(
    generation: &Generation,
    images: &[StoredImage],
    queue_position: Option<u32>,
    (links, base): (&Links, &str),
) -> GenerationObject {
    let (new, seconds) = (&generation.new, |ms: i64| ms / 1000);
    GenerationObject {
        id: generation.id.to_string(),
        object: "generation",
        status: generation.status.as_str(),
        queue_position,
        progress: ProgressObject {
            done: generation.done,
            total: new.total,
        },
        prompt: new.prompt.clone(),
        request: settings_object(&new.settings),
        concepts: new.concepts.iter().map(Into::into).collect(),
        images: images.iter().map(|image| image_object(image, links, base)).collect(),
        usage: generation.usage.map(Into::into),
        error: generation.error.clone(),
        metadata: new.metadata.clone(),
        created_at: seconds(generation.created_at),
        started_at: generation.started_at.map(seconds),
        finished_at: generation.finished_at.map(seconds),
    }
}

fn object(service: &Service, view: &GenerationView, base: &str) -> GenerationObject {
    let links = (service.links.as_ref(), base);
    generation_object(&view.generation, &view.images, view.queue_position, links)
}

fn read(mut fields: Fields) -> Result<GenerationInput, Error> {
    let input = GenerationInput {
        draw: drawing::input(&mut fields)?,
        metadata: match fields.take("metadata") {
            None => None,
            Some(Value::Object(pairs)) => Some(pairs),
            Some(_) => {
                return Err(Error::field(
                    "invalid_value",
                    "metadata",
                    "must be an object of strings",
                ));
            }
        },
        webhook_url: fields.text("webhook_url")?,
    };
    fields.finish()?;
    Ok(input)
}

/// The longest time that a request waits for a generation.
const LONGEST_WAIT: u64 = 60;

/// How a caller wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// When it has ended, at the latest after so many seconds.
    Wait(u64),
    Async,
    Stream,
}

/// `Accept: text/event-stream` wins; then `Prefer` (RFC 7240): `respond-async`, `wait=N`. What cannot be read of a
/// preference is ignored.
fn mode(headers: &HeaderMap) -> Mode {
    let values = |name| headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    if values(header::ACCEPT).any(|accepted| accepted.contains("text/event-stream")) {
        return Mode::Stream;
    }
    let preferences = || {
        values(HeaderName::from_static("prefer"))
            .flat_map(|value| value.split([',', ';']))
            .map(str::trim)
    };
    let wait = preferences().find_map(|preference| {
        let (name, seconds) = preference.split_once('=')?;
        let seconds = seconds.trim().trim_matches('"').parse::<u64>().ok()?;
        name.trim().eq_ignore_ascii_case("wait").then_some(seconds)
    });
    let respond_async = preferences().any(|preference| preference.eq_ignore_ascii_case("respond-async"));
    match wait {
        Some(0) => Mode::Async,
        None if respond_async => Mode::Async,
        seconds => Mode::Wait(seconds.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)),
    }
}

/// What a new generation is asked with.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct CreateQuery {
    /// `true`: only check the request, resolve its settings and count its cost.
    #[param(value_type = Option<bool>)]
    validate_only: Option<String>,
}

/// Preferences.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code)]
struct PreferHeader {
    /// `wait=N`, 0 to 60 seconds (default 60): 200 when it has ended by then, else 202. `respond-async`: 202 at once.
    #[param(rename = "Prefer", example = "wait=30")]
    prefer: Option<String>,
}

/// Draw pictures and keep them
///
/// Waits for the end, at most 60 seconds, unless `Prefer` says otherwise; with `Accept: text/event-stream` tells events:
/// `queued`, `progress`, `partial_image`, `image`, and last `completed`, `failed` or `cancelled`. Who disconnects while
/// waiting or listening cancels. What was answered with 202 goes on, also after a restart of the server.
#[utoipa::path(
    post, path = "/v1/generations", tag = "Generations", operation_id = "createGeneration",
    params(CreateQuery, PreferHeader, IdempotencyHeader),
    request_body = CreateGeneration,
    responses(
        (status = 200, description = "It has ended; or events; or with `validate_only` what it would be", content(
            (AnswerObject = "application/json"), (ServerEvent = "text/event-stream"),
        )),
        (status = 202, description = "It goes on; `Location` is where to ask", body = GenerationObject),
        (status = 400, description = "A parameter cannot be used: `param` names it", body = ErrorBody),
        (status = 404, description = "`concept_not_found`", body = ErrorBody),
        (status = 409, description = "`concept_not_ready`", body = ErrorBody),
        (status = 429, description = "`overloaded`, `quota_exceeded`", body = ErrorBody),
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
            match mode {
                Mode::Async => {
                    let view = service.queue_generation(&caller, plan).await?;
                    Ok(accepted(service, &view, &base))
                }
                Mode::Wait(seconds) => {
                    let begun = service.begin_generation(&caller, plan).await?;
                    let view = service.wait_begun(&caller, begun, Duration::from_secs(seconds)).await?;
                    match view.generation.status.is_final() {
                        true => Ok(Json(object(service, &view, &base)).into_response()),
                        false => Ok(accepted(service, &view, &base)),
                    }
                }
                Mode::Stream => {
                    let begun = service.begin_generation(&caller, plan).await?;
                    Ok(streamed(service, caller, begun, base))
                }
            }
        }
    };
    if validate_only {
        // Nothing is made, so that nothing is to be remembered.
        return work.await;
    }
    once.run(&state, &caller, &content, work).await
}

fn plan_object(plan: &Plan) -> PlanObject {
    PlanObject {
        valid: true,
        prompt: plan.new.prompt.clone(),
        request: settings_object(&plan.new.settings),
        concepts: plan.new.concepts.iter().map(Into::into).collect(),
        usage: crate::registry::TokenUsage {
            text_tokens: plan.cost.text,
            image_tokens: plan.cost.image,
        }
        .into(),
    }
}

fn accepted(service: &Service, view: &GenerationView, base: &str) -> Response {
    let location = format!("/v1/generations/{}", view.generation.id);
    let mut response = (StatusCode::ACCEPTED, Json(object(service, view, base))).into_response();
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A stream at work; dropping it cancels the generation.
struct Streaming {
    service: Service,
    caller: Caller,
    base: String,
    begun: Begun,
    ended: bool,
}

#[derive(Serialize)]
struct Wrapped {
    generation: GenerationObject,
}

fn streamed(service: &Service, caller: Caller, begun: Begun, base: String) -> Response {
    let queued = Wrapped {
        generation: object(service, &begun.view, &base),
    };
    let first = stream::once(std::future::ready(event("queued", &queued)));
    let streaming = Streaming {
        service: service.clone(),
        caller,
        base,
        begun,
        ended: false,
    };
    let rest = stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((event, streaming))
    });
    drawing::stream(first.chain(rest))
}

impl Streaming {
    /// The next event for the caller.
    async fn next(&mut self) -> Option<Event> {
        while !self.ended {
            match self.begun.events.recv().await {
                Some(DrawEvent::Started) => {}
                Some(DrawEvent::Progress { done, total }) => {
                    return Some(event("progress", &ProgressObject { done, total }));
                }
                Some(DrawEvent::Partial { index, number, picture }) => {
                    let format = self.begun.view.generation.new.settings.format();
                    // An unfinished picture that cannot be shown is no reason to end.
                    if let Ok(b64_json) = partial(picture, format).await {
                        let data = serde_json::json!({
                            "index": index, "partial_image_index": number, "b64_json": b64_json
                        });
                        return Some(event("partial_image", &data));
                    }
                }
                Some(DrawEvent::Image { image, .. }) => {
                    return Some(event("image", &image_object(&image, &self.service.links, &self.base)));
                }
                Some(DrawEvent::Ended(_)) | None => {
                    self.ended = true;
                    return self.last().await;
                }
            }
        }
        None
    }

    async fn last(&self) -> Option<Event> {
        let id = self.begun.view.generation.id.to_string();
        // Deleted meanwhile: there is nothing left to tell.
        let view = self.service.generation(&self.caller, &id, Duration::ZERO).await.ok()?;
        let name = match view.generation.status {
            GenerationStatus::Succeeded => "completed",
            GenerationStatus::Cancelled => "cancelled",
            _ => "failed",
        };
        let generation = object(&self.service, &view, &self.base);
        Some(event(name, &Wrapped { generation }))
    }
}

/// Which generations.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    #[param(value_type = Option<super::trainings::object::StatusName>, example = "succeeded")]
    status: Option<String>,
}

/// List generations
///
/// Newest first, with their pictures. What was drawn through `/v1/images/generations` with `url` is among them.
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
    /// Seconds to wait for its end, 0 to 60.
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
    let view = service.generation(&caller, &id, Duration::from_secs(wait)).await?;
    Ok(Json(object(service, &view, &drawing::base(&state, &headers))))
}

/// Cancel a generation
///
/// The device is free again at the next token. Pictures that are finished stay.
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
/// With its pictures. One that has not ended is cancelled first.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Mode {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(
                HeaderName::try_from(*name).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        mode(&headers)
    }

    #[test]
    fn preferences_are_read_as_the_rfc_says() {
        assert_eq!(of(&[]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=5")]), Mode::Wait(5));
        assert_eq!(of(&[("prefer", "Wait = \"5\"")]), Mode::Wait(5));
        assert_eq!(of(&[("prefer", "wait=600")]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=soon")]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=0")]), Mode::Async);
        assert_eq!(of(&[("prefer", "respond-async")]), Mode::Async);
        assert_eq!(of(&[("prefer", "respond-async, wait=10")]), Mode::Wait(10));
        assert_eq!(
            of(&[("prefer", "respond-async"), ("prefer", "wait=10")]),
            Mode::Wait(10)
        );
        assert_eq!(of(&[("accept", "application/json")]), Mode::Wait(60));
        let both = [
            ("accept", "application/json, text/event-stream"),
            ("prefer", "respond-async"),
        ];
        assert_eq!(of(&both), Mode::Stream);
    }
}
