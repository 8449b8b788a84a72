//! `native`: the checkpoint's own router, the baseline every rule must beat.

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "native",
    usage: "native",
    summary: "the checkpoint's own top-k0 (default)",
    formula: "k = k0",
    example: "native",
    parse: |args, shape| {
        args.no_args()?;
        Ok(Box::new(Native { k: shape.top_k }))
    },
};

struct Native {
    k: usize,
}

impl Router for Native {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        gate.tokens().for_each(|token| choose_top(&token, self.k, out));
    }

    fn describe(&self, shape: &MoeShape) -> String {
        format!("k = {} of {} experts, the checkpoint's own", self.k, shape.experts)
    }
}
