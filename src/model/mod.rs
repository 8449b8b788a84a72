//! Checkpoints and the models made of them: families keyed by Hugging Face's `model_type`, loaded from the hub
//! or a directory, run over a paged KV cache.

mod config;
mod decoder;
mod error;
mod gguf;
mod hash;
pub mod hub;
mod load;
mod loader;
mod mixtral;
mod moe_lm;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod random;
mod rope;
mod weights;

pub use decoder::{CausalLm, StepInput};
pub use error::LoadError;
pub use hash::hash;
pub use load::{LoadOptions, Loaded, Source, load, load_from};
pub use weights::Weights;

use config::Config;
use loader::Loader;

/// One line of the family table.
pub struct Family {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// What is served, for the README and messages.
    pub summary: &'static str,
    build: fn(&mut Config, &mut Loader<'_>) -> Result<CausalLm, LoadError>,
}

/// Every family there is.
pub static FAMILIES: &[Family] =
    &[mixtral::FAMILY, olmoe::FAMILY, qwen2_moe::FAMILY, qwen3_moe::FAMILY, moe_lm::FAMILY];
