//! `/v1/images`: OpenAI's request and response shape, with a little more in both.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::auth::{Generate, Read};
use super::extract::Fields;
use super::{ApiError, AppState};
use crate::error::{Error, ErrorKind};
use crate::ids::ImageId;
use crate::picture::{OutputFormat, encode};
use crate::registry::StoredImage;
use crate::service::{Caller, GenerateInput, Generated, Service};

pub(super) fn routes(state: &AppState) -> Router<AppState> {
    Router::new()
        .route(
            "/v1/images/generations",
            post(generate).layer(from_fn_with_state(state.clone(), super::quota::rate_headers)),
        )
        .route("/v1/images/{file}", get(download))
}

/// How the pictures are answered.
struct Answer {
    as_url: bool,
    format: OutputFormat,
    extension: &'static str,
    content_type: &'static str,
}

const JPEG_QUALITY: u8 = 90;

fn answer(fields: &mut Fields) -> Result<Answer, Error> {
    let as_url = match fields.text("response_format")?.as_deref() {
        None | Some("url") => true,
        Some("b64_json") => false,
        Some(other) => {
            return Err(Error::field(
                "invalid_value",
                "response_format",
                format!("is `{other}`; expected `url` or `b64_json`"),
            ));
        }
    };
    let compression = fields.integer("output_compression", 100)?;
    let quality = compression.map_or(JPEG_QUALITY, |value| (value as u8).max(1));
    let (format, extension, content_type) = match fields.text("output_format")?.as_deref() {
        None | Some("png") => (OutputFormat::Png, "png", "image/png"),
        Some("jpeg") => (OutputFormat::Jpeg(quality), "jpg", "image/jpeg"),
        Some("webp") => (OutputFormat::WebP, "webp", "image/webp"),
        Some(other) => {
            return Err(Error::field(
                "invalid_value",
                "output_format",
                format!("is `{other}`; expected `png`, `jpeg` or `webp`"),
            ));
        }
    };
    Ok(Answer {
        as_url,
        format,
        extension,
        content_type,
    })
}

fn size(text: &str) -> Result<Option<(u32, u32)>, Error> {
    if text == "auto" {
        return Ok(None);
    }
    let sides = text
        .split_once('x')
        .and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides.map(Some).ok_or_else(|| {
        Error::field(
            "invalid_size",
            "size",
            format!("is `{text}`; expected `auto` or WIDTHxHEIGHT in pixels"),
        )
    })
}

fn input(service: &Service, mut fields: Fields) -> Result<(GenerateInput, Answer), Error> {
    let prompt = fields
        .text("prompt")?
        .ok_or_else(|| Error::field("missing_parameter", "prompt", "is missing"))?;
    let model = &service.engine.info().id;
    if let Some(asked) = fields.text("model")?
        && asked != *model
        && asked != "coar"
    {
        return Err(Error::field(
            "model_not_found",
            "model",
            format!("is `{asked}`; this server has `{model}`; concepts are used by writing <name> in the prompt"),
        )
        .of_kind(ErrorKind::NotFound));
    }
    let answer = answer(&mut fields)?;
    let small = u64::from(u32::MAX);
    let input = GenerateInput {
        prompt,
        count: fields.integer("n", small)?.map(|n| n as u32),
        size: fields.text("size")?.map(|text| size(&text)).transpose()?.flatten(),
        seed: fields.integer("seed", u64::MAX)?,
        guidance_scale: fields.number("guidance_scale")?,
        temperature: fields.number("temperature")?,
        top_k: fields.integer("top_k", small)?.map(|k| k as u32),
        identity_mask: fields.boolean("identity_mask")?,
    };
    fields.no_op("quality", &["auto", "standard", "high", "medium", "low", "hd"])?;
    fields.no_op("background", &["auto", "opaque"])?;
    fields.no_op("moderation", &["auto", "low"])?;
    fields.no_op("style", &["vivid", "natural"])?;
    fields.text("user")?;
    if fields.boolean("stream")? == Some(true) {
        return Err(Error::field(
            "unsupported_value",
            "stream",
            "is true; streaming is not supported yet",
        ));
    }
    if fields.integer("partial_images", 3)?.is_some_and(|n| n > 0) {
        return Err(Error::field(
            "unsupported_value",
            "partial_images",
            "is above 0; partial pictures are not supported yet",
        ));
    }
    fields.finish()?;
    Ok((input, answer))
}

