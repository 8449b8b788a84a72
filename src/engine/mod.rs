//! The engine: one thread that owns the model, the KV cache and the scheduler, and runs step after step.
//!
//! `api` is what the rest of the program sees; `core` is a step; `worker` is the thread and its queues.

pub mod api;
mod core;
mod metrics;
mod sampler;
mod sequence;
mod text;
mod worker;

pub use core::{EngineConfig, StartError};
pub use text::{Text, TextError};
pub use worker::Engine;
