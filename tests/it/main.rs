//! The integration tests: one binary, one module per subject.

mod bad_input;
mod checkpoint;
mod cli;
mod engine;
mod golden;
mod http;
mod http_metrics;
mod http_scripted;
mod hub;
mod loading;
mod memory;
mod mock_hub;
mod readme;
mod savings;
mod shared_data;
mod support;
mod tidy;
