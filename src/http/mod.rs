//! The HTTP server: `app` is the routes over any generator, `wrap` what stands before them, and `serve` runs them until
//! told to stop.

mod answer;
mod auth;
mod body;
mod chat;
mod completions;
mod cors;
mod error;
mod models;
mod pages;
mod panics;
mod prepare;
mod read;
mod request_id;
mod serve;
mod status;
mod switch;
mod tls;
mod tokenize;

pub use auth::{ApiKeys, KeyError};
pub use cors::{CorsError, cors};
pub use request_id::RequestId;
pub use serve::{ConnectionLimits, Transport, serve};
pub use switch::Switch;
pub use tls::{Tls, TlsError};

use crate::chat::ChatTemplates;
use crate::engine::api::Generate;
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::middleware::from_fn;
use axum::routing::{get, post};
use error::ApiError;
use std::sync::Arc;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;

/// What the routes serve.
pub struct Service {
    pub generate: Arc<dyn Generate>,
    /// How messages become a prompt; without it, there is no chat.
    pub chat: Option<ChatTemplates>,
    pub options: ServiceOptions,
}

/// What requests are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceOptions {
    /// Whether they may ask for the experts used per token.
    pub moe_trace: bool,
}

/// What handlers share.
type App = State<Arc<Service>>;

/// Bytes of a request body: some million tokens of ids.
const BODY_BYTES_MAX: usize = 16 << 20;

/// All routes over `service`.
pub fn app(service: Service) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route("/health", get(status::health))
        .route("/metrics", get(status::metrics))
        .route("/version", get(status::version))
        .merge(pages::routes())
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Arc::new(service))
}

/// Puts every layer around `routes`: request ids and logs, keys, CORS, and panics that become errors.
///
/// The order matters: the outermost gives each response its request id, also those of the layers below; a preflight
/// carries no key, so CORS answers it before the key is asked for, and a browser may read the 401.
pub fn wrap(mut routes: Router, keys: Option<ApiKeys>, cors: Option<CorsLayer>) -> Router {
    if let Some(keys) = keys {
        routes = auth::require_key(routes, keys, pages::OPEN);
    }
    if let Some(cors) = cors {
        routes = routes.layer(cors);
    }
    routes.layer(CatchPanicLayer::custom(panics::respond)).layer(from_fn(request_id::trace))
}
