//! The integration tests: one binary, one module per subject.

mod bad_input;
mod chat;
mod chat_api;
mod checkpoint;
mod cli;
mod completions;
mod engine;
mod golden;
mod http;
mod http_infra;
mod http_metrics;
mod http_scripted;
mod http_transport;
mod hub;
mod loading;
mod memory;
mod mock_hub;
mod pages;
mod readme;
mod savings;
mod shared_data;
mod site;
mod support;
mod tidy;
