//! `/metrics`: Prometheus' text format. Asks neither the device nor the database, and answers while the model is loading.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use axum::routing::get;

use super::auth::caller_of;
use super::{ApiError, AppState};
use crate::service::Scope;
use coar_core::metrics::{CONTENT_TYPE, meters};

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/metrics", get(scrape))
}

/// The numbers are those of all tenants: clients other than loopback need the scope `admin`, unless the operator opens them.
async fn scrape(
    State(state): State<AppState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, ApiError> {
    if !state.config().metrics_open.is_on() && !peer.ip().to_canonical().is_loopback() {
        caller_of(&state, &headers).await?.require(Scope::Admin)?;
    }
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], meters().render()))
}
