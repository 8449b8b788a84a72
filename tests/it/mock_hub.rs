//! A Hugging Face hub of one repository, a model's or a data set's, on 127.0.0.1: as much of it as a client sees.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::json;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

/// The id of the repository.
pub const ID: &str = "acme/tiny-moe";

/// One commit.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    pub sha: String,
    pub files: BTreeMap<String, Vec<u8>>,
}

/// What goes wrong with a file.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Ends the connection after this many bytes of each answer.
    Break(usize),
    /// Sends a well-formed answer of this many bytes at most.
    Short(usize),
    /// Sends the head and this many bytes of the content, and then nothing more.
    Stall(usize),
    /// Sends the whole file whatever range was asked for.
    NoRanges,
}

/// What the hub holds and how it behaves; tests change it while it runs.
#[derive(Debug, Default)]
pub struct World {
    /// By branch, tag or full commit.
    pub revisions: BTreeMap<String, Commit>,
    /// By file name; each fault is used up as often as it says.
    pub faults: BTreeMap<String, (Fault, usize)>,
    /// Status for requests without this token.
    pub gate: Option<(u16, String)>,
    /// Status for everything.
    pub down: Option<u16>,
    /// Files of this ending are redirected to a content store, as large files are.
    pub stored_elsewhere: Option<&'static str>,
    /// What `main` becomes once it has been listed.
    pub after_listing: Option<Commit>,
    pub requests: Vec<Seen>,
}

/// A request that came in.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub token: Option<String>,
    pub range: Option<String>,
}

pub struct MockHub {
    pub url: String,
    world: Arc<Mutex<World>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl MockHub {
    /// Serves `files` as branch `main`, commit a0a0….
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let world = Arc::new(Mutex::new(World::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(answer).with_state((world.clone(), url.clone()));
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        let hub = Self { url, world, runtime: Some(runtime) };
        hub.publish("main", "a0", files);
        hub
    }

    /// Points `revision` (and its full commit) to `files`; the commit is `letters` twenty times.
    pub fn publish(&self, revision: &str, letters: &str, files: BTreeMap<String, Vec<u8>>) -> String {
        let sha = letters.repeat(20);
        let commit = Commit { sha: sha.clone(), files };
        let mut world = self.world();
        world.revisions.insert(revision.into(), commit.clone());
        world.revisions.insert(sha.clone(), commit);
        sha
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// The file names asked for so far, each as often as it was; then forgets them.
    pub fn take_requests(&self) -> Vec<Seen> {
        std::mem::take(&mut self.world().requests)
    }

    /// Ends the server: from here on connections are refused.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
        }
    }
}

impl Drop for MockHub {
    fn drop(&mut self) {
        self.stop();
    }
}

pub fn etag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

async fn answer(
    State((world, url)): State<(Arc<Mutex<World>>, String)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let header = |name: &str| headers.get(name).map(|v| v.to_str().unwrap().to_string());
    let (token, range) = (header("authorization"), header("range"));
    let path = uri.path().to_string();
    let mut world = world.lock().unwrap();
    world.requests.push(Seen { path: path.clone(), token: token.clone(), range: range.clone() });
    assert_eq!(method, Method::GET);
    if let Some(status) = world.down {
        return status_page(status);
    }
    if let Some((status, wanted)) = &world.gate
        && token != Some(format!("Bearer {wanted}"))
    {
        return status_page(*status);
    }
    let api = ["models", "datasets"].map(|kind| format!("/api/{kind}/{ID}/revision/"));
    if let Some(revision) = api.iter().find_map(|api| path.strip_prefix(api)) {
        let commit = world.revisions.get(&revision.replace("%2F", "/")).cloned();
        if let Some(moved) = world.after_listing.take() {
            world.revisions.insert("main".into(), moved);
        }
        return match commit {
            None => status_page(404),
            Some(commit) => {
                let siblings: Vec<_> = commit.files.keys().map(|f| json!({"rfilename": f})).collect();
                axum::Json(json!({"id": ID, "sha": commit.sha, "private": false, "siblings": siblings})).into_response()
            }
        };
    }
    let elsewhere = path.strip_prefix("/store");
    let plain = elsewhere.unwrap_or(&path);
    let plain = plain.strip_prefix("/datasets").unwrap_or(plain).strip_prefix(&format!("/{ID}/resolve/"));
    let Some((revision, name)) = plain.and_then(|rest| rest.split_once('/')) else { return status_page(404) };
    let Some(commit) = world.revisions.get(&revision.replace("%2F", "/")).cloned() else { return status_page(404) };
    let Some(bytes) = commit.files.get(name) else { return status_page(404) };
    let moved = elsewhere.is_none() && world.stored_elsewhere.is_some_and(|end| name.ends_with(end));
    if moved {
        let headers = [
            ("x-repo-commit", commit.sha.clone()),
            ("x-linked-etag", format!("\"{}\"", etag(bytes))),
            ("x-linked-size", bytes.len().to_string()),
            ("etag", "\"of-the-pointer\"".into()),
            ("location", format!("{url}/store{path}")),
        ];
        return (StatusCode::FOUND, headers).into_response();
    }
    let asks_size = range.as_deref() == Some("bytes=0-0");
    let fault = world.faults.get_mut(name).filter(|(fault, left)| {
        // A status hits every request; the others only what carries the content.
        *left > 0 && (!asks_size || matches!(fault, Fault::Status(_)))
    });
    let fault = fault.map(|(fault, left)| {
        *left -= 1;
        *fault
    });
    file(bytes, &commit.sha, range.as_deref(), fault)
}

fn status_page(status: u16) -> Response {
    (StatusCode::from_u16(status).unwrap(), "{\"error\":\"mock\"}").into_response()
}

/// Bytes of a file, or of the range asked for, with the headers of the hub.
fn file(bytes: &[u8], sha: &str, range: Option<&str>, fault: Option<Fault>) -> Response {
    let total = bytes.len();
    let range = range.filter(|_| !matches!(fault, Some(Fault::NoRanges)));
    let range = range.and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
    let start: usize = range.map_or(0, |(start, _)| start.parse().unwrap());
    let end = range.and_then(|(_, end)| end.parse::<usize>().ok()).map_or(total, |e| (e + 1).min(total));
    if start >= total {
        return status_page(416);
    }
    let part = &bytes[start..end];
    let mut response = Response::builder()
        .status(if range.is_some() { 206 } else { 200 })
        .header("x-repo-commit", sha)
        .header("etag", format!("\"{}\"", etag(bytes)));
    if range.is_some() {
        response = response.header("content-range", format!("bytes {start}-{}/{total}", end - 1));
    }
    let body = match fault {
        Some(Fault::Status(status)) => return status_page(status),
        Some(Fault::Break(after)) => {
            response = response.header("content-length", part.len());
            let sent = Bytes::copy_from_slice(&part[..after.min(part.len())]);
            let broken = Err(std::io::Error::other("the mock hangs up"));
            // The pause lets what was sent out before the connection goes.
            let pause = futures::stream::once(async {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                broken
            });
            Body::from_stream(futures::stream::iter([Ok(sent)]).chain(pause))
        }
        Some(Fault::Stall(after)) => {
            response = response.header("content-length", part.len());
            let sent = Ok::<_, std::io::Error>(Bytes::copy_from_slice(&part[..after.min(part.len())]));
            Body::from_stream(futures::stream::iter([sent]).chain(futures::stream::pending()))
        }
        Some(Fault::Short(max)) => Body::from(part[..max.min(part.len())].to_vec()),
        Some(Fault::NoRanges) | None => Body::from(part.to_vec()),
    };
    response.body(body).unwrap()
}
