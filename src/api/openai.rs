//! `/v1/images/generations`: OpenAI's request and response format, with a few additional fields.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::middleware::from_fn_with_state;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use serde::Serialize;
use tokio::sync::mpsc;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Generate;
use super::drawing::{self, DrawRefusals, UsageObject, UsedConceptObject, partial};
use super::error::{error_body, request_id};
use super::extract::Fields;
use super::idempotency::{Answers, IdempotencyHeader, Once};
use super::openapi::ServerEvent;
use super::{ApiError, AppState, sse};
use crate::jobs::DrawEvent;
use crate::registry::{StoredImage, TokenUsage, now};
use crate::service::{Admitted, Caller, Plan, Service, Transient};
use coar_core::error::{Error, ErrorKind};
use coar_core::image::RgbImage;
use parameters::{Answer, Asked, CreateImages, Echo, read};

mod parameters;

pub(super) fn routes(state: &AppState) -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(generate))
        .layer(from_fn_with_state(state.clone(), super::quota::rate_headers))
        // Not part of the API description, which lists only supported routes.
        .route("/v1/images/edits", post(edits))
        .route("/v1/images/variations", post(variations))
}

/// Maximum number of bytes of an unsupported upload that are still read: a client that is still sending would take an
/// early end of the connection for a network failure and retry.
const UNREAD_LIMIT: usize = 64 << 20;

async fn unsupported(body: Body, instead: &str) -> ApiError {
    let mut left = UNREAD_LIMIT;
    let mut pieces = body.into_data_stream();
    while let Some(Ok(piece)) = pieces.next().await
        && let Some(less) = left.checked_sub(piece.len())
    {
        left = less;
    }
    ApiError(Error::new(ErrorKind::Invalid, "unsupported_endpoint", instead))
}

async fn edits(Generate(_): Generate, body: Body) -> ApiError {
    let instead = "The model draws from text and concepts, it does not edit images. Register what the image shows as a \
                   concept with `POST /v1/concepts` and name it in the prompt of `POST /v1/images/generations`.";
    unsupported(body, instead).await
}

async fn variations(Generate(_): Generate, body: Body) -> ApiError {
    let instead = "The model draws from text and concepts, it does not vary images. Register what the image shows as a \
                   concept with `POST /v1/concepts`, name it in the prompt of `POST /v1/images/generations`, and ask for \
                   several with `n`.";
    unsupported(body, instead).await
}

/// Images.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Images)]
struct ImagesObject {
    /// Unix seconds.
    created: i64,
    data: Vec<ImageData>,
    #[schema(example = "96x96")]
    size: String,
    #[schema(example = "png")]
    output_format: &'static str,
    /// The requested value, otherwise `high`. It has no effect.
    #[schema(example = "high")]
    quality: &'static str,
    #[schema(example = "opaque")]
    background: &'static str,
    /// The request's `safety_identifier`, otherwise its `user`.
    #[serde(skip_serializing_if = "Option::is_none")]
    safety_identifier: Option<String>,
    usage: UsageObject,
    concepts: Vec<UsedConceptObject>,
    /// The base model.
    #[schema(example = "coar-pocket")]
    model: String,
}

/// One image.
#[derive(Debug, Serialize, ToSchema)]
struct ImageData {
    /// Needs no key. Expires with the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b64_json: Option<String>,
    #[schema(example = 7)]
    seed: u64,
    /// Index of the image under its seed: `{"seed": seed, "first_index": index, "n": 1}` generates it alone.
    #[schema(example = 0)]
    index: u32,
}

