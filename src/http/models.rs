//! `/v1/models`.

use super::App;
use super::error::ApiError;
use crate::engine::api::ModelInfo;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

fn describe(info: &ModelInfo) -> Value {
    json!({
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "moe-serve",
        "max_model_len": info.limits.max_model_len,
        "router": format!("{}: {}", info.router, info.router_means),
    })
}

pub(super) async fn list(State(service): App) -> Json<Value> {
    Json(json!({"object": "list", "data": [describe(service.generate.info())]}))
}

pub(super) async fn show(
    State(service): App,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|e| ApiError::invalid(Some("model"), format!("the model's name cannot be read: {e}")))?;
    let info = service.generate.info();
    if id == info.name { Ok(Json(describe(info))) } else { Err(ApiError::no_model(&id, &info.name)) }
}
