//! How fast a model runs on this machine, by itself: prompts and decoding without server, scheduler and text, beside what
//! the machine's memory and arithmetic allow at most.
//!
//! A model may be its config.json alone: weights are then made up, and the work is that of a checkpoint of its shape.

mod memory;
mod open;
mod report;
mod run;
mod settings;
mod steps;
mod traffic;

pub use open::{Subject, open};
pub use report::{Report, RunReport};
pub use run::run;
pub use settings::{Settings, routers};

use crate::model::LoadError;
use crate::types::SpecError;

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("there is nothing to measure: give --prompt lengths above 0, or --generate above 0")]
    Nothing,
    #[error(
        "--prompt {prompt} is longer than the {max_positions} positions of the model (max_position_embeddings); give at \
         most {max_positions}"
    )]
    Prompt { prompt: usize, max_positions: usize },
    #[error(
        "--context {context} and --generate {generate} are {} positions, but the model has {max_positions} \
         (max_position_embeddings); lower one of them", context + generate
    )]
    Context { context: usize, generate: usize, max_positions: usize },
    #[error(
        "the KV cache of these tests takes {needed_mib} MiB, but {free_mib} MiB of memory are free beside the model; lower \
         --batch, --context, --generate or --prompt"
    )]
    Memory { needed_mib: u64, free_mib: u64 },
    #[error("router `{0}` reads the surprisal of every token, which is not computed here; leave it out")]
    Surprisal(String),
    #[error("the model's logits are no numbers (token {row} of a step with router `{router}`)")]
    Logits { router: String, row: usize },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Router(#[from] SpecError),
    #[error("a step failed: {0}")]
    Step(#[from] candle_core::Error),
}
