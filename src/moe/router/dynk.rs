//! `dynk:τ`: as many experts as it takes to gather a share τ of the gate's probability.
//!
//! The rule is the cumulative-probability ("top-p") routing of Huang et al., "Harder Tasks Need More Experts"
//! (arXiv 2403.07652), there trained in; here it is applied to a checkpoint trained with a fixed k0.

use super::rule::fewest;
use super::{GateView, Router, RouterEntry, TokenGate, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "dynk",
    usage: "dynk:τ[,mass=native|full][,min=a][,max=b] (max up to k0 with mass=native, up to E with mass=full)",
    summary: "dynamic: the fewest experts that gather a share τ of the mass, which is the native top-k0's \
              (mass=native, never costs more than native) or all experts' (mass=full, the literal rule, can cost more)",
    formula: "k = min{k : p(1)+…+p(k) ≥ τ·m}, m = p(1)+…+p(k0) for mass=native, 1 for mass=full",
    example: "dynk:0.8",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let tau = args.share("τ", args.one_arg("τ")?)?;
        let masses = [("native", Mass::Native), ("full", Mass::Full)];
        let mass = args.option_of("mass", &masses)?.unwrap_or(Mass::Native);
        let limit = mass.experts(shape);
        let k = args.bounds(limit, limit)?;
        Ok(Box::new(DynK { tau, mass, k }))
    },
};

#[derive(Clone, Copy)]
enum Mass {
    Native,
    Full,
}

impl Mass {
    /// How many experts the mass is taken over.
    fn experts(self, shape: &MoeShape) -> usize {
        match self {
            Self::Native => shape.top_k,
            Self::Full => shape.experts,
        }
    }
}

struct DynK {
    tau: f32,
    mass: Mass,
    k: RangeInclusive<usize>,
}

impl DynK {
    fn k_of(&self, token: &TokenGate<'_>, experts: usize) -> usize {
        fewest(self.tau, token.order_e[..experts].iter().map(|&e| f64::from(token.probs_e[e as usize])))
    }
}

impl Router for DynK {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let experts = self.mass.experts(gate.shape);
        for token in gate.tokens() {
            let k = self.k_of(&token, experts).clamp(*self.k.start(), *self.k.end());
            choose_top(&token, k, out);
        }
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let whose = match self.mass {
            Mass::Native => format!("the top-{} weight", shape.top_k),
            Mass::Full if shape.top_k < shape.experts => {
                format!("the probability of all {} experts (can exceed the own k = {})", shape.experts, shape.top_k)
            }
            Mass::Full => format!("the probability of all {} experts", shape.experts),
        };
        format!("k in {}..={}, share {} of {whose}", self.k.start(), self.k.end(), self.tau)
    }
}
