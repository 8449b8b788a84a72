//! The integration tests: one binary, one module per subject.

mod async_openai;
mod bad_input;
mod binary;
mod chat;
mod chat_api;
mod checkpoint;
mod cli;
mod completions;
mod engine;
mod eval;
mod eval_cli;
mod eval_golden;
mod eval_prompts;
mod golden;
mod http;
mod http_infra;
mod http_metrics;
mod http_scripted;
mod http_transport;
mod hub;
mod hub_datasets;
mod loading;
mod memory;
mod mock_hub;
mod moe_lm;
#[cfg(feature = "otel")]
mod otel;
mod pages;
mod process;
mod readme;
mod savings;
mod shared_data;
mod site;
mod support;
mod tidy;
mod train;
