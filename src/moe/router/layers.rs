//! `layers:K,K,…`: a static number of experts per layer.

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "layers",
    usage: "layers:K,K,… (one K per MoE layer, or a single one for all)",
    summary: "static per layer: K_l experts in MoE layer l",
    formula: "k = K_l",
    example: "layers:1",
    dynamic: false,
    list: true,
    parse: |args, shape| {
        let texts = args.args();
        if texts.len() != 1 && texts.len() != shape.layers {
            let problem =
                format!("the model has {} MoE layers, so give {0} numbers; got {}", shape.layers, texts.len());
            return Err(args.error(problem));
        }
        let mut k_l = Vec::with_capacity(shape.layers);
        for text in texts {
            k_l.push(args.count("every K", text, 1..=shape.experts)?);
        }
        k_l.resize(shape.layers, k_l[0]);
        Ok(Box::new(Layers { k_l }))
    },
};

struct Layers {
    k_l: Vec<usize>,
}

impl Router for Layers {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let k = self.k_l[gate.layer];
        gate.tokens().for_each(|token| choose_top(&token, k, out));
    }

    fn experts_max(&self) -> usize {
        self.k_l.iter().copied().max().unwrap_or(1)
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let mean = self.k_l.iter().sum::<usize>() as f64 / self.k_l.len().max(1) as f64;
        format!("a fixed k per layer, {mean:.2} on average (the checkpoint's own: {})", shape.top_k)
    }
}
