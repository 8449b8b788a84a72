//! Estimators of a token's difficulty: one file each, one line each in [`ESTIMATORS`].
//!
//! An estimate is causal (of a token and what stands before it), taken per token, and the same whatever else is in the
//! step. A [`Estimator::measure`] becomes a number c in 0..=1 by a table of quantiles that was frozen by calibration, or
//! without one by the estimator's own fixed map: never by the mean of a batch, which would let requests see one another.
//!
//! Every measure is large where the model is unsure, but for `hidden-norm` and `gradient-norm`, whose sign is a matter of
//! the checkpoint: `moe-calibrate` reports how each goes along with the true loss.

mod attention_entropy;
mod constant;
mod gradient_norm;
mod gradient_variance;
mod hidden_norm;
mod logit_lens;
mod perplexity_proxy;
mod router_entropy;
mod router_margin;
mod surprisal;

use super::{Signals, TokenGate};

/// A measure of how hard a token is.
pub trait Estimator: Send + Sync {
    /// What it reads beside the gate's probabilities.
    fn signals(&self) -> Signals {
        Signals::default()
    }

    /// Of one token, on any scale.
    fn measure(&self, token: &TokenGate<'_>) -> f32;

    /// The fixed map of a measure to 0..=1, for models that are not calibrated.
    fn squash(&self, measure: f32) -> f32;
}

/// One line of the table of estimators.
pub struct EstimatorEntry {
    pub name: &'static str,
    /// With its argument, if it takes one.
    pub usage: &'static str,
    /// The measure, and the map to 0..=1.
    pub formula: &'static str,
    /// Whether its measure can be calibrated.
    pub calibrates: bool,
    /// Makes it of what stands after the colon, if anything does.
    parse: Parse,
}

/// Makes an estimator of its argument.
type Parse = fn(Option<&str>) -> Result<Box<dyn Estimator>, String>;

/// Every estimator there is.
pub static ESTIMATORS: &[EstimatorEntry] = &[
    router_entropy::ENTRY,
    router_margin::ENTRY,
    hidden_norm::ENTRY,
    gradient_norm::ENTRY,
    gradient_variance::ENTRY,
    attention_entropy::ENTRY,
    surprisal::ENTRY,
    logit_lens::ENTRY,
    perplexity_proxy::ENTRY,
    constant::ENTRY,
];

impl EstimatorEntry {
    /// The estimator without an argument.
    ///
    /// # Errors
    /// One that needs an argument.
    pub fn build(&self) -> Result<Box<dyn Estimator>, String> {
        (self.parse)(None)
    }
}

/// The estimator that `text` names, `NAME` or `NAME:ARGUMENT`, with its line of the table.
///
/// # Errors
/// A name that no estimator has, or an argument that does not suit it.
pub fn estimator(text: &str) -> Result<(Box<dyn Estimator>, &'static EstimatorEntry), String> {
    let (name, argument) = text.split_once(':').map_or((text, None), |(name, argument)| (name, Some(argument)));
    let Some(entry) = ESTIMATORS.iter().find(|entry| entry.name == name) else {
        let usages: Vec<&str> = ESTIMATORS.iter().map(|entry| entry.usage).collect();
        return Err(format!("there is no estimator `{name}`; there are {}", usages.join(", ")));
    };
    Ok(((entry.parse)(argument)?, entry))
}

/// Refuses an argument.
fn no_argument(name: &str, argument: Option<&str>) -> Result<(), String> {
    argument.map_or(Ok(()), |argument| Err(format!("{name} takes no argument; got {argument}")))
}

/// H(p) / log n, for p of n values: in 0..=1.
fn entropy_share(probabilities: &[f32]) -> f32 {
    let nats: f32 = probabilities.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
    nats / (probabilities.len().max(2) as f32).ln()
}

/// pᵀ·G·q of the gate, G `[E, E]`.
fn quadratic(p_e: &[f32], gram_ee: &[f32], q_e: &[f32]) -> f32 {
    let rows = gram_ee.chunks_exact(q_e.len());
    p_e.iter().zip(rows).map(|(p, row)| p * row.iter().zip(q_e).map(|(g, q)| g * q).sum::<f32>()).sum()
}

/// The largest ‖w_e‖² of the gate.
fn widest(gram_ee: &[f32], experts: usize) -> f32 {
    gram_ee.iter().step_by(experts + 1).copied().fold(f32::MIN_POSITIVE, f32::max)
}

#[cfg(test)]
mod tests;
