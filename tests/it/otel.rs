//! Spans reach a collector. What it gets is protobuf, in which texts and ids stand as they are.

use crate::site::{Site, routes};
use moe_serve::http::wrap;
use moe_serve::telemetry::otel::Traces;
use std::sync::{Arc, Mutex};
use tracing_subscriber::layer::SubscriberExt;

/// The bytes of an id that is written in hexadecimal.
fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).filter(|w| *w == needle).count()
}

#[tokio::test]
async fn requests_are_spans_of_the_clients_trace() {
    let received = Arc::new(Mutex::new(Vec::new()));
    let collect = {
        let received = received.clone();
        axum::routing::post(async move |body: axum::body::Bytes| received.lock().unwrap().extend_from_slice(&body))
    };
    let collector = Site::plain(axum::Router::new().route("/v1/traces", collect)).await;
    let traces = Traces::start(&collector.url("/")).unwrap();
    // While there is but one subscriber, a span that another thread makes first is off for all.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let subscribed = tracing::subscriber::set_default(tracing_subscriber::registry().with(traces.layer()));
    let site = Site::plain(wrap(routes(), None, None)).await;
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let request = site.client.get(site.url("/numbers/3?secret=1")).header("x-request-id", "mine");
    let request = request.header("traceparent", format!("00-{trace}-{parent}-01"));
    request.send().await.unwrap().text().await.unwrap();
    assert_eq!(site.get("/nowhere").await.status(), 404);
    assert_eq!(site.get("/panic").await.status(), 500);
    drop((site, subscribed));
    tokio::task::spawn_blocking(|| traces.stop()).await.unwrap();

    let received = received.lock().unwrap();
    let text = String::from_utf8_lossy(&received);
    // The resource, the span's name, its attributes, and the state of the one that failed.
    let service = env!("CARGO_PKG_NAME");
    for wanted in [service, "GET /numbers/3", "http.response.status_code", "request_id", "mine", "500 Internal"] {
        assert!(text.contains(wanted), "no {wanted:?} in {text:?}");
    }
    assert!(!text.contains("secret"), "a query may hold what is not for a collector: {text:?}");
    // As its path alone, which tells what is asked for in vain.
    assert!(!text.contains("GET /nowhere"), "what does not exist makes no names: {text:?}");
    // One span is of the client's trace, below the client's own; the others have traces of their own.
    assert_eq!((count(&received, &bytes(trace)), count(&received, &bytes(parent))), (1, 1), "{text:?}");
}
