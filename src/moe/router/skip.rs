//! `skip:β`: leaves out experts that are far behind the best one (NAEE, Lu et al., arXiv 2402.14800, §3.3).

use super::{GateView, Router, RouterEntry, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::MoeShape;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "skip",
    usage: "skip:β|auto[,cal=FILE]",
    summary: "dynamic: native experts of at least β times the best one's probability; auto is the calibrated median of \
              p(2)/p(1), layer by layer, as its authors have it",
    formula: "k = #{e in top-k0 : p_e ≥ β·p(1)}; β = median of p(2)/p(1) for auto",
    example: "skip:0.5",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let beta_l = match args.one_arg("β")? {
            "auto" => args.calibration("auto", shape)?.layers.iter().map(|layer| layer.ratio_median).collect(),
            beta => vec![args.share("β", beta)?; shape.layers],
        };
        Ok(Box::new(Skip { beta_l, top_k: shape.top_k }))
    },
};

struct Skip {
    beta_l: Vec<f32>,
    top_k: usize,
}

impl Router for Skip {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        for token in gate.tokens() {
            let floor = self.beta_l[gate.layer] * token.probs_e[token.order_e[0] as usize];
            choose_top(&token, token.count_at_least(floor).clamp(1, self.top_k), out);
        }
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        let mean = self.beta_l.iter().sum::<f32>() / self.beta_l.len() as f32;
        format!(
            "k in 1..={}, experts of at least {mean:.3} (mean over layers) times the best one's probability",
            shape.top_k
        )
    }
}
