//! Which web pages may call the API from a browser.

use super::request_id::X_REQUEST_ID;
use axum::http::uri::Authority;
use axum::http::{HeaderValue, Method, header};
use std::time::Duration;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

/// How long a browser may remember a preflight's answer.
const PREFLIGHT_AGE: Duration = Duration::from_secs(3600);

/// Why a list of origins cannot be used.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum CorsError {
    #[error("`{0}` is not an origin: it must be scheme://host or scheme://host:port, or * alone for any")]
    NotAnOrigin(String),
    #[error("`{0}` is not what a browser sends as an origin; that is `{1}`")]
    NotAsSent(String, String),
    #[error("the origin * allows every page, so no other can stand beside it")]
    AnyAndMore,
}

/// The layer for pages of `origins`; none where there are none. Cookies and the like are never allowed: the API does not
/// look at them, and pages send their key themselves.
///
/// # Errors
/// What is not an origin, and one in a form that no browser sends and that could never match.
pub fn cors(origins: &[String]) -> Result<Option<CorsLayer>, CorsError> {
    let allowed = match origins {
        [] => return Ok(None),
        [any] if any == "*" => AllowOrigin::from(Any),
        _ if origins.iter().any(|o| o == "*") => return Err(CorsError::AnyAndMore),
        _ => AllowOrigin::list(origins.iter().map(|o| origin(o)).collect::<Result<Vec<_>, _>>()?),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        // Clients add headers of their own; without credentials, none of them gives away anything.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([X_REQUEST_ID, header::RETRY_AFTER])
        .max_age(PREFLIGHT_AGE);
    Ok(Some(layer))
}

fn origin(text: &str) -> Result<HeaderValue, CorsError> {
    let wrong = || CorsError::NotAnOrigin(text.into());
    let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
    let scheme_fits = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
    if !scheme.bytes().all(scheme_fits) || !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Err(wrong());
    }
    // A slash at the end is the usual slip.
    let authority: Authority = rest.strip_suffix('/').unwrap_or(rest).parse().map_err(|_| wrong())?;
    let (host, port) = (authority.host(), authority.port());
    let (named, number) = (authority.as_str().len() - host.len(), port.as_ref().map_or(0, |p| p.as_str().len() + 1));
    if host.is_empty() || host.contains('*') || named != number {
        return Err(wrong());
    }
    let default =
        matches!((&*scheme.to_ascii_lowercase(), authority.port_u16()), ("http", Some(80)) | ("https", Some(443)));
    let port = port.filter(|_| !default).map(|p| format!(":{p}")).unwrap_or_default();
    let sent = format!("{}://{}{port}", scheme.to_ascii_lowercase(), host.to_ascii_lowercase());
    if sent != text {
        return Err(CorsError::NotAsSent(text.into(), sent));
    }
    HeaderValue::from_str(text).map_err(|_| wrong())
}
