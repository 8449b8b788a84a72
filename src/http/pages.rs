//! What a browser gets: a playground, the reference of the API, and what they are made of; and the Grafana dashboard.

use super::Service;
use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// A file that is part of the program.
struct Page {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const JSON: &str = "application/json";

macro_rules! page {
    ($path:literal, $content_type:expr, $file:literal) => {
        Page { path: $path, content_type: $content_type, text: include_str!(concat!("pages/", $file)) }
    };
}

static PAGES: &[Page] = &[
    page!("/", HTML, "playground.html"),
    page!("/docs", HTML, "docs.html"),
    page!("/assets/pages.css", STYLE, "pages.css"),
    page!("/assets/pages.js", SCRIPT, "pages.js"),
    page!("/assets/playground.js", SCRIPT, "playground.js"),
    page!("/assets/charts.js", SCRIPT, "charts.js"),
    page!("/assets/docs.js", SCRIPT, "docs.js"),
    page!("/openapi.json", JSON, "openapi.json"),
    page!("/grafana.json", JSON, "grafana.json"),
];

/// Paths that hold no data and are served without a key.
pub(super) const OPEN: &[&str] = &[
    "/",
    "/docs",
    "/health",
    "/assets/pages.css",
    "/assets/pages.js",
    "/assets/playground.js",
    "/assets/charts.js",
    "/assets/docs.js",
];

/// The pages load nothing but what this server sends, and talk to no one else.
const POLICY: &str = "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; style-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Router<Arc<Service>> {
    PAGES.iter().fold(Router::new(), |routes, page| routes.route(page.path, get(|| async { send(page) })))
}

fn send(page: &'static Page) -> impl IntoResponse {
    let headers: [(HeaderName, HeaderValue); 4] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(page.content_type)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        // A newer server has newer pages.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, page.text)
}
