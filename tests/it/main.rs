//! The integration tests: one binary, one module per subject.

mod engine;
mod golden;
mod readme;
mod savings;
mod support;
mod tidy;
