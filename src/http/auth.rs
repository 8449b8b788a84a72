//! API keys.

use super::error::ApiError;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// Bytes of a key: fewer can be guessed, more do not fit the head of a request.
const KEY_BYTES: RangeInclusive<usize> = 16..=1024;

/// The keys that open the API. Only hashes are kept: these are of one length, which a comparison cannot tell then.
#[derive(Clone)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

/// Why keys cannot be used. The messages never hold a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read the API keys of {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{0} holds no API key; it must have one per line (blank lines and lines that begin with # do not count)")]
    None(PathBuf),
    #[error("the API key {place} has {bytes} bytes; it must have {} to {} (make one with `openssl rand -hex 32`)", KEY_BYTES.start(), KEY_BYTES.end())]
    Length { place: String, bytes: usize },
    #[error("the API key {place} holds a character that is not visible ASCII (white space counts as such)")]
    Character { place: String },
}

impl ApiKeys {
    /// The keys of the command line or the environment and those of a file, one per line. `None` where neither is given.
    ///
    /// # Errors
    /// A file without keys, and a key that is empty, too short, too long, or not visible ASCII: a server that was meant
    /// to have a key must not come up without.
    pub fn gather(given: &[String], file: Option<&Path>) -> Result<Option<Self>, KeyError> {
        let mut keys = Vec::new();
        for (i, key) in given.iter().enumerate() {
            keys.push(check(key, || format!("given as number {}", i + 1))?);
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|source| KeyError::Read { path: path.into(), source })?;
            let lines = text.lines().map(str::trim).enumerate();
            let before = keys.len();
            for (i, key) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
                keys.push(check(key, || format!("in line {} of {}", i + 1, path.display()))?);
            }
            if keys.len() == before {
                return Err(KeyError::None(path.into()));
            }
        }
        Ok(if keys.is_empty() { None } else { Some(Self(keys)) })
    }

    /// Whether `token` is one of the keys, in a time that does not depend on which one or on how much of it fits.
    fn hold(&self, token: &[u8]) -> bool {
        let token = hash(token);
        self.0.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&token)).into()
    }
}

fn check(key: &str, place: impl Fn() -> String) -> Result<[u8; 32], KeyError> {
    if !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(KeyError::Character { place: place() });
    }
    if !KEY_BYTES.contains(&key.len()) {
        return Err(KeyError::Length { place: place(), bytes: key.len() });
    }
    Ok(hash(key.as_bytes()))
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Asks for a key on every path of `routes` but those of `open`, which are compared as they stand.
pub(super) fn require_key(routes: Router, keys: ApiKeys, open: &'static [&'static str]) -> Router {
    routes.layer(from_fn_with_state((Arc::new(keys), open), authenticate))
}

async fn authenticate(
    State((keys, open)): State<(Arc<ApiKeys>, &'static [&'static str])>,
    request: Request,
    next: Next,
) -> Response {
    if open.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    match bearer(request.headers()) {
        Some(token) if keys.hold(token) => next.run(request).await,
        Some(_) => refuse("this API key is not one of the server's", "Bearer error=\"invalid_token\""),
        None => refuse("this server asks for an API key: send the header `Authorization: Bearer KEY`", "Bearer"),
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

fn refuse(message: &str, challenge: &'static str) -> Response {
    let mut response = ApiError::unauthorised(message).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    response
}
