//! `/livez`: the process is running. `/readyz`: it serves requests. Neither uses the device.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::openapi::ErrorBody;
use super::{ApiError, AppState};
use coar_core::engine::Health;
use coar_core::error::{Error, ErrorKind};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(live)).routes(routes!(ready))
}

/// Whether a path is one of these two.
pub(super) fn is_health(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz")
}

/// State of the server.
#[derive(Debug, Serialize, ToSchema)]
struct HealthStatus {
    /// `live` or `ready`.
    #[schema(example = "ready")]
    status: &'static str,
}

/// Is the process alive?
#[utoipa::path(
    get, path = "/livez", tag = "Health", operation_id = "live", security(()),
    responses((status = 200, description = "The process is alive", body = HealthStatus)),
)]
async fn live() -> Json<HealthStatus> {
    Json(HealthStatus { status: "live" })
}

/// Are requests served?
#[utoipa::path(
    get, path = "/readyz", tag = "Health", operation_id = "ready", security(()),
    responses(
        (status = 200, description = "Requests are served", body = HealthStatus),
        (status = 503, description = "`loading`, `stopping`, `engine_stuck` or `engine_stopped`", body = ErrorBody),
    ),
)]
async fn ready(State(state): State<AppState>) -> Result<Json<HealthStatus>, ApiError> {
    match state.service()?.executor.health() {
        Health::Ready => Ok(Json(HealthStatus { status: "ready" })),
        Health::Loading => {
            Err(Error::new(ErrorKind::Unavailable, "loading", "The server is loading the model.").into())
        }
        Health::Stuck(since) => Err(Error::new(
            ErrorKind::Unavailable,
            "engine_stuck",
            format!("The device has not moved for {} s.", since.as_secs()),
        )
        .into()),
        Health::Stopped(_) => Err(Error::new(
            ErrorKind::Unavailable,
            "engine_stopped",
            "The engine has stopped; the log has the cause.",
        )
        .into()),
    }
}
