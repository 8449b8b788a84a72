//! `router-margin`: how close the gate's second choice comes to its first.

use super::{Estimator, EstimatorEntry, TokenGate, no_argument};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "router-margin",
    usage: "router-margin",
    formula: "s = 1 − (p(1) − p(2)); c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("router-margin", argument)?;
        Ok(Box::new(RouterMargin))
    },
};

struct RouterMargin;

impl Estimator for RouterMargin {
    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        match token.order_e {
            [first, second, ..] => 1.0 - (token.probs_e[*first as usize] - token.probs_e[*second as usize]),
            _ => 0.0,
        }
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
