//! `/metrics`: Prometheus' text format. Asks neither the device nor the database, and answers while the model is loading.

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

use super::AppState;
use crate::telemetry::meters;
use crate::telemetry::meters::CONTENT_TYPE;

pub(super) fn routes() -> Router<AppState> {
    Router::new().route("/metrics", get(scrape))
}

async fn scrape() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], meters().render())
}
