//! moe-serve: serves pretrained Mixture-of-Experts checkpoints with dynamic routers.
pub mod engine;
pub mod http;
pub mod model;
pub mod moe;
pub mod ops;
pub mod sched;
pub mod types;
pub mod wire;
