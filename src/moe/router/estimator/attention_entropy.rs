//! `attention-entropy`: how widely the layer's own attention looks around, against how far it could.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "attention-entropy",
    usage: "attention-entropy",
    formula: "s = (mean over heads of H(attention)) / log(position + 1), 0 at the first position; c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("attention-entropy", argument)?;
        Ok(Box::new(AttentionEntropy))
    },
};

struct AttentionEntropy;

impl Estimator for AttentionEntropy {
    fn signals(&self) -> Signals {
        Signals { attention_entropy: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        match token.position {
            // There is nothing to look at but itself.
            0 => 0.0,
            position => token.attention_entropy / (position as f32 + 1.0).ln(),
        }
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
