//! `uniform:K`: random experts. A sanity check (quality must fall) and a load for benchmarks.

use super::{GateView, Router, RouterEntry};
use crate::moe::RoutingBuilder;
use crate::types::{MoeShape, split_mix};

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "uniform",
    usage: "uniform:K[,seed=s]",
    summary: "K experts at random, the same for the same token, position, layer and seed",
    formula: "k = K, e drawn without replacement",
    example: "uniform:1",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        let k = args.count("K", args.one_arg("K")?, 1..=shape.experts)?;
        let seed = args.option_number("seed")?.unwrap_or(0);
        Ok(Box::new(Uniform { k, seed }))
    },
};

struct Uniform {
    k: usize,
    seed: u64,
}

impl Router for Uniform {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let mut experts: Vec<u16> = Vec::with_capacity(gate.shape.experts);
        for token in gate.tokens() {
            // Drawn from what identifies the token, never from its row: the batch must not matter.
            let place = split_mix(self.seed, 0) ^ split_mix((gate.layer as u64) << 32 | u64::from(token.position), 0);
            let mut state = split_mix(place ^ split_mix(u64::from(token.token), 0), 0);
            experts.clear();
            experts.extend(0..gate.shape.experts as u16);
            for i in 0..self.k {
                state = split_mix(state, 0);
                let left = (experts.len() - i) as u64;
                experts.swap(i, i + (state % left) as usize);
            }
            // Most probable first, so that weights are summed in the order every router has.
            let chosen = &mut experts[..self.k];
            let p = |e: u16| token.probs_e[e as usize];
            chosen.sort_unstable_by(|&a, &b| p(b).total_cmp(&p(a)).then(a.cmp(&b)));
            out.choose(token.row, chosen);
        }
    }

    fn experts_max(&self) -> usize {
        self.k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        format!("k = {} of {} experts at random, seed {}", self.k, shape.experts, self.seed)
    }
}
