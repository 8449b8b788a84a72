//! `gradient-variance`: the trace of the router's Fisher information in h, in closed form.
//!
//! With e drawn from p, ∇_h log p_e = w_e − Wᵀp; the trace of its covariance is Σ p_e‖w_e‖² − ‖Wᵀp‖².

use super::{Estimator, EstimatorEntry, Signals, TokenGate, no_argument, quadratic, widest};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "gradient-variance",
    usage: "gradient-variance",
    formula: "s = (Σ p_e‖w_e‖² − pᵀGp) / max‖w_e‖²; c = s",
    calibrates: true,
    parse: |argument| {
        no_argument("gradient-variance", argument)?;
        Ok(Box::new(GradientVariance))
    },
};

struct GradientVariance;

impl Estimator for GradientVariance {
    fn signals(&self) -> Signals {
        Signals { gram: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        let (p_e, gram_ee) = (token.probs_e, token.gram_ee);
        let squares: f32 = p_e.iter().zip(gram_ee.iter().step_by(p_e.len() + 1)).map(|(p, g)| p * g).sum();
        (squares - quadratic(p_e, gram_ee, p_e)).max(0.0) / widest(gram_ee, p_e.len())
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
