//! Common to all responses and requests: security headers, CORS, time limits.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{ApiError, AppState};
use coar_core::error::{Error, ErrorKind};

/// For API responses, none of which is a page.
const API_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// For the server's own pages: scripts and everything else from the server alone, and what the documentation page
/// needs: `data:` and `blob:` images, and style attributes.
const PAGE_POLICY: &str = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; \
                           object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

fn is_page(path: &str) -> bool {
    path == "/" || ["/docs", "/studio"].iter().any(|page| path.starts_with(page))
}

/// Headers that restrict what browsers do with a response.
pub(super) async fn security_headers(request: Request, next: Next) -> Response {
    let policy = if is_page(request.uri().path()) {
        PAGE_POLICY
    } else {
        API_POLICY
    };
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CONTENT_SECURITY_POLICY, policy),
    ] {
        response
            .headers_mut()
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Ends requests whose response does not begin in time. Dropping the handler cancels its generation.
pub(super) async fn time_limit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let limit = state.config().limits.request_timeout;
    match tokio::time::timeout(Duration::from_secs(limit), next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let message = format!("The request took more than {limit} seconds, the limit.");
            ApiError(Error::new(ErrorKind::Timeout, "request_timeout", message).limit(limit)).into_response()
        }
    }
}

/// The origins that may call from a browser; without any, other origins are not allowed.
pub(super) fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new();
    if origins.is_empty() {
        return layer;
    }
    let origin = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok())),
    };
    let exposed = [
        "x-request-id",
        "location",
        "retry-after",
        "x-should-retry",
        "idempotency-replayed",
    ];
    let exposed = exposed.into_iter().chain(super::quota::NAMES);
    layer
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
        // All headers: SDKs send headers of their own (`x-stainless-…`), and access is decided by origin and key.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed.map(HeaderName::from_static).collect::<Vec<_>>())
        .max_age(Duration::from_secs(600))
}
