//! Authentication: `Authorization: Bearer coar_…` becomes a [`Caller`].
//!
//! The middleware refuses requests without a valid key on every route that is not public. A handler states the scope
//! that it needs by taking [`Read`], [`Generate`], [`Train`] or [`Admin`]; there is no other way to get a caller.

use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use futures::StreamExt as _;

use super::access::identify;
use super::{ApiError, AppState};
use crate::service::{Caller, Scope};
use coar_core::error::Error;

/// Public paths. Their responses contain no tenant's data.
pub(super) fn is_public(path: &str) -> bool {
    matches!(
        path,
        "/" | "/livez" | "/readyz" | "/metrics" | "/openapi.json" | "/docs" | "/studio"
    )
        // Signed URLs.
        || path.starts_with("/v1/images/image_")
        || path.starts_with("/docs/")
        || path.starts_with("/studio/")
}

/// The token after `Bearer`, which is case-insensitive.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, text) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| text.trim())
}

/// Adds the caller to the request's extensions, or refuses the request. Long requests and event streams end when the
/// caller's key expires or is revoked.
pub(super) async fn authenticate(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    if is_public(request.uri().path()) {
        return next.run(request).await;
    }
    let caller = match state.service() {
        Ok(_) => state.keys.authenticate(bearer(request.headers())).await,
        Err(error) => Err(error),
    };
    let caller = match caller {
        Ok(caller) => caller,
        Err(error) => return ApiError(error).into_response(),
    };
    let key = caller.key.map(|key| key.to_string());
    identify(request.extensions(), &caller.tenant.to_string(), key.as_deref());
    request.extensions_mut().insert(caller);
    let response = match caller.key {
        // The request that creates the first key has to get its response.
        None => next.run(request).await,
        Some(_) => tokio::select! {
            biased;
            response = next.run(request) => response,
            error = state.keys.ended(caller) => return ApiError(error).into_response(),
        },
    };
    let is_stream = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    if !is_stream {
        return response;
    }
    let keys = state.keys.clone();
    let ended = Box::pin(async move { keys.ended(caller).await });
    response.map(|body| Body::from_stream(body.into_data_stream().take_until(ended)))
}

fn allowed(parts: &Parts, scope: Scope) -> Result<Caller, ApiError> {
    let caller = parts.extensions.get::<Caller>().copied();
    let caller = caller.ok_or_else(|| Error::internal("a public route asks for a caller"))?;
    caller.require(scope)?;
    Ok(caller)
}

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub(super) struct $name(pub Caller);

        impl<S: Sync> FromRequestParts<S> for $name {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
                allowed(parts, Scope::$name).map(Self)
            }
        }
    )+ };
}

scopes! {
    /// A caller with the scope `read`.
    Read,
    /// A caller with the scope `generate`.
    Generate,
    /// A caller with the scope `train`.
    Train,
    /// A caller with the scope `admin`.
    Admin,
}
