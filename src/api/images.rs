//! `/v1/images/{file}`: stored images at their signed URLs.

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::openapi::ErrorBody;
use super::{ApiError, AppState};
use crate::registry::now;
use crate::service::Signed;
use coar_core::error::Error;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(download))
}

/// The signature of an address.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct SignedQuery {
    /// Unix seconds.
    #[serde(default)]
    #[param(value_type = i64, example = 1767225600)]
    expires: String,
    #[serde(default)]
    signature: String,
}

/// Fetch an image
///
/// Use the address in a response. It needs no key and is valid until it expires. Its content never changes, so it may
/// be cached until then.
#[utoipa::path(
    get, path = "/v1/images/{file}", tag = "Images", operation_id = "fetchImage", security(()),
    params(
        ("file" = String, Path, description = "The image's id and its format's extension",
         example = "image_01990000000070008000000000000000.png"),
        SignedQuery,
    ),
    responses(
        (status = 200, description = "The file", content(
            (Vec<u8> = "image/png"), (Vec<u8> = "image/jpeg"), (Vec<u8> = "image/webp"),
        )),
        (status = 304, description = "Not modified"),
        (status = 403, description = "`address_expired`", body = ErrorBody),
        (status = 404, description = "`image_not_found`: no such image, or a wrong signature", body = ErrorBody),
    ),
)]
async fn download(
    State(state): State<AppState>,
    Path(file): Path<String>,
    Query(query): Query<SignedQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let signed = Signed {
        expires: &query.expires,
        signature: &query.signature,
    };
    let (image, bytes) = service.image(&file, signed).await?;
    let left = (service.links.expires(&image) - now() / 1000).max(0);
    let cache = format!("private, max-age={left}, immutable");
    let tag = format!("\"{}\"", image.blob);
    let known = headers.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok());
    let known = known.is_some_and(|tags| {
        tags.split(',')
            .any(|known| known.trim().trim_start_matches("W/") == tag)
    });
    let mut response = match known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => bytes.into_response(),
    };
    let out = response.headers_mut();
    for (name, value) in [(header::CACHE_CONTROL, cache), (header::ETAG, tag)] {
        out.insert(name, HeaderValue::from_str(&value).map_err(Error::internal)?);
    }
    if !known {
        out.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static(image.format.media_type()),
        );
        out.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("inline"));
    }
    Ok(response)
}
