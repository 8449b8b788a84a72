//! The engine: one thread that owns the model, the KV cache and the scheduler, and runs step after step.
//!
//! `api` is what the rest of the program sees; `core` is a step; `worker` is the thread and its queues.

pub mod api;
mod core;
mod grammar;
mod metrics;
mod sampler;
mod schema;
mod score;
mod sequence;
mod text;
mod vocab;
mod worker;

pub use core::{EngineConfig, KvSize, RequestRouters, StartError};
pub use text::{Text, TextError};
pub use worker::Engine;
