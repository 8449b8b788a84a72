//! `ratio:t`: experts within a factor of the best one (min-p routing; at k0 = 2 this is the rule of NAEE,
//! arXiv 2402.14800, and AdapMoE, arXiv 2408.10284).

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "ratio",
    usage: "ratio:t[,min=a][,max=b] (max is k0 unless given, up to E)",
    summary: "dynamic: experts of at least t times the best one's probability",
    formula: "k = #{e : p_e ≥ t·p(1)}, clamped to min..max",
    example: "ratio:0.5",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let t = args.share("t", args.one_arg("t")?)?;
        let k = args.bounds(shape.top_k, shape.experts)?;
        Ok(Box::new(Ratio { t, k }))
    },
};

struct Ratio {
    t: f32,
    k: RangeInclusive<usize>,
}

impl Router for Ratio {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        for token in gate.tokens() {
            let floor = self.t * token.probs_e[token.order_e[0] as usize];
            let k = token.count_at_least(floor).clamp(*self.k.start(), *self.k.end());
            choose_top(&token, k, out);
        }
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, _: &MoeShape) -> String {
        format!(
            "k in {}..={}, experts of at least {} times the best one's probability",
            self.k.start(),
            self.k.end(),
            self.t
        )
    }
}
