//! `contrib:τ`: as many experts as it takes to gather a share τ of what the native ones contribute to the output.

use super::{GateView, Router, RouterEntry, Rule};
use crate::moe::RoutingBuilder;
use crate::moe::calibration::Calibration;
use crate::types::MoeShape;
use std::sync::Arc;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "contrib",
    usage: "contrib:τ,cal=FILE",
    summary: "dynamic: the fewest of the native top-k0 that gather a share τ of their contribution, which is weight times \
              calibrated output norm",
    formula: "smallest prefix, by c_e = p_e·E‖y_e‖, of the top-k0 with Σc ≥ τ·(Σc of all k0)",
    example: "contrib:0.8,cal=policy.json",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let rule = Rule::Contribution { tau: args.share("τ", args.one_arg("τ")?)? };
        let calibration = args.calibration("contrib", shape)?;
        Ok(Box::new(Contrib { rule, calibration, top_k: shape.top_k }))
    },
};

struct Contrib {
    rule: Rule,
    calibration: Arc<Calibration>,
    top_k: usize,
}

impl Router for Contrib {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let norms_e = &self.calibration.layers[gate.layer].expert_norms_e;
        for token in gate.tokens() {
            out.choose(token.row, &self.rule.choose(&token, self.top_k, norms_e));
        }
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let Rule::Contribution { tau } = self.rule else { unreachable!("it is made with no other") };
        format!("k in 1..={}, share {tau} of the top-{0}'s contribution", shape.top_k)
    }
}
