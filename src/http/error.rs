//! Every error of the API, in OpenAI's shape.

use crate::engine::api::SubmitError;
use crate::types::LimitError;
use crate::wire::{ErrorBody, ErrorDetail, RequestError};
use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::time::Duration;

/// An error with its status.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
}

/// Seconds after which a full queue is worth another try.
const RETRY_AFTER_SECONDS: u32 = 1;

impl ApiError {
    fn new(status: StatusCode, kind: &str, code: Option<&str>, param: Option<String>, message: String) -> Self {
        let detail = ErrorDetail { message, kind: kind.into(), param, code: code.map(Into::into) };
        Self { status, detail }
    }

    /// 400
    pub(super) fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        let param = param.map(Into::into);
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, param, message.into())
    }

    /// 401
    pub(super) fn unauthorised(message: &str) -> Self {
        let code = Some("invalid_api_key");
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", code, None, message.into())
    }

    /// 404 for a model that is not served.
    pub(super) fn no_model(asked: &str, served: &str) -> Self {
        let shown: String = asked.chars().take(200).collect();
        let message = format!("the model `{shown}` is not served here; `{served}` is");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("model_not_found"),
            Some("model".into()),
            message,
        )
    }

    /// 404
    pub(super) fn no_route() -> Self {
        let message = "there is no such path; /docs lists those there are".into();
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", None, None, message)
    }

    /// 405
    pub(super) fn wrong_method() -> Self {
        let message = "this path does not take that method".into();
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", None, None, message)
    }

    /// 408
    pub(super) fn too_slow(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {} seconds", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", None, None, message)
    }

    /// 429
    pub(super) fn busy(code: &str, message: &str) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some(code), None, message.into())
    }

    /// 500
    pub(super) fn engine(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, None, message)
    }

    /// 503
    pub(super) fn unavailable(code: &str, message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), None, message.into())
    }

    pub(super) fn body(self) -> ErrorBody {
        ErrorBody { error: self.detail }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        Self::invalid(error.param.as_deref(), error.message)
    }
}

impl From<LimitError> for ApiError {
    fn from(error: LimitError) -> Self {
        Self::invalid(Some(error.param), error.message)
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Limit(limit) => limit.into(),
            SubmitError::Router(_) => Self::invalid(Some("router"), message),
            SubmitError::QueueFull { .. } => Self::busy("queue_full", &message),
            SubmitError::Grammar { tools, .. } => {
                let param = if tools { "tools" } else { "response_format" };
                Self::invalid(Some(param), format!("the output cannot be constrained as asked: {message}"))
            }
            SubmitError::Busy(_) => Self::busy("grammar_busy", &message),
            SubmitError::Stopping => Self::unavailable("draining", &message),
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        let status = rejection.status();
        let message = match status {
            StatusCode::PAYLOAD_TOO_LARGE => format!("the body is larger than {} bytes", super::BODY_BYTES_MAX),
            _ => format!("the body could not be read: {rejection}"),
        };
        Self::new(status, "invalid_request_error", None, None, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(self.body())).into_response();
        if status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}
