//! `complexity:ESTIMATOR`: as many experts as a token is hard, by an estimate that the gate itself allows.
//!
//! Estimates are causal, taken per token, and mapped to 0..=1 by a fixed formula, never by the batch's mean.

use super::{GateView, Router, RouterEntry, TokenGate, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "complexity",
    usage: "complexity:router-entropy|router-margin|constant:c[,min=a][,max=b] (max k0 by default, up to E)",
    summary: "dynamic: k grows with an estimate c of the token's difficulty",
    formula: "k = min + round((max − min)·c); c = H(p)/log E, 1 − (p(1) − p(2)), or constant",
    example: "complexity:router-entropy",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let estimator = args.one_arg("ESTIMATOR")?;
        let estimator = match (estimator, estimator.strip_prefix("constant:")) {
            ("router-entropy", _) => Estimator::RouterEntropy,
            ("router-margin", _) => Estimator::RouterMargin,
            (_, Some(c)) => match c.parse::<f32>() {
                Ok(c) if (0.0..=1.0).contains(&c) => Estimator::Constant(c),
                _ => return Err(args.error(format!("constant must be a number in [0, 1]; got {c}"))),
            },
            _ => return Err(args.error(format!("there is no estimator `{estimator}`"))),
        };
        let k = args.bounds(shape.top_k, shape.experts)?;
        Ok(Box::new(Complexity { estimator, k }))
    },
};

#[derive(Clone, Copy, Debug)]
enum Estimator {
    RouterEntropy,
    RouterMargin,
    Constant(f32),
}

impl Estimator {
    /// Of one token, in 0..=1.
    fn estimate(self, token: &TokenGate<'_>) -> f32 {
        let c = match self {
            Self::RouterEntropy => {
                let nats: f32 = token.probs_e.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
                nats / (token.probs_e.len().max(2) as f32).ln()
            }
            Self::RouterMargin => match token.order_e {
                [first, second, ..] => 1.0 - (token.probs_e[*first as usize] - token.probs_e[*second as usize]),
                _ => 0.0,
            },
            Self::Constant(c) => c,
        };
        c.clamp(0.0, 1.0)
    }
}

struct Complexity {
    estimator: Estimator,
    k: RangeInclusive<usize>,
}

impl Router for Complexity {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let (min, max) = (*self.k.start(), *self.k.end());
        for token in gate.tokens() {
            let more = ((max - min) as f32 * self.estimator.estimate(&token)).round();
            choose_top(&token, min + more as usize, out);
        }
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, _shape: &MoeShape) -> String {
        let by = match self.estimator {
            Estimator::RouterEntropy => "the gate's entropy".to_string(),
            Estimator::RouterMargin => "the gate's margin".to_string(),
            Estimator::Constant(c) => format!("the constant {c}"),
        };
        format!("k in {}..={}, by {by}", self.k.start(), self.k.end())
    }
}
