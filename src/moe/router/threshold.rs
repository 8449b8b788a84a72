//! `threshold:θ`: experts above an absolute probability, one for all layers or calibrated for each (a causal form of
//! the token allocation of Alloc-MoE, arXiv 2604.08133).

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::moe::calibration::parameter_at;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "threshold",
    usage: "threshold:θ|keep:q[,cal=FILE][,min=a][,max=b] (max is k0 unless given, up to E)",
    summary: "dynamic: experts of at least probability θ, and always the best one; keep:q calibrates θ for each layer, so that \
              a share q of the native experts stays",
    formula: "k = #{e : p_e ≥ θ}, clamped to min..max; for keep:q, θ_l such that the mean k of layer l is q·k0",
    example: "threshold:0.2",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let theta = args.one_arg("θ")?;
        let theta_l = match theta.strip_prefix("keep:") {
            None => vec![args.share("θ", theta)?; shape.layers],
            Some(share) => {
                let mean_k = f64::from(args.share("q", share)?) * shape.top_k as f64;
                let layers = &args.calibration("keep", shape)?.layers;
                layers.iter().map(|layer| parameter_at(&layer.curves.threshold, mean_k, shape.top_k)).collect()
            }
        };
        let k = args.bounds(shape.top_k, shape.experts)?;
        Ok(Box::new(Threshold { theta_l, k }))
    },
};

struct Threshold {
    theta_l: Vec<f32>,
    k: RangeInclusive<usize>,
}

impl Router for Threshold {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        for token in gate.tokens() {
            let k = token.count_at_least(self.theta_l[gate.layer]).clamp(*self.k.start(), *self.k.end());
            choose_top(&token, k, out);
        }
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, _: &MoeShape) -> String {
        let (low, high) = self.theta_l.iter().fold((1.0f32, 0.0f32), |(low, high), t| (low.min(*t), high.max(*t)));
        let theta = if low < high { format!("{low:.3} to {high:.3}, by layer") } else { low.to_string() };
        format!("k in {}..={}, experts of at least probability {theta}", self.k.start(), self.k.end())
    }
}
