//! Spans of requests, sent to an OpenTelemetry collector over OTLP/HTTP.

use async_trait::async_trait;
use axum::http::{HeaderMap, Method, StatusCode};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Status, TraceContextExt, TracerProvider};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::time::Duration;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

/// Time for one batch of spans to reach the collector.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Collects spans and sends them in batches, from a thread of its own.
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Sends to the collector at `endpoint` (`http://host:4318`). The other `OTEL_…` variables count as in every SDK:
    /// `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, ….
    ///
    /// # Errors
    /// An endpoint that is not a URL.
    pub fn start(endpoint: &str) -> Result<Self, ExporterBuildError> {
        let endpoint = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        let agent = ureq::Agent::config_builder().timeout_global(Some(SEND_TIMEOUT)).http_status_as_error(false);
        let sender = Sender(agent.build().into());
        let exporter = SpanExporter::builder().with_http().with_http_client(sender).with_endpoint(endpoint).build()?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(env!("CARGO_PKG_NAME"));
        }
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build());
        Ok(Self(provider.build()))
    }

    /// The layer that hands spans over.
    pub fn layer<S>(&self) -> Box<dyn Layer<S> + Send + Sync>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let tracer = self.0.tracer(env!("CARGO_PKG_NAME"));
        tracing_opentelemetry::layer().with_tracer(tracer).with_location(false).with_threads(false).boxed()
    }

    /// Sends what is left and ends. It blocks, for up to the time that a batch has.
    pub fn stop(self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
    }
}

/// Makes a request's span part of the trace that the client's `traceparent` header names.
pub(crate) fn begin(span: &Span, headers: &HeaderMap) {
    let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
    // Without the layer, the field would only clutter the log.
    if span.set_parent(parent).is_ok() {
        span.record("otel.kind", "server");
    }
}

/// Notes what became of a request. Its span is named by its path if there is such a path: a scanner should not make a
/// name of each of its guesses.
pub(crate) fn head(span: &Span, method: &Method, path: &str, status: StatusCode) {
    span.set_attribute("http.response.status_code", i64::from(status.as_u16()));
    let context = span.context();
    let unknown = [StatusCode::UNAUTHORIZED, StatusCode::NOT_FOUND].contains(&status);
    context.span().update_name(if unknown { method.to_string() } else { format!("{method} {path}") });
    if status.is_server_error() {
        context.span().set_status(Status::error(status.to_string()));
    }
}

/// The HTTP client that models are downloaded with.
#[derive(Debug)]
struct Sender(ureq::Agent);

#[async_trait]
impl HttpClient for Sender {
    /// It blocks, which is fine in the thread of the batches.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let response = self.0.run(Request::from_parts(parts, &body[..]))?;
        let (parts, mut body) = response.into_parts();
        Ok(Response::from_parts(parts, body.read_to_vec()?.into()))
    }
}
