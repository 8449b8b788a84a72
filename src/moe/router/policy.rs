//! `policy:FILE`: what `moe-calibrate` found for a budget, layer by layer.

use super::{GateView, Router, RouterEntry, Rule, SpecArgs, Weights};
use crate::moe::RoutingBuilder;
use crate::moe::calibration::{Calibration, PolicyTable};
use crate::types::{MoeShape, SpecError};
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
        let table = args.policy_of(file, &calibration)?;
        calibrated(args, shape, &calibration, table, at.map(f64::from))
    },
};

/// The rung of `table` for a share of native routing's cost, or for the table's own target.
pub(super) fn calibrated(
    args: &mut SpecArgs<'_>,
    shape: &MoeShape,
    calibration: &Arc<Calibration>,
    table: &PolicyTable,
    share: Option<f64>,
) -> Result<Box<dyn Router>, SpecError> {
    let rung = table.rung(share.unwrap_or(table.target));
    if table.lsq {
        args.weights = Weights::Lsq;
    }
    let (rules, mean_k, calibration) = (rung.rules.clone(), rung.mean_k, calibration.clone());
    Ok(Box::new(Calibrated { rules, mean_k, calibration, top_k: shape.top_k }))
}

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
