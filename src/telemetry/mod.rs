//! What operators see of a running program besides its metrics: the log, and traces.

mod log;
#[cfg(feature = "otel")]
pub mod otel;

pub use log::{BoxedLayer, LogError, LogFormat, init, layer};