async fn generate(
    State(state): State<AppState>,
    Generate(caller): Generate,
    headers: HeaderMap,
    fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let (input, answer) = input(service, fields)?;
    let mut admitted = service.admit(&caller, input.count.unwrap_or(1)).await?;
    let generated = service.generate(&caller, input).await?;
    admitted.drawing();
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .map(str::to_owned);
    Ok(Json(respond((service, &caller), &generated, &answer, host).await?))
}

/// What made a picture, for its own metadata. The prompt stays out: it may be private, the picture is passed around.
fn provenance(service: &Service, generated: &Generated, index: u32) -> String {
    let request = &generated.request;
    let concepts: Vec<Value> = generated
        .concepts
        .iter()
        .map(|c| json!({"name": c.name, "version": c.version}))
        .collect();
    json!({
        "software": concat!("coar ", env!("CARGO_PKG_VERSION")),
        "model": service.engine.info().id,
        "seed": request.seed,
        "index": index,
        "guidance_scale": request.guidance_scale,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "concepts": concepts,
    })
    .to_string()
}

async fn respond(
    (service, caller): (&Service, &Caller),
    generated: &Generated,
    answer: &Answer,
    host: Option<String>,
) -> Result<Value, Error> {
    let mut data = Vec::new();
    for image in &generated.images {
        let text = provenance(service, generated, image.index);
        let (picture, format) = (image.picture.clone(), answer.format);
        let encoded = tokio::task::spawn_blocking(move || encode(&picture, format, &[("coar", text)]));
        let bytes = encoded.await.map_err(Error::internal)?.map_err(Error::internal)?;
        let mut entry = json!({"seed": generated.request.seed, "index": image.index});
        if answer.as_url {
            let id = ImageId::new();
            let blob = service.registry.blobs.put(bytes.into()).await?;
            let stored = StoredImage {
                blob,
                content_type: answer.content_type.to_owned(),
            };
            service.registry.add_image(caller.tenant, id, &stored).await?;
            let path = format!("/v1/images/{id}.{}", answer.extension);
            entry["url"] = host
                .as_ref()
                .map_or_else(|| path.clone(), |host| format!("http://{host}{path}"))
                .into();
        } else {
            entry["b64_json"] = STANDARD.encode(&bytes).into();
        }
        data.push(entry);
    }
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (input, output) = (generated.text_tokens, generated.image_tokens);
    let concepts: Vec<Value> = generated
        .concepts
        .iter()
        .map(|c| json!({"name": c.name, "version": c.version}))
        .collect();
    Ok(json!({
        "created": created,
        "model": service.engine.info().id,
        "data": data,
        "size": format!("{}x{}", generated.request.width, generated.request.height),
        "output_format": if answer.extension == "jpg" { "jpeg" } else { answer.extension },
        "concepts": concepts,
        "usage": {
            "input_tokens": input,
            "output_tokens": output,
            "total_tokens": input + output,
            "input_tokens_details": {"text_tokens": input, "image_tokens": 0},
        },
    }))
}

async fn download(
    State(state): State<AppState>,
    Read(caller): Read,
    Path(file): Path<String>,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let missing = || {
        Error::new(
            ErrorKind::NotFound,
            "image_not_found",
            format!("There is no picture `{file}`."),
        )
    };
    let id: ImageId = file.split('.').next().unwrap_or("").parse().map_err(|_| missing())?;
    let image = service.registry.image(caller.tenant, id).await?.ok_or_else(missing)?;
    let bytes = service.registry.blobs.get(&image.blob).await?;
    let headers = [
        (header::CONTENT_TYPE, image.content_type),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, bytes).into_response())
}
