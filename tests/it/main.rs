//! The integration tests: one binary, one module per subject.

mod checkpoint;
mod golden;
mod hub;
mod loading;
mod memory;
mod mock_hub;
mod shared_data;
mod support;
