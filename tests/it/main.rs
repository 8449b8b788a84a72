//! The integration tests: one binary, one module per subject.

mod checkpoint;
mod engine;
mod golden;
mod hub;
mod loading;
mod memory;
mod mock_hub;
mod readme;
mod savings;
mod shared_data;
mod support;
mod tidy;
