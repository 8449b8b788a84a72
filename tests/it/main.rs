//! The integration tests: one binary, one module per subject.

mod bad_input;
mod cli;
mod golden;
mod http;
mod http_metrics;
mod http_scripted;
mod support;
