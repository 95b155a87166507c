//! `/metrics` in Prometheus' text format. It does not use the device and works while the model is loading.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use axum::routing::get;

use super::auth::bearer;
use super::{ApiError, AppState};
use crate::service::Scope;
use coar_core::metrics::{CONTENT_TYPE, meters};

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/metrics", get(scrape))
}

/// The numbers cover all tenants: if there are keys, reading them needs the scope `metrics` or `admin`, unless the
/// operator makes them public. Loopback is no exception: a proxy on the same machine calls from there for all clients.
async fn scrape(State(state): State<AppState>, headers: HeaderMap) -> Result<impl IntoResponse, ApiError> {
    if !state.config().metrics_open.is_on() {
        let caller = state.keys.authenticate(bearer(&headers)).await?;
        if !caller.scopes.contains(Scope::Admin) {
            caller.require(Scope::Metrics)?;
        }
    }
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], meters().render()))
}
