//! `/v1/images/generations`: OpenAI's request and response shape, with a little more in both.

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
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Generate;
use super::drawing::{self, DrawRefusals, UsageObject, UsedConceptObject, partial, word};
use super::error::{error_body, request_id};
use super::extract::Fields;
use super::idempotency::{Answers, IdempotencyHeader, Once};
use super::openapi::ServerEvent;
use super::{ApiError, AppState, sse};
use crate::jobs::DrawEvent;
use crate::registry::{StoredImage, TokenUsage, now};
use crate::service::{Admitted, Caller, GenerateInput, NamedConcept, Plan, Service, Transient};
use coar_core::concept::is_slug;
use coar_core::error::{Error, ErrorKind};
use coar_core::image::RgbImage;

pub(super) fn routes(state: &AppState) -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(generate))
        .layer(from_fn_with_state(state.clone(), super::quota::rate_headers))
        // Not described: the document says what can be done here.
        .route("/v1/images/edits", post(edits))
        .route("/v1/images/variations", post(variations))
}

/// Bytes of an unused image that are still read: a client in the middle of sending would take an
/// early end of the connection for a failure of the network, and try again.
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

/// What is to be drawn. The handler reads it field by field; this is its description.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
#[schema(example = json!({"model": "coar", "prompt": "a photo of <rex> cat on the beach", "n": 2, "seed": 7}))]
struct CreateImages {
    /// At most 4000 characters; `<name>` is a concept.
    #[schema(example = "a photo of <rex> cat on the beach", max_length = 4000)]
    prompt: String,
    /// `coar`, the base model's own id, `coar:<concept>`, or `coar:<subject>+<style>`. Concepts that the prompt does not
    /// name are placed in it: a subject goes before the first occurrence of its class noun, or into "a photo of <name>
    /// class, " at the beginning; a style becomes " in <name> style" at the end.
    #[schema(example = "coar:rex+ink")]
    model: Option<String>,
    /// As with `model`: concepts to place where the prompt does not name them.
    concepts: Option<Vec<String>>,
    #[schema(minimum = 1, maximum = 10, default = 1)]
    n: Option<u32>,
    /// `auto` or WIDTHxHEIGHT, one of the model's sizes (`GET /v1/models`).
    #[schema(example = "auto")]
    size: Option<String>,
    /// `url` (default): stored as a generation. `b64_json`: not stored.
    #[schema(example = "b64_json")]
    response_format: Option<String>,
    /// `png` (default), `jpeg` or `webp`.
    #[schema(example = "png")]
    output_format: Option<String>,
    /// Quality of JPEG, default 90, and of WebP, default 100: without loss. With PNG only 100.
    #[schema(minimum = 0, maximum = 100)]
    output_compression: Option<u32>,
    /// Server-sent events with unfinished images: `image_generation.partial_image`, `image_generation.completed`,
    /// `error`. Not stored; disconnecting cancels.
    stream: Option<bool>,
    /// Unfinished images in a stream, of each image.
    #[schema(minimum = 0, maximum = 3)]
    partial_images: Option<u32>,
    /// Image i is drawn from the stream of (seed, first_index + i). Random by default; the answer names it.
    #[schema(minimum = 0, maximum = 9007199254740991_u64)]
    seed: Option<u64>,
    /// With `n` 1 draws one image of a larger request alone.
    #[schema(minimum = 0, maximum = 1000000, default = 0)]
    first_index: Option<u32>,
    /// How strongly the prompt counts; 1 is off.
    #[schema(minimum = 1, maximum = 20)]
    guidance_scale: Option<f64>,
    /// 0 takes the most likely code every time.
    #[schema(minimum = 0, maximum = 5)]
    temperature: Option<f64>,
    /// Codes to choose from at each step; 0: all.
    top_k: Option<u32>,
    /// Blocks attention between different concepts.
    #[schema(default = true)]
    identity_mask: Option<bool>,
    /// `auto`, `standard`, `low`, `medium`, `high` or `hd`; changes nothing.
    quality: Option<String>,
    /// `auto` or `opaque`; changes nothing.
    background: Option<String>,
    /// `auto` or `low`; changes nothing.
    moderation: Option<String>,
    /// `vivid` or `natural`; changes nothing.
    style: Option<String>,
    /// Changes nothing.
    user: Option<String>,
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
    #[schema(example = "auto")]
    quality: &'static str,
    #[schema(example = "opaque")]
    background: &'static str,
    usage: UsageObject,
    concepts: Vec<UsedConceptObject>,
    /// The base model.
    #[schema(example = "coar-pocket")]
    model: String,
}

