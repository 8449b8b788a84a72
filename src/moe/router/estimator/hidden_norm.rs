//! `hidden-norm`: the length of the gate's input. After an RMS norm it varies by the norm's weights alone.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument};
use crate::ops;

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "hidden-norm",
    usage: "hidden-norm",
    formula: "s = ‖h‖ / √D; c = s / (1 + s)",
    calibrates: true,
    parse: |argument| {
        no_argument("hidden-norm", argument)?;
        Ok(Box::new(HiddenNorm))
    },
};

struct HiddenNorm;

impl Estimator for HiddenNorm {
    fn signals(&self) -> Signals {
        Signals { hidden: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        ops::root_mean_square(token.hidden_d)
    }

    fn squash(&self, measure: f32) -> f32 {
        measure / (1.0 + measure)
    }
}
