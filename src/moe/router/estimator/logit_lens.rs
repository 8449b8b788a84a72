//! `logit-lens`: how undecided the model is here already about the next token, by an early read-out (nostalgebraist,
//! "interpreting GPT: the logit lens", 2020) over a few tokens that are frequent, which keeps it cheap.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "logit-lens",
    usage: "logit-lens",
    formula: "s = H(softmax(LM head of the normed residual, on 32 frequent tokens)) / log 32; c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("logit-lens", argument)?;
        Ok(Box::new(LogitLens))
    },
};

struct LogitLens;

impl Estimator for LogitLens {
    fn signals(&self) -> Signals {
        Signals { lens: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        token.lens_entropy
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
