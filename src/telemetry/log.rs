//! The log of a program: lines on standard error, as text or as JSON.

use std::io::IsTerminal;
use std::str::FromStr;
use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object per line: `timestamp`, `level`, `message`, the fields of the event, and those of the request in `span`.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("must be text or json; got `{text}`")),
        }
    }
}

/// Why the log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("RUST_LOG is not a filter such as `info` or `moe_serve=debug`: {0}")]
    Filter(#[from] tracing_subscriber::filter::FromEnvError),
    #[error("the log was set up before: {0}")]
    Again(#[from] tracing_subscriber::util::TryInitError),
}

/// A layer of the program's subscriber.
pub type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Sends the log to standard error, filtered by `RUST_LOG` (`info` without it), and spans to `traces`.
///
/// # Errors
/// A filter that cannot be read, and a second call.
pub fn init(format: LogFormat, traces: Option<BoxedLayer>) -> Result<(), LogError> {
    let filter = EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env()?;
    let mut layers: Vec<BoxedLayer> = vec![layer(format, std::io::stderr, std::io::stderr().is_terminal())];
    layers.extend(traces);
    Registry::default().with(layers).with(filter).try_init()?;
    if format == LogFormat::Json {
        // What reads JSON reads nothing else: panics are lines like any other.
        std::panic::set_hook(Box::new(|panic| {
            let backtrace = std::backtrace::Backtrace::capture();
            tracing::error!(%panic, %backtrace, "a thread panicked");
        }));
    }
    Ok(())
}

/// Writes events to `writer`.
pub fn layer<S, W>(format: LogFormat, writer: W, colours: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => lines.with_ansi(colours).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    }
}
