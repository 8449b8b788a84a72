//! `oea:k'`: a few experts of each token's own, filled up with those that others have read anyway.
//!
//! Opportunistic Expert Activation (arXiv 2511.02237), in its simplified form. Alone in its batch, a token has exactly its
//! k' most probable experts: there the rule is `topk:k'`.

use super::together::Scope;
use super::{GateView, Router, RouterEntry};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "oea",
    usage: "oea:k'[,scope=decode|all]",
    summary: "by the batch: k' experts of the token's own, filled up to k0 from those that the other tokens in decoding (or all) \
              of the same tenant open; alone it is topk:k'",
    formula: "S = union of the tokens' top-k'; each token: its k0 most probable of S",
    example: "oea:1",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        let k = args.count("k'", args.one_arg("k'")?, 1..=shape.top_k)?;
        Ok(Box::new(Oea { k, scope: Scope::option(args)?, top_k: shape.top_k }))
    },
};

struct Oea {
    /// k', the experts that a token opens.
    k: usize,
    scope: Scope,
    top_k: usize,
}

impl Router for Oea {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        // A token's own k' are in S and more probable than whatever else of S it has: "its own, then filled up" is
        // "its most probable of S".
        self.scope.route(gate, out, |together, open_e| {
            for token in together.tokens() {
                token.order_e[..self.k].iter().for_each(|&e| open_e[e as usize] = true);
            }
        });
    }

    fn batch_invariant(&self) -> bool {
        false
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let (own, whom) = (self.k, self.scope.describe(shape));
        format!("k in {own}..={}, {own} of a token's own and others' beside them, {whom}", shape.top_k)
    }
}
