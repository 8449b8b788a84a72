//! `router-entropy`: how evenly the gate spreads its probability.

use super::{Estimator, EstimatorEntry, TokenGate, entropy_share, no_argument};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "router-entropy",
    usage: "router-entropy",
    formula: "s = H(p) / log E; c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("router-entropy", argument)?;
        Ok(Box::new(RouterEntropy))
    },
};

struct RouterEntropy;

impl Estimator for RouterEntropy {
    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        entropy_share(token.probs_e)
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
