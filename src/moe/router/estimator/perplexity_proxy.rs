//! `perplexity-proxy`: the entropy of the hidden state, taken as if its values were logits.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument, softmax_entropy_share};

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
        softmax_entropy_share(token.hidden_d)
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
