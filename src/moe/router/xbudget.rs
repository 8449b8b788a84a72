//! `xbudget:N`: at most N experts per layer, step and tenant, those that matter most to the tokens together.
//!
//! S is to maximise the gate mass Σ_t Σ_{e in top-k0(t) ∩ S} p_{t,e} under |S| ≤ N. The objective is a sum over the
//! experts of S, each for itself, so no search is needed: the N of largest Σ_t p_{t,e} are the best there are. Where the
//! tokens' top-k0 are N experts or fewer, as for a token that is alone and N ≥ k0, all is as native.

use super::together::Scope;
use super::{GateView, Router, RouterEntry};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "xbudget",
    usage: "xbudget:N[,scope=decode|all]",
    summary: "by the batch: at most N distinct experts per layer, step and tenant for the tokens in decoding (or all), those that hold \
              most of their native gate mass",
    formula: "S = the N experts of largest Σ p_{t,e} over the tokens t with e in top-k0(t); each token: its k0 most probable of S",
    example: "xbudget:1",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        let experts = args.count("N", args.one_arg("N")?, 1..=shape.experts)?;
        Ok(Box::new(XBudget { experts, scope: Scope::option(args)?, top_k: shape.top_k }))
    },
};

struct XBudget {
    /// N.
    experts: usize,
    scope: Scope,
    top_k: usize,
}

impl Router for XBudget {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let experts = gate.shape.experts;
        let mut order_e: Vec<u16> = Vec::with_capacity(experts);
        let mut mass_e = vec![0.0f64; experts];
        self.scope.route(gate, out, |together, open_e| {
            mass_e.fill(0.0);
            for token in together.tokens() {
                for &e in &token.order_e[..self.top_k] {
                    mass_e[e as usize] += f64::from(token.probs_e[e as usize]);
                }
            }
            order_e.clear();
            order_e.extend(0..experts as u16);
            // Equal masses: the lower index first.
            order_e.sort_unstable_by(|&a, &b| mass_e[b as usize].total_cmp(&mass_e[a as usize]).then(a.cmp(&b)));
            order_e[..self.experts].iter().for_each(|&e| open_e[e as usize] = true);
        });
    }

    fn batch_invariant(&self) -> bool {
        false
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let (n, k, whom) = (self.experts, shape.top_k.min(self.experts), self.scope.describe(shape));
        format!("k = {k} of the {n} experts with most gate mass over the tenant's tokens, {whom}")
    }
}
