//! The `x-ratelimit-*` headers that SDKs read.
//!
//! A route that draws does two things. Its handler calls [`Service::admit`](crate::service::Service::admit) as soon as
//! the number of images is known, inside the work of [`Once::run`](super::idempotency::Once::run) if it uses that. It
//! calls `drawing()` on the guard when the engine has accepted the request, and keeps the guard as long as the
//! generation is queued or running. Its route has `.layer(from_fn_with_state(state.clone(), quota::rate_headers))`.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::{ApiError, AppState};
use crate::service::{Allowance, Caller, Standing};

/// The headers of a limit, of what remains, and of its reset.
type Names = [&'static str; 3];
const REQUESTS: Names = [
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
];
const IMAGES: Names = [
    "x-ratelimit-limit-images",
    "x-ratelimit-remaining-images",
    "x-ratelimit-reset-images",
];

/// All of these headers.
pub(super) const NAMES: [&str; 6] = [REQUESTS[0], REQUESTS[1], REQUESTS[2], IMAGES[0], IMAGES[1], IMAGES[2]];

fn insert(headers: &mut HeaderMap, names: Names, allowance: Option<Allowance>) {
    let Some(allowance) = allowance else { return };
    let values = [
        allowance.limit.to_string(),
        allowance.remaining.to_string(),
        seconds(allowance.reset),
    ];
    for (name, value) in names.into_iter().zip(values) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// In OpenAI's format: `12s`. Rounded up: a retry must not come too early.
fn seconds(wait: Duration) -> String {
    format!("{}s", wait.as_secs_f64().ceil())
}

/// Whether a request creates, starts, checks or cancels something for its tenant. Deleting is not counted: it frees
/// space.
fn is_counted(request: &Request) -> bool {
    let path = request.uri().path();
    matches!(*request.method(), Method::POST | Method::PATCH)
        && path.starts_with("/v1/")
        && !path.starts_with("/v1/admin/")
}

/// Refuses requests beyond the tenant's rate, before their body is read.
pub(super) async fn request_rate(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>().copied();
    if let (true, Some(caller), Ok(service)) = (is_counted(&request), caller, state.service())
        && let Err(error) = service.admit_request(&caller).await
    {
        return ApiError(error).into_response();
    }
    next.run(request).await
}

/// Adds the rate-limit headers of the caller's tenant to every response, refusals included. Headers of quotas that the
/// tenant does not have are omitted.
pub(super) async fn rate_headers(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>().copied();
    let mut response = next.run(request).await;
    if let (Some(caller), Ok(service)) = (caller, state.service()) {
        // On a failure the response is sent without the headers.
        let standing: Standing = service.standing(caller.tenant).await.unwrap_or_default();
        insert(response.headers_mut(), REQUESTS, standing.requests);
        insert(response.headers_mut(), IMAGES, standing.images);
    }
    response
}
