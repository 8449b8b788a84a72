//! `/health`, `/metrics`, `/version`.

use super::App;
use super::error::ApiError;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// 200 while requests are accepted, else 503.
pub(super) async fn health(State(service): App) -> Result<Json<Value>, ApiError> {
    if service.generate.ready() {
        return Ok(Json(json!({"status": "ok"})));
    }
    Err(ApiError::unavailable("draining", "the server is shutting down or its engine has stopped"))
}

pub(super) async fn metrics(State(service): App) -> Response {
    let content_type = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([content_type], service.generate.metrics()).into_response()
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
