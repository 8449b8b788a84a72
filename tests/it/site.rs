//! Routes without a model behind real sockets.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::routing::{get, post};
use futures::StreamExt;
use moe_serve::http::{Transport, serve};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A server on a free port; cut off when dropped.
pub struct Site {
    pub address: SocketAddr,
    pub client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
}

impl Site {
    pub async fn start(app: Router, transport: Transport) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(serve(listener, app, transport, async {
            let _ = stopped.await;
        }));
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().unwrap();
        Self { address, client, stop: Some(stop), serving }
    }

    pub async fn plain(app: Router) -> Self {
        Self::start(app, Transport::default()).await
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// Tells the server to shut down.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits for the server's end.
    pub async fn ended(mut self) {
        tokio::time::timeout(Duration::from_secs(10), &mut self.serving).await.expect("the server ends").unwrap();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// `/hello`; `/echo` gives the body back; `/panic`; `/numbers/{n}` streams n lines, 10 ms apart; `/flood` never ends.
pub fn routes() -> Router {
    let lines = |n: u32| {
        let line = |i| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Ok::<_, Infallible>(Bytes::from(format!("{i}\n")))
        };
        Body::from_stream(futures::stream::iter(0..n).then(line))
    };
    let flood = || async { Body::from_stream(futures::stream::repeat_with(|| Ok::<_, Infallible>(vec![7; 1 << 16]))) };
    Router::new()
        .route("/hello", get(async || "hello"))
        .route("/health", get(async || "healthy"))
        .route("/metrics", get(async || "metrics"))
        .route("/", get(async || "page"))
        .route("/echo", post(async |body: Bytes| body))
        .route("/panic", get(async || -> &'static str { panic!("on purpose: {}", 7) }))
        .route("/numbers/{n}", get(async move |axum::extract::Path(n): axum::extract::Path<u32>| lines(n)))
        .route("/flood", get(flood))
}

/// What was logged in this thread while it lives.
pub struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    /// While there is but one subscriber, a line that another thread logs first is off for all.
    _second: tracing::Dispatch,
    _subscribed: tracing::subscriber::DefaultGuard,
}

impl Log {
    /// Logs JSON from the level debug on.
    pub fn json() -> Self {
        use tracing_subscriber::layer::SubscriberExt;
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = Writer(text.clone());
        let lines = moe_serve::telemetry::layer(moe_serve::telemetry::LogFormat::Json, move || writer.clone(), false);
        let filter = tracing_subscriber::EnvFilter::new("moe_serve=debug");
        let subscriber = tracing_subscriber::registry().with(filter).with(lines);
        Self {
            text,
            _second: tracing::Dispatch::new(tracing_subscriber::registry()),
            _subscribed: tracing::subscriber::set_default(subscriber),
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }

    pub fn lines(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}"))).collect()
    }

    /// Lines with this message, once there are `n` of them.
    pub async fn wait(&self, message: &str, n: usize) -> Vec<serde_json::Value> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let found: Vec<_> = self.lines().into_iter().filter(|l| l["message"] == message).collect();
            if found.len() >= n {
                return found;
            }
            assert!(tokio::time::Instant::now() < deadline, "not {n} lines of `{message}` in {}", self.text());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[derive(Clone)]
struct Writer(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
