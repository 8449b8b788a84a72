//! The engine: one thread that owns the model, the KV cache and the scheduler, and runs step after step.
//!
//! `api` is what the rest of the program sees; `core` is a step; `worker` is the thread and its queues.

pub mod api;
mod budget;
mod core;
mod events;
mod grammar;
mod launch;
mod metrics;
mod sampler;
mod schema;
mod score;
mod sequence;
mod text;
mod vocab;
mod worker;

pub use core::{EngineConfig, KvSize, RequestRouters, StartError};
pub use launch::{Found, LaunchError, Launched, Opened, calibrations, default_name};
pub use text::{Text, TextError};
pub use worker::Engine;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the engine's locks guard is never left half-changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
