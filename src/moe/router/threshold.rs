//! `threshold:θ`: experts above an absolute probability.

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "threshold",
    usage: "threshold:θ[,min=a][,max=b] (max is k0 unless given, up to E)",
    summary: "dynamic: experts of at least probability θ, and always the best one",
    formula: "k = #{e : p_e ≥ θ}, clamped to min..max",
    example: "threshold:0.2",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let theta = args.share("θ", args.one_arg("θ")?)?;
        let k = args.bounds(shape.top_k, shape.experts)?;
        Ok(Box::new(Threshold { theta, k }))
    },
};

struct Threshold {
    theta: f32,
    k: RangeInclusive<usize>,
}

impl Router for Threshold {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        for token in gate.tokens() {
            let k = token.count_at_least(self.theta).clamp(*self.k.start(), *self.k.end());
            choose_top(&token, k, out);
        }
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, _: &MoeShape) -> String {
        format!("k in {}..={}, experts of at least probability {}", self.k.start(), self.k.end(), self.theta)
    }
}
