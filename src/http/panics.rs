//! A panic in a handler is an error of this one request.

use super::error::ApiError;
use axum::response::{IntoResponse, Response};
use std::any::Any;

/// Logs the panic, inside the request's span, and makes it a 500. Its message is for the log alone.
pub(super) fn respond(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("of no text");
    tracing::error!(panic = text, "a handler panicked");
    let message = "the server failed on this request; its log says why, under the request's x-request-id";
    ApiError::engine(message.into()).into_response()
}
