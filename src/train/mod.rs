//! Training of the in-repo language models, on the routers that serve.
//!
//! ```text
//! recipe ─► data ─► windows ─► lm.forward ─► losses ─► backward ─► clip ─► AdamW ─┐
//!                      ▲                                                          │
//!                      └──────────────────────────────────────────────────────────┤
//!                           every n steps: evaluate, export (Hugging Face), state ◄┘
//! ```
//!
//! [`trainer`] is the loop, [`lm`] the model over the differentiable operations of `ops::grad`, [`recipe`] what a run
//! depends on, [`export`] the checkpoint that is served, [`report`] what is shown of a run.

pub mod analysis;
pub mod data;
pub mod export;
pub mod lm;
pub mod optim;
pub mod recipe;
pub mod report;
pub mod state;
pub mod trainer;

pub use trainer::{Job, Outcome, TrainError, Watch, read_log, train};
