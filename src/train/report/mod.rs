//! A training run as it is recorded and shown: the lines of its log, the document that `results.json` holds, one
//! self-contained HTML page with curves, a summary for the terminal, and a table that compares runs.
//!
//! ```text
//! log.jsonl ─► Log ─┐
//!                   ├─► series (smoothed, thinned) ─► html
//! results.json ─► RunResults ─► terminal, compare
//! ```

mod html;
mod log;
mod routing;
mod series;
mod terminal;
#[cfg(test)]
mod tests;

pub use html::html;
pub use log::{EvalLog, Log, LogError, LogLine, StepLog};
pub use terminal::{compare_markdown, compare_terminal, summary};

use serde::{Deserialize, Serialize};

/// Version of [`RunResults`]' form; raised when a field changes its meaning.
pub const SCHEMA: u32 = 1;

/// What a run was and found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResults {
    pub schema: u32,
    /// Name of the recipe.
    pub name: String,
    /// Which of the recipe's variants, where it has several.
    pub variant: Option<String>,
    /// The recipe in TOML, resolved: what the run really ran on.
    pub recipe: String,
    pub seed: u64,
    /// What it ran on: `cpu (AVX-512, 2 threads)`.
    pub device: String,
    /// What products were rounded to: `f32`, `bf16`.
    pub precision: String,
    /// The program's version.
    pub version: String,
    /// When the run began, RFC 3339.
    pub started: String,
    /// Wall time of training without evaluations, over all resumptions.
    pub train_seconds: f64,
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    pub parameters: u64,
    /// Parameters that compute a token at the mean number of experts.
    pub parameters_active: u64,
    pub peak_memory_bytes: Option<u64>,
    /// Facts of the data, by name.
    pub data: serde_json::Value,
    /// None where no held-out text was evaluated.
    pub final_eval: Option<EvalLog>,
    /// None of fewer than two evaluations.
    pub perplexity_interval: Option<Interval>,
    pub evals: Vec<EvalLog>,
    /// None of a dense model.
    pub routing: Option<RoutingAnalysis>,
    pub samples: Vec<Sample>,
}

/// Mean and interval over a run's last evaluations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// How many evaluations it is over.
    pub evaluations: usize,
    /// Its confidence: 0.95.
    pub level: f64,
}

/// What analysis of the final model on held-out text found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingAnalysis {
    pub layers: Vec<LayerRouting>,
}

/// Routing of one mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerRouting {
    /// Index of the layer in the model.
    pub layer: usize,
    /// Mean over tokens of H(p)/log E: 0 where the router is certain, 1 where all experts are equal to it.
    #[serde(deserialize_with = "log::number")]
    pub entropy: f64,
    /// Each expert's share of the layer's rows.
    pub utilisation_e: Vec<f64>,
    /// Standard deviation of these shares.
    pub utilisation_std: f64,
    /// Tokens that had k experts, by k.
    pub k_histogram: Vec<u64>,
    pub classes: Vec<ClassRow>,
}

/// Which experts compute the tokens of a class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassRow {
    pub class: String,
    pub tokens: u64,
    /// Each expert's share of the class' rows.
    pub share_e: Vec<f64>,
}

/// Text that the final model wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub prompt: String,
    /// What follows the prompt.
    pub text: String,
}

/// A `results.json` that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    #[error("{0}; give the results.json of a run of moe-train")]
    Form(#[from] serde_json::Error),
    #[error(
        "its schema is {found}, but this program reads schema {SCHEMA}; use the version of moe-train that wrote it"
    )]
    Schema { found: u32 },
}

impl RunResults {
    /// Reads a `results.json`.
    ///
    /// # Errors
    /// When it is none, or one of another schema.
    pub fn parse(json: &str) -> Result<Self, ResultsError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let Version { schema: found } = serde_json::from_str(json)?;
        if found != SCHEMA {
            return Err(ResultsError::Schema { found });
        }
        Ok(serde_json::from_str(json)?)
    }

    /// Over the time of training; none where that is not known.
    pub fn tokens_per_second(&self) -> Option<f64> {
        (self.train_seconds > 0.0).then(|| self.tokens as f64 / self.train_seconds)
    }

    /// `name`, and the variant if there is one.
    pub fn title(&self) -> String {
        match &self.variant {
            Some(variant) => format!("{} · {variant}", self.name),
            None => self.name.clone(),
        }
    }
}