/// The data of an event in a stream.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageEvent)]
pub(super) struct EventObject {
    /// `image_generation.partial_image` or `image_generation.completed`.
    #[serde(rename = "type")]
    #[schema(example = "image_generation.completed")]
    kind: &'static str,
    b64_json: String,
    /// Only for partial images; from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_image_index: Option<u32>,
    /// Unix seconds.
    created_at: i64,
    #[schema(example = "96x96")]
    size: String,
    #[schema(example = "high")]
    quality: &'static str,
    #[schema(example = "opaque")]
    background: &'static str,
    #[schema(example = "png")]
    output_format: &'static str,
    /// Only for finished images: the request's `safety_identifier`, otherwise its `user`.
    #[serde(skip_serializing_if = "Option::is_none")]
    safety_identifier: Option<String>,
    /// Only for finished images: the tokens of this image.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageObject>,
    seed: u64,
    index: u32,
}

const PARTIAL: &str = "image_generation.partial_image";
const COMPLETED: &str = "image_generation.completed";

/// Generate images
///
/// Request and response have OpenAI's format. Parameters that OpenAI does not have (`seed`, `first_index`, `concepts`,
/// `guidance_scale`, `temperature`, `top_k`, `identity_mask`) are optional. Unknown parameters are refused unless they
/// are null. The data of a stream's event is an `ImageEvent`.
#[utoipa::path(
    post, path = "/v1/images/generations", tag = "Images", operation_id = "createImages",
    params(IdempotencyHeader),
    request_body = CreateImages,
    responses(
        (status = 200, description = "The images, or with `stream` events", content(
            (ImagesObject = "application/json"), (ServerEvent = "text/event-stream"),
        )),
        DrawRefusals,
    ),
)]
async fn generate(
    State(state): State<AppState>,
    Generate(caller): Generate,
    headers: HeaderMap,
    once: Once,
    fields: Fields,
) -> Result<Response, ApiError> {
    let content = fields.content();
    let base = drawing::base(&state, &headers);
    let work = {
        let state = state.clone();
        async move {
            let service = state.service()?;
            let Asked { input, answer, echo } = read(service, &state.config().images, fields)?;
            let plan = service.plan(&caller, input).await?;
            match answer {
                Answer::Url => by_url(service, &caller, plan, &base, echo).await,
                Answer::Base64 => as_base64(service, &caller, plan, echo).await,
                Answer::Stream => streamed(service, &caller, plan, echo).await,
            }
        }
    };
    let once = once.answering(Answers::Images);
    once.run(&state, &caller, &content, work).await
}

fn answered(service: &Service, plan: &Plan, data: Vec<ImageData>, echo: Echo) -> Response {
    let settings = &plan.new.settings;
    let usage = TokenUsage {
        text_tokens: plan.cost.text,
        image_tokens: plan.cost.image,
    };
    Json(ImagesObject {
        created: now() / 1000,
        data,
        size: format!("{}x{}", settings.sampling.width, settings.sampling.height),
        output_format: settings.output_format.as_str(),
        quality: echo.quality,
        background: "opaque",
        safety_identifier: echo.safety_identifier,
        usage: usage.into(),
        concepts: plan.new.concepts.iter().map(Into::into).collect(),
        model: service.executor.info().id.clone(),
    })
    .into_response()
}

/// Waits for all images; returns them in the order of their index.
async fn all(events: &mut mpsc::Receiver<DrawEvent>) -> Result<Vec<Finished>, Error> {
    let mut images = Vec::new();
    loop {
        match events.recv().await {
            Some(DrawEvent::Image { index, file, stored }) => images.push(Finished { index, file, stored }),
            Some(DrawEvent::Ended(ended)) => break ended?,
            Some(_) => {}
            None => return Err(Error::internal("a generation ended without a last event")),
        }
    }
    images.sort_by_key(|image| image.index);
    Ok(images)
}

struct Finished {
    index: u32,
    file: Bytes,
    stored: Option<StoredImage>,
}

async fn by_url(service: &Service, caller: &Caller, plan: Plan, base: &str, echo: Echo) -> Result<Response, ApiError> {
    let mut begun = service.begin_generation(caller, plan.clone()).await?;
    let images = all(&mut begun.events).await?;
    let data = images
        .iter()
        .filter_map(|image| image.stored.as_ref())
        .map(|image| ImageData {
            url: Some(format!("{base}{}", service.links.path(image))),
            b64_json: None,
            seed: plan.new.settings.sampling.seed,
            index: image.index,
        })
        .collect();
    Ok(answered(service, &plan, data, echo))
}

