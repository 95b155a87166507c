//! `/v1/models`

use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::auth::Read;
use super::{ApiError, AppState};
use crate::error::{Error, ErrorKind};

pub(super) fn routes() -> Router<AppState> {
    Router::new()
        .route("/v1/models", get(list))
        .route("/v1/models/{id}", get(show))
}

fn model(state: &AppState) -> Result<Value, Error> {
    let info = state.service()?.engine.info();
    let sizes: Vec<String> = info.sizes.iter().map(|(w, h)| format!("{w}x{h}")).collect();
    Ok(json!({
        "id": info.id,
        "object": "model",
        "created": 0,
        "owned_by": "coar",
        "fingerprint": info.fingerprint,
        "sizes": sizes,
        "layers": info.layers,
        "hidden_size": info.hidden,
    }))
}

async fn list(State(state): State<AppState>, Read(_): Read) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({"object": "list", "data": [model(&state)?]})))
}

async fn show(State(state): State<AppState>, Read(_): Read, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = model(&state)?;
    match model["id"] == id.as_str() {
        true => Ok(Json(model)),
        false => Err(Error::field(
            "model_not_found",
            "model",
            format!("is `{id}`; this server has {}", model["id"]),
        )
        .of_kind(ErrorKind::NotFound)
        .into()),
    }
}
