//! `perplexity-proxy`: the entropy of the hidden state, taken as if its values were logits.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument};
use crate::ops;

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "perplexity-proxy",
    usage: "perplexity-proxy",
    formula: "s = H(softmax(h)) / log D; c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("perplexity-proxy", argument)?;
        Ok(Box::new(PerplexityProxy))
    },
};

struct PerplexityProxy;

impl Estimator for PerplexityProxy {
    fn signals(&self) -> Signals {
        Signals { hidden: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        ops::softmax_entropy(token.hidden_d) / (token.hidden_d.len().max(2) as f32).ln()
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
