//! HTTP only: routes, extractors, errors as JSON. No logic beyond translation.

mod concepts;
mod error;
mod extract;
mod health;
mod images;
mod models;
mod multipart;
mod trainings;
mod ui;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;

use crate::error::{Error, ErrorKind};
use crate::service::Service;
pub(crate) use error::ApiError;

/// What handlers share. The service appears when the model is loaded; until then only the health routes answer.
#[derive(Debug, Clone, Default)]
pub struct AppState {
    service: Arc<std::sync::OnceLock<Service>>,
    draining: Arc<AtomicBool>,
}

impl AppState {
    /// From now on requests are served.
    pub fn ready(&self, service: Service) {
        // A second call would be a mistake of the caller; the first service stays.
        let _ = self.service.set(service);
    }

    /// From now on new requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn service(&self) -> Result<&Service, Error> {
        let unavailable = |code, message| Error::new(ErrorKind::Unavailable, code, message);
        if self.draining.load(Ordering::Relaxed) {
            return Err(unavailable("stopping", "The server is stopping."));
        }
        self.service
            .get()
            .ok_or_else(|| unavailable("loading", "The server is loading the model; try again soon."))
    }
}

/// All routes.
pub fn router(state: AppState) -> Router {
    Router::new()
        .merge(health::routes())
        .merge(concepts::routes())
        .merge(trainings::routes())
        .merge(images::routes())
        .merge(models::routes())
        .route_layer(from_fn_with_state(state.clone(), when_ready))
        // After that layer: the page's files answer while the model is loading.
        .merge(ui::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(|_| {
            ApiError(Error::internal("a handler panicked")).into_response()
        }))
        .layer(from_fn(error::with_request_id))
        .with_state(state)
}

/// Health routes answer always; the others when there is a service.
async fn when_ready(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path != "/livez"
        && path != "/readyz"
        && let Err(error) = state.service()
    {
        return ApiError(error).into_response();
    }
    next.run(request).await
}

async fn not_found(request: Request) -> ApiError {
    let path = request.uri().path().to_owned();
    ApiError(Error::new(
        ErrorKind::NotFound,
        "route_not_found",
        format!("There is nothing at `{path}`."),
    ))
}

async fn method_not_allowed(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    ApiError(Error::new(
        ErrorKind::MethodNotAllowed,
        "method_not_allowed",
        format!("`{path}` does not answer {method}."),
    ))
}