async fn as_base64(service: &Service, caller: &Caller, plan: Plan, echo: Echo) -> Result<Response, ApiError> {
    let mut admitted = service.admit(caller, plan.new.settings.n).await?;
    let mut drawing = service.draw(&plan).await?;
    admitted.drawing();
    let data = all(&mut drawing.events)
        .await?
        .into_iter()
        .map(|image| ImageData {
            url: None,
            b64_json: Some(STANDARD.encode(&image.file)),
            seed: plan.new.settings.sampling.seed,
            index: image.index,
        })
        .collect();
    Ok(answered(service, &plan, data, echo))
}

/// A running stream; dropping it cancels the generation.
struct Streaming {
    plan: Plan,
    echo: Echo,
    events: Option<Transient>,
    request_id: Option<String>,
    _admitted: Admitted,
}

async fn streamed(service: &Service, caller: &Caller, plan: Plan, echo: Echo) -> Result<Response, ApiError> {
    let place = service.stream_place(caller).await?;
    let mut admitted = service.admit(caller, plan.new.settings.n).await?;
    let events = service.draw(&plan).await?;
    admitted.drawing();
    let streaming = Streaming {
        plan,
        echo,
        events: Some(events),
        request_id: request_id(),
        _admitted: admitted,
    };
    let events = stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((event, streaming))
    });
    Ok(sse::stream(sse::holding(events, place)))
}

impl Streaming {
    /// The next event for the caller.
    async fn next(&mut self) -> Option<Event> {
        loop {
            let outcome = match self.events.as_mut()?.events.recv().await {
                Some(DrawEvent::Partial { index, number, image }) => self.partial(index, number, image).await,
                Some(DrawEvent::Image { index, file, .. }) => Ok(self.completed(index, &file)),
                Some(DrawEvent::Ended(Ok(()))) => return None,
                Some(DrawEvent::Ended(Err(error))) => Err(error),
                Some(DrawEvent::Started | DrawEvent::Progress { .. }) => continue,
                None => Err(Error::internal("a generation ended without a last event")),
            };
            return Some(outcome.unwrap_or_else(|error| {
                // Nothing comes after an error.
                self.events = None;
                sse::event("error", &error_body(error, self.request_id.clone()))
            }));
        }
    }

    fn object(&self, kind: &'static str, index: u32, b64_json: String) -> EventObject {
        let settings = &self.plan.new.settings;
        EventObject {
            kind,
            b64_json,
            partial_image_index: None,
            created_at: now() / 1000,
            size: format!("{}x{}", settings.sampling.width, settings.sampling.height),
            quality: self.echo.quality,
            background: "opaque",
            output_format: settings.output_format.as_str(),
            safety_identifier: None,
            usage: None,
            seed: settings.sampling.seed,
            index,
        }
    }

    async fn partial(&self, index: u32, number: u32, image: RgbImage) -> Result<Event, Error> {
        let file = partial(image, self.plan.new.settings.format()).await?;
        let object = EventObject {
            partial_image_index: Some(number),
            ..self.object(PARTIAL, index, file)
        };
        Ok(sse::event(PARTIAL, &object))
    }

    fn completed(&self, index: u32, file: &[u8]) -> Event {
        let (new, cost) = (&self.plan.new, self.plan.cost);
        let usage = TokenUsage {
            text_tokens: cost.text,
            image_tokens: cost.image / u64::from(new.settings.n),
        };
        let object = EventObject {
            usage: Some(usage.into()),
            safety_identifier: self.echo.safety_identifier.clone(),
            ..self.object(COMPLETED, index, STANDARD.encode(file))
        };
        sse::event(COMPLETED, &object)
    }
}
