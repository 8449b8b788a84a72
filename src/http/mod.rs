//! The HTTP server: `app` is the routes over any generator, `serve` runs them until told to stop.

mod completions;
mod error;
mod models;
mod status;

use crate::engine::api::Generate;
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{get, post};
use error::ApiError;
use std::future::Future;
use std::sync::Arc;
use tokio::net::TcpListener;

/// What handlers share.
type App = State<Arc<dyn Generate>>;

/// Bytes of a request body: some million tokens of ids.
const BODY_BYTES_MAX: usize = 16 << 20;

/// All routes over `generate`.
pub fn app(generate: Arc<dyn Generate>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route("/health", get(status::health))
        .route("/metrics", get(status::metrics))
        .route("/version", get(status::version))
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(generate)
}

/// Serves `app` on `listener`. When `shutdown` resolves, no connection is accepted any more and those there are
/// finish what they have begun.
///
/// # Errors
/// A failure of the listener.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    // Tokens are small and late ones useless: do not wait to fill packets.
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, app).with_graceful_shutdown(shutdown).await
}
