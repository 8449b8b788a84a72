//! `constant:c`: the same for every token, which makes the rule static.

use super::{Estimator, EstimatorEntry, TokenGate};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "constant",
    usage: "constant:c",
    formula: "c, from 0 to 1",
    calibrates: false,
    parse: |argument| match argument.map(|c| (c, c.parse::<f32>())) {
        Some((_, Ok(c))) if (0.0..=1.0).contains(&c) => Ok(Box::new(Constant(c))),
        Some((c, _)) => Err(format!("constant must be a number in [0, 1]; got {c}")),
        None => Err("constant needs its value: constant:0.5".into()),
    },
};

struct Constant(f32);

impl Estimator for Constant {
    fn measure(&self, _: &TokenGate<'_>) -> f32 {
        self.0
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
