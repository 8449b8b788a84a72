//! `topk:K`: the same number of experts for every token and layer, the static control.

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "topk",
    usage: "topk:K",
    summary: "static: the K most probable experts",
    formula: "k = K",
    example: "topk:1",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        let k = args.count("K", args.one_arg("K")?, 1..=shape.experts)?;
        Ok(Box::new(TopK { k }))
    },
};

/// The `k` most probable experts, for every token and layer.
pub(super) struct TopK {
    pub(super) k: usize,
}

impl Router for TopK {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        gate.tokens().for_each(|token| choose_top(&token, self.k, out));
    }

    fn experts_max(&self) -> usize {
        self.k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let own = if self.k == shape.top_k { String::new() } else { format!(": {}", shape.top_k) };
        format!("k = {} of {} experts (the checkpoint's own{own})", self.k, shape.experts)
    }
}
