//! `policy:FILE`: what `moe-calibrate` found for a budget, layer by layer.

use super::{GateView, Router, RouterEntry, Rule, Weights};
use crate::moe::RoutingBuilder;
use crate::moe::calibration::Calibration;
use crate::types::MoeShape;
use std::sync::Arc;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "policy",
    usage: "policy:FILE[,at=share]",
    summary: "calibrated: each layer's own rule and parameter for the budget that moe-calibrate was given, or for another \
              share of native routing's cost",
    formula: "rule of layer l: static k, share of probability or of contribution, or threshold; k ≤ k0",
    example: "policy:policy.json",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let file = args.one_arg("FILE")?;
        let at = args.option_share("at")?;
        let calibration = args.open(file, shape)?;
        let Some(table) = &calibration.policy else {
            return Err(args.error(format!("{file} has statistics alone: give moe-calibrate a --target-flops")));
        };
        let rung = table.rung(at.map_or(table.target, f64::from));
        let (rules, mean_k) = (rung.rules.clone(), rung.mean_k);
        if table.lsq {
            args.weights = Weights::Lsq;
        }
        Ok(Box::new(Calibrated { rules, mean_k, calibration, top_k: shape.top_k }))
    },
};

struct Calibrated {
    rules: Vec<Rule>,
    mean_k: f64,
    calibration: Arc<Calibration>,
    top_k: usize,
}

impl Router for Calibrated {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let norms_e = &self.calibration.layers[gate.layer].expert_norms_e;
        for token in gate.tokens() {
            out.choose(token.row, &self.rules[gate.layer].choose(&token, self.top_k, norms_e));
        }
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let dynamic = self.rules.iter().filter(|rule| rule.dynamic()).count();
        format!(
            "k in 1..={}, {:.2} on average over the calibration text; {dynamic} of {} layers dynamic",
            shape.top_k,
            self.mean_k,
            self.rules.len()
        )
    }
}