/// One image.
#[derive(Debug, Serialize, ToSchema)]
struct ImageData {
    /// Needs no key; expires with the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b64_json: Option<String>,
    #[schema(example = 7)]
    seed: u64,
    /// Which image of the seed: `{"seed": seed, "first_index": index, "n": 1}` draws it alone.
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
    /// From 0; of unfinished images.
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_image_index: Option<u32>,
    /// Unix seconds.
    created_at: i64,
    #[schema(example = "96x96")]
    size: String,
    #[schema(example = "auto")]
    quality: &'static str,
    #[schema(example = "opaque")]
    background: &'static str,
    #[schema(example = "png")]
    output_format: &'static str,
    /// Of this image; of finished ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageObject>,
    seed: u64,
    index: u32,
}

const PARTIAL: &str = "image_generation.partial_image";
const COMPLETED: &str = "image_generation.completed";

/// How the images are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Url,
    Base64,
    Stream,
}

/// The concepts that a model's name names.
fn model_concepts(service: &Service, model: &str) -> Result<Vec<NamedConcept>, Error> {
    let id = &service.executor.info().id;
    if model == id || model == "coar" {
        return Ok(vec![]);
    }
    let names = model.strip_prefix("coar:").map(|names| names.split('+'));
    match names {
        Some(names) if names.clone().all(is_slug) => Ok(names
            .map(|name| NamedConcept {
                name: name.to_owned(),
                field: "model",
            })
            .collect()),
        _ => Err(Error::field(
            "model_not_found",
            "model",
            format!("is `{model}`; this server has `coar`, which is `{id}`, and `coar:<concept>`"),
        )
        .of_kind(ErrorKind::NotFound)),
    }
}

fn read(service: &Service, mut fields: Fields) -> Result<(GenerateInput, Answer), Error> {
    let model = fields.text("model")?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let formats = [("url", Answer::Url), ("b64_json", Answer::Base64)];
    let format = word(&mut fields, "response_format", &formats)?;
    let mut input = drawing::input(&mut fields)?;
    fields.no_op("quality", &["auto", "standard", "high", "medium", "low", "hd"])?;
    fields.no_op("background", &["auto", "opaque"])?;
    fields.no_op("moderation", &["auto", "low"])?;
    fields.no_op("style", &["vivid", "natural"])?;
    fields.text("user")?;
    fields.finish()?;
    if input.partial_images.is_some_and(|count| count > 0) && !stream {
        let problem = "is above 0, and there is nothing to send them with; ask for `stream` too";
        return Err(Error::field("unsupported_value", "partial_images", problem));
    }
    if let Some(model) = model {
        input.concepts.extend(model_concepts(service, &model)?);
    }
    let answer = match stream {
        true => Answer::Stream,
        false => format.unwrap_or(Answer::Url),
    };
    Ok((input, answer))
}

/// Draw images
///
/// OpenAI's request and answer. What it does not know (`seed`, `first_index`, `concepts`, `guidance_scale`,
/// `temperature`, `top_k`, `identity_mask`) may be left out; unknown parameters are refused. The data of an event of a stream
/// is an `ImageEvent`.
#[utoipa::path(
    post, path = "/v1/images/generations", tag = "Images", operation_id = "createImages",
    params(IdempotencyHeader),
    request_body = CreateImages,
    responses(
        (status = 200, description = "The images; with `stream` events", content(
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
            let (input, answer) = read(service, fields)?;
            let plan = service.plan(&caller, input).await?;
            match answer {
                Answer::Url => by_url(service, &caller, plan, &base).await,
                Answer::Base64 => as_base64(service, &caller, plan).await,
                Answer::Stream => streamed(service, &caller, plan).await,
            }
        }
    };
    let once = once.answering(Answers::Images);
    once.run(&state, &caller, &content, work).await
}

fn answered(service: &Service, plan: &Plan, data: Vec<ImageData>) -> Response {
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
        quality: "auto",
        background: "opaque",
        usage: usage.into(),
        concepts: plan.new.concepts.iter().map(Into::into).collect(),
        model: service.executor.info().id.clone(),
    })
    .into_response()
}

/// Waits for every image; in order of their index.
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

async fn by_url(service: &Service, caller: &Caller, plan: Plan, base: &str) -> Result<Response, ApiError> {
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
    Ok(answered(service, &plan, data))
}

async fn as_base64(service: &Service, caller: &Caller, plan: Plan) -> Result<Response, ApiError> {
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
    Ok(answered(service, &plan, data))
}

/// A stream at work; dropping it cancels the drawing.
struct Streaming {
    plan: Plan,
    events: Option<Transient>,
    request_id: Option<String>,
    _admitted: Admitted,
}

async fn streamed(service: &Service, caller: &Caller, plan: Plan) -> Result<Response, ApiError> {
    let place = service.stream_place(caller).await?;
    let mut admitted = service.admit(caller, plan.new.settings.n).await?;
    let events = service.draw(&plan).await?;
    admitted.drawing();
    let streaming = Streaming {
        plan,
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
            quality: "auto",
            background: "opaque",
            output_format: settings.output_format.as_str(),
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
            ..self.object(COMPLETED, index, STANDARD.encode(file))
        };
        sse::event(COMPLETED, &object)
    }
}
