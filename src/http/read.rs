//! Request bodies, read within bounds of memory and time.

use super::error::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Bytes of a body that anyone may send at any time.
const SMALL: u64 = 256 << 10;
/// Larger bodies that are read at the same time.
static LARGE: Semaphore = Semaphore::const_new(16);
/// Time for a whole body, lest a few slow ones take all places for large ones.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A request's body.
pub(super) struct Body(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
        let _place = match length {
            Some(length) if length <= SMALL => None,
            _ => LARGE.acquire().await.ok(),
        };
        match timeout(READ_TIMEOUT, Bytes::from_request(request, state)).await {
            Ok(body) => Ok(Self(body?)),
            Err(_) => Err(ApiError::too_slow(READ_TIMEOUT)),
        }
    }
}
