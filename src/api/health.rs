//! `/livez` says that the process runs, `/readyz` that requests are served. Neither asks the device.

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::{ApiError, AppState};
use crate::engine::Health;
use crate::error::{Error, ErrorKind};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/livez", get(|| async { Json(json!({"status": "live"})) }))
        .route("/readyz", get(ready))
}

async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    match state.service()?.engine.health() {
        Health::Ready => Ok(Json(json!({"status": "ready"}))),
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
