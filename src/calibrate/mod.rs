//! Calibration: what a checkpoint's mixtures do on a text, and the cheapest routing that a budget buys.
//!
//! ```text
//! text ─► windows ─► trace (probe) ─► statistics ─► options per layer ─► KL (engine) ─► knapsack ─► held-out check ─► file
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `text.rs` | texts and the windows that are drawn of them |
//! | `trace.rs` | native routing seen from inside: choices, measures, norms |
//! | `curves.rs` | which parameter of a rule gives which mean k, exactly |
//! | `statistics.rs`, `correlation.rs` | what is written of a layer, and how estimators go along with the true loss |
//! | `target.rs` | budgets and what they pay for |
//! | `options.rs`, `knapsack.rs` | what a layer can do, and the best choice over all layers |
//! | `measure.rs`, `state.rs` | KL to native routing through the engine, and what a stopped run had measured |
//! | `check.rs` | the dynamic policy beside static routing on text that neither was fitted to |
//! | `run.rs`, `summary.rs` | all of it in order, and what is said of it |
//!
//! Legend: T tokens of the trace, E experts, k0 the checkpoint's own experts per token.

mod check;
mod correlation;
mod curves;
mod knapsack;
mod measure;
mod options;
mod run;
mod state;
mod statistics;
mod summary;
mod target;
mod text;
mod trace;

pub use check::{Checked, Tried};
pub use correlation::{Correlation, Correlations, spearman};
pub use curves::{Signal, Steps};
pub use knapsack::{Item, Knapsack};
pub use run::{Outcome, calibrate};
pub use summary::{correlations, summary};
pub use target::{Budget, Scope, Target};
pub use text::{Source, Windows, bundled, read};
pub use trace::{LayerTrace, Trace};

use crate::engine::{LaunchError, StartError};
use crate::eval::LmError;
use crate::model::LoadError;
use crate::types::SpecError;
use std::io;
use std::path::{Path, PathBuf};

/// What is asked of a calibration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Statistics alone without it.
    pub target: Option<Target>,
    /// Of the text that is calibrated on.
    pub tokens: usize,
    /// Of the text that the policy is checked on.
    pub held_out_tokens: usize,
    /// Tokens of a window.
    pub window: usize,
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { target: None, tokens: 4096, held_out_tokens: 4096, window: 256, seed: 1234 }
    }
}

/// Why there is no calibration.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// Something that was asked for and cannot be; the message holds the flag, the limit, what was given and what helps.
    #[error("{0}")]
    Asked(String),
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Router(#[from] SpecError),
    #[error("running the model: {0}")]
    Device(#[from] candle_core::Error),
    #[error("{0}; what was measured is kept, and the same command goes on from there")]
    Lm(#[from] LmError),
}

impl CalibrateError {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::File { path, error }
    }
}
