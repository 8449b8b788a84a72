//! The id and the log lines of every request.

use super::body::{Watch, watched};
#[cfg(feature = "otel")]
use crate::telemetry;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tracing::{Instrument, Level, Span};

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Characters of an id that a client may choose.
const ID_CHARS_MAX: usize = 128;
/// Asked for by machines every few seconds: their lines are for debugging.
const QUIET: [&str; 2] = ["/health", "/metrics"];

/// The id of a request; handlers find it among the request's extensions.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The client's own, if it is safe to repeat in headers and logs, else a new one.
    fn of(headers: &HeaderMap) -> Self {
        let fits = |b: &u8| b.is_ascii_alphanumeric() || b"._-".contains(b);
        let sane = |id: &&HeaderValue| (1..=ID_CHARS_MAX).contains(&id.len()) && id.as_bytes().iter().all(fits);
        headers.get(X_REQUEST_ID).filter(sane).map_or_else(Self::new, |id| Self(id.clone()))
    }

    fn new() -> Self {
        // Two processes differ in the first half, two requests of one in the second.
        static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let id = format!("req-{:016x}-{:x}", *PROCESS, COUNT.fetch_add(1, Ordering::Relaxed));
        // Letters, digits and hyphens always make a header.
        Self(HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("req")))
    }

    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

macro_rules! log_at {
    ($level:expr, $($line:tt)*) => {
        match $level {
            Level::WARN => tracing::warn!($($line)*),
            Level::DEBUG => tracing::debug!($($line)*),
            _ => tracing::info!($($line)*),
        }
    };
}

/// What is known of a request until it is over; its end is logged when this is dropped, wherever that happens.
struct Course {
    span: Span,
    started: Instant,
    quiet: bool,
    status: Option<StatusCode>,
    bytes: u64,
    whole: bool,
}

impl Course {
    fn level(&self) -> Level {
        match self.status {
            _ if self.quiet => Level::DEBUG,
            Some(status) if status.is_server_error() => Level::WARN,
            _ => Level::INFO,
        }
    }

    fn duration_ms(&self) -> f64 {
        (self.started.elapsed().as_secs_f64() * 1e6).round() / 1e3
    }
}

impl Watch for Course {
    fn data(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    fn end(&mut self, result: Result<(), &axum::Error>) {
        self.whole = true;
        if let Err(error) = result {
            self.span.in_scope(|| tracing::warn!(%error, "the response's body failed"));
        }
    }
}

impl Drop for Course {
    fn drop(&mut self) {
        let (status, client_left) = (self.status.map(|s| s.as_u16()), !self.whole);
        self.span.in_scope(|| {
            log_at!(
                self.level(),
                status,
                duration_ms = self.duration_ms(),
                bytes = self.bytes,
                client_left,
                "request over"
            );
        });
    }
}

/// Runs a request within a span that has its id, logs when the response's head is ready and when all is over, and puts
/// the id on the response.
pub(super) async fn trace(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    // At the highest level, so that no filter takes the id from a line that it lets through.
    let span = tracing::error_span!(
        "request",
        request_id = id.as_str(),
        method = %request.method(),
        path = request.uri().path(),
        // For OpenTelemetry alone.
        otel.kind = tracing::field::Empty,
    );
    #[cfg(feature = "otel")]
    telemetry::otel::begin(&span, request.headers());
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let quiet = QUIET.contains(&uri.path());
    let mut course = Course { span, started: Instant::now(), quiet, status: None, bytes: 0, whole: false };
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).instrument(course.span.clone()).await;
    let status = response.status();
    course.status = Some(status);
    // The body of such an answer stays here, and is missed by no one.
    course.whole = method == Method::HEAD;
    #[cfg(feature = "otel")]
    telemetry::otel::head(&course.span, &method, uri.path(), status);
    course.span.in_scope(|| {
        log_at!(course.level(), status = status.as_u16(), duration_ms = course.duration_ms(), "response head ready");
    });
    response.headers_mut().insert(X_REQUEST_ID, id.0);
    watched(response, course)
}
