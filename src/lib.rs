//! moe-serve: serves pretrained Mixture-of-Experts checkpoints with dynamic routers, and tells what that saved.
//!
//! ```text
//! tokens ─► schedule ─► forward ─► sample ─► commit ─► stream
//!              │            │
//!              │            └─ per layer: attention(paged KV) ─► gate z=Wh ─► Router ─► Routing (CSR) ─► grouped experts ─► combine
//!              └─ pure: which tokens of which sequences, which KV blocks
//! ```
//!
//! # Where things are
//!
//! | question | answer |
//! |---|---|
//! | how does a router choose experts? | [`moe::router`]: one file per router, one line each in `ROUTERS` |
//! | what is a routing? | [`moe::Routing`]: rows sorted by expert, R of them; nothing downstream knows k |
//! | where is a FLOP counted? | [`moe::cost`], and nowhere else |
//! | where is a KV block freed? | [`sched`]: `BlockPool` |
//! | where does a family differ? | [`model`]: one file per family, one line each in `FAMILIES` |
//! | which kernel runs? | [`ops`]: the CPU/CUDA seam |
//! | what happens in a step? | `engine/core.rs` |
//! | how do messages become a prompt? | [`chat`]: the checkpoint's own template |
//! | how is a router's quality measured? | [`eval`]: tasks, comparison with static controls, reports |
//! | how is a router fitted to a checkpoint and a budget? | [`calibrate`]: trace, KL per layer, knapsack, held-out check |
//! | how fast is a model here? | [`bench`]: prompts and decoding beside the machine's own ceilings |
//! | how is a model trained? | [`train`]: the loop, the recipes' meaning, the exported checkpoint |
//! | what does the API accept? | [`wire`] for the JSON, [`types::GenerateRequest::check`] for the limits |
//!
//! # Arrows (→ imports; everyone may import `types`)
//!
//! `moe → ops`; `model → moe, ops`; `engine → model, moe, ops, sched`; `http → engine::api, wire, chat, telemetry`;
//! `eval → engine, model, moe, ops, plot`; `calibrate → engine, eval, model, moe, ops`; `bench → engine, model, moe, ops, plot`;
//! `train → moe, ops, plot`. The type `moe::Routing` is
//! what `ops` computes by: the one arrow back. `tests/it/tidy.rs` checks them.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod engine;
pub mod eval;
pub mod http;
pub mod model;
pub mod moe;
pub mod ops;
pub mod plot;
pub mod sched;
pub mod telemetry;
pub mod train;
pub mod types;
pub mod wire;
