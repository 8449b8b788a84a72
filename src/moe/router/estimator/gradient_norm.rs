//! `gradient-norm`: the length of a gradient of the router, in closed form. It is no gradient of the loss.
//!
//! With z = W·h, p = softmax(z) and G = W·Wᵀ: ∇_h logsumexp(z) = Wᵀp, whose squared length is pᵀGp; and ∇_h H(p) =
//! −Wᵀv with v = p ⊙ (log p + H), whose squared length is vᵀGv. Neither needs a backward pass.

use super::{Estimator, EstimatorEntry, Signals, TokenGate, quadratic, widest};

pub(super) const ENTRY: EstimatorEntry = EstimatorEntry {
    name: "gradient-norm",
    usage: "gradient-norm[:entropy]",
    formula: "s = ‖∇_h logsumexp(z)‖ / max‖w_e‖ = √(pᵀGp) / max‖w_e‖, of H(p) with :entropy; c = s",
    calibrates: true,
    parse: |argument| match argument {
        None => Ok(Box::new(GradientNorm { of_entropy: false })),
        Some("entropy") => Ok(Box::new(GradientNorm { of_entropy: true })),
        Some(other) => Err(format!("gradient-norm takes nothing or `entropy`; got {other}")),
    },
};

struct GradientNorm {
    of_entropy: bool,
}

impl Estimator for GradientNorm {
    fn signals(&self) -> Signals {
        Signals { gram: true, ..Default::default() }
    }

    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        let (p_e, gram_ee) = (token.probs_e, token.gram_ee);
        let square = if self.of_entropy {
            let log = |p: f32| if p > 0.0 { p.ln() } else { 0.0 };
            let entropy: f32 = p_e.iter().map(|p| -p * log(*p)).sum();
            let v_e: Vec<f32> = p_e.iter().map(|p| p * (log(*p) + entropy)).collect();
            quadratic(&v_e, gram_ee, &v_e)
        } else {
            quadratic(p_e, gram_ee, p_e)
        };
        (square.max(0.0) / widest(gram_ee, p_e.len())).sqrt()
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}
