//! Whether requests reach the routes: not while the model is loaded, nor while the server drains.

use super::body::{Watch, watched};
use super::error::ApiError;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Version, header};
use axum::response::{IntoResponse, Response};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;
use tower::Service;

/// Seconds after which a server that loads is worth another try.
const RETRY_AFTER_SECONDS: u32 = 5;
/// Answered to the end: what happens while a server drains is worth knowing.
const METRICS: &str = "/metrics";

/// Stands in for routes that do not exist yet, and later before those that should get no more work. Clones are the same
/// switch.
#[derive(Clone, Default)]
pub struct Switch(Arc<Inner>);

#[derive(Default)]
struct Inner {
    routes: OnceLock<Router>,
    draining: AtomicBool,
    /// Requests that were let through and whose responses are not over.
    running: watch::Sender<usize>,
}

/// One of the running.
struct Running(Arc<Inner>);

impl Running {
    fn new(inner: Arc<Inner>) -> Self {
        inner.running.send_modify(|n| *n += 1);
        Self(inner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|n| *n -= 1);
    }
}

/// It lasts as long as the response's body, and asks for no more.
impl Watch for Running {}

impl Switch {
    /// A switch that answers 503 with the code `loading` until it is opened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets requests through to `routes`. Only the first call counts.
    pub fn open(&self, routes: Router) {
        let _ = self.0.routes.set(routes);
    }

    /// From now on, every request gets a 503 with the code `draining`, except for the metrics.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
    }

    /// Waits until no request is running.
    pub async fn idle(&self) {
        // The sender lives as long as this.
        let _ = self.0.running.subscribe().wait_for(|n| *n == 0).await;
    }

    /// The routes to serve.
    pub fn router(&self) -> Router {
        Router::new().fallback(forward).with_state(self.clone())
    }
}

async fn forward(State(Switch(inner)): State<Switch>, request: Request) -> Response {
    // Counted before looking, so that who drains and then finds none running can be sure that none will.
    let running = Running::new(inner.clone());
    if inner.draining.load(Ordering::SeqCst) && request.uri().path() != METRICS {
        let mut response =
            ApiError::unavailable("draining", "the server is shutting down and takes no new requests").into_response();
        // Another server may take the next one; HTTP/2 tells that in its own way.
        if request.version() < Version::HTTP_2 {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        return response;
    }
    let Some(routes) = inner.routes.get() else {
        let mut response =
            ApiError::unavailable("loading", "the model is being loaded; try again soon").into_response();
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        return response;
    };
    let response = routes.clone().call(request).await.unwrap_or_else(|never| match never {});
    watched(response, running)
}
