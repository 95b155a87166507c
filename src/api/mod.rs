//! HTTP only: routes, extractors, errors as JSON. No logic beyond translation.

mod access;
mod admin;
mod auth;
mod browser;
mod concepts;
mod describe;
mod drawing;
mod error;
mod extract;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod generations;
mod guard;
mod health;
mod idempotency;
mod images;
mod impatient;
mod listen;
mod metrics;
mod models;
mod multipart;
mod openai;
mod openapi;
mod pagination;
mod paths;
mod proxy;
mod quota;
mod sse;
mod trainings;
mod ui;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use crate::config::Config;
use crate::service::{Keys, Service};
use coar_core::error::{Error, ErrorKind};
use coar_core::metrics::meters;
pub use describe::describe;
pub(crate) use error::ApiError;
pub use listen::{Listener, listen};

/// State that handlers share. The service is set when the model is loaded; until then only the health routes respond.
#[derive(Debug, Clone)]
pub struct AppState {
    config: Arc<Config>,
    keys: Keys,
    /// The server's allowed names while callers need no key.
    names: Arc<browser::OwnNames>,
    service: Arc<std::sync::OnceLock<Service>>,
    draining: Arc<AtomicBool>,
    /// Work that continues after its caller has disconnected.
    tasks: TaskTracker,
    followed: trainings::Followed,
}

impl AppState {
    /// State without a service yet.
    pub fn new(config: Arc<Config>, keys: Keys, listens: Option<SocketAddr>) -> Self {
        Self {
            names: Arc::new(browser::OwnNames::new(&config, listens)),
            config,
            keys,
            service: Arc::default(),
            draining: Arc::default(),
            tasks: TaskTracker::new(),
            followed: trainings::Followed::default(),
        }
    }

    fn config(&self) -> &Config {
        &self.config
    }

    /// Starts to serve requests.
    pub fn ready(&self, service: Service) {
        // A second call would be a bug of the caller; the first service is kept.
        let _ = self.service.set(service);
        meters().ready.set(1);
    }

    /// Tasks that continue when their caller disconnects; the server waits for them when it stops.
    fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// The trainings that clients follow.
    fn followed(&self) -> &trainings::Followed {
        &self.followed
    }

    /// Waits for the work of callers that have disconnected.
    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Refuses new requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        meters().ready.set(0);
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
    let limits = state.config.limits;
    let described = OpenApiRouter::with_openapi(openapi::Api::openapi())
        .merge(health::routes())
        .merge(admin::routes())
        .merge(concepts::routes(&state.config))
        .merge(trainings::routes())
        .merge(models::routes())
        .merge(generations::routes(&state))
        .merge(openai::routes(&state))
        .merge(images::routes());
    let (routes, document) = described.split_for_parts();
    let document = Arc::new(openapi::complete(document, state.config.public_url.as_deref()));
    let routes = routes
        .route("/openapi.json", get(move || openapi::serve(document)))
        .merge(SwaggerUi::new("/docs").config(
            // Relative to /docs/: a proxy may add a prefix.
            utoipa_swagger_ui::Config::from("../openapi.json"),
        ))
        .merge(metrics::routes())
        .merge(ui::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(state.clone(), quota::request_rate))
        .layer(from_fn_with_state(state.clone(), auth::authenticate))
        .layer(from_fn_with_state(state.clone(), when_ready))
        .layer(from_fn_with_state(state.clone(), guard::time_limit))
        .layer(RequestBodyTimeoutLayer::new(Duration::from_secs(limits.body_timeout)))
        .layer(guard::cors(&state.config.cors_origin))
        .layer(from_fn_with_state(state.clone(), browser::own_pages_only))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError(Error::internal("a handler panicked")).into_response()
        }))
        .layer(from_fn_with_state(state.clone(), proxy::behind_proxy))
        .layer(from_fn(guard::security_headers))
        .layer(from_fn(error::with_request_id))
        .layer(from_fn(access::observed))
        .with_state(state);
    // Runs before routing; the layers of a router run after it.
    Router::new().fallback_service(routes).layer(from_fn(paths::tidied))
}

/// Public routes always respond, the others once there is a service.
async fn when_ready(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if !auth::is_public(request.uri().path())
        && let Err(error) = state.service()
    {
        return ApiError(error).into_response();
    }
    next.run(request).await
}

async fn not_found(request: Request) -> ApiError {
    ApiError(Error::new(
        ErrorKind::NotFound,
        "route_not_found",
        paths::not_found_message(request.uri().path()),
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
