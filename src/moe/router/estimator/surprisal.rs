//! `surprisal`: how unlikely the model found the token that it is now reading.
//!
//! It is known once the logits of the position before are there. In decoding they always are; a prompt is therefore
//! computed token by token, like a completion, so that the routing of a token never depends on how it came.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "surprisal",
    usage: "surprisal",
    formula: "s = −log p(token | those before it), ∞ for the first; c = 1 − e^(−s)",
    calibrates: true,
    parse: |argument| {
        no_argument("surprisal", argument)?;
        Ok(Box::new(Surprisal))
    },
};

struct Surprisal;

impl Estimator for Surprisal {
    fn signals(&self) -> Signals {
        Signals { surprisal: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        match token.position {
            // Nothing stands before it: nothing is less expected.
            0 => f32::INFINITY,
            _ => token.surprisal,
        }
    }

    fn squash(&self, measure: f32) -> f32 {
        1.0 - (-measure).exp()
    }
}
