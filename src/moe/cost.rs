//! FLOPs and expert reads: exact counts of what ran and of what native routing would have run.
//!
//! A multiply-add is 2 FLOPs. Two scopes, always named: `experts` (the routed experts' FFNs only) and
//! `forward` (every matrix product: attention projections and scores at the true context length, gates, routed
//! and shared experts, dense FFNs, LM head on the rows it ran on). Norms, activations, biases and softmax are left
//! out of both. What a router computes for itself counts as run, not as native. A saving is `1 − ran / native`: below zero when the router cost more. Native is static top-k0, also for
//! a checkpoint whose own rule is another one ([`crate::types::MoeShape::router`]).

use super::StepTrace;
use super::router::{LENS_TOKENS, Signals};
use crate::types::{Activation, FfnShape, Flops, ModelShape, Work};

/// The price list of one model.
#[derive(Clone, Debug)]
pub struct CostModel {
    /// Per token, whatever its context and routing.
    fixed_flops: u64,
    /// Per token and position of context, for layers without a window.
    full_layers: u64,
    /// Window of every layer that has one.
    windows: Vec<u64>,
    score_flops: u64,
    expert_flops: u64,
    lm_head_flops: u64,
    native_rows: u64,
    moe_layers: u64,
    /// Per token and MoE layer, for the products of the gate's rows.
    gram_flops: u64,
    /// Per token and MoE layer, for the early read-out.
    lens_flops: u64,
}

impl CostModel {
    /// Prices of a model of `shape`.
    pub fn new(shape: &ModelShape) -> Self {
        let d = shape.hidden as u64;
        let attention = &shape.attention;
        let q_width = (attention.heads * attention.head_dim) as u64;
        let kv_width = (attention.kv_heads * attention.head_dim) as u64;
        let projections = 2 * d * (q_width + 2 * kv_width) + 2 * q_width * d;
        let moe = &shape.moe;
        let ffn = |width: usize| ffn_flops(shape.hidden, width, shape.activation);
        let shared = moe.shared_width.map_or(0, |width| ffn(width) + 2 * d);
        let moe_fixed = 2 * d * moe.experts as u64 + shared;
        let mut fixed_flops = 0;
        for layer in &shape.layers {
            fixed_flops += projections;
            fixed_flops += match layer.ffn {
                FfnShape::Dense { width } => ffn(width),
                FfnShape::Moe => moe_fixed,
            };
        }
        Self {
            fixed_flops,
            full_layers: shape.layers.iter().filter(|l| l.sliding_window.is_none()).count() as u64,
            windows: shape.layers.iter().filter_map(|l| l.sliding_window).map(|w| w as u64).collect(),
            // One dot product for the score and one scaled add for the value, per query head.
            score_flops: 4 * q_width,
            expert_flops: ffn(moe.expert_width),
            lm_head_flops: 2 * d * shape.vocab as u64,
            native_rows: (moe.layers * moe.top_k) as u64,
            moe_layers: moe.layers as u64,
            gram_flops: 2 * (moe.experts * moe.experts) as u64,
            lens_flops: 2 * d * LENS_TOKENS.len().min(shape.vocab) as u64,
        }
    }

    /// Work of one token: `context` keys are visible to it (itself included), `expert_rows` is Σk over the
    /// MoE layers, `lm_head` tells whether its logits were computed.
    pub fn token(&self, context: u64, expert_rows: u64, lm_head: bool) -> Work {
        let seen = self.full_layers * context + self.windows.iter().map(|w| context.min(*w)).sum::<u64>();
        let other = self.fixed_flops + self.score_flops * seen + u64::from(lm_head) * self.lm_head_flops;
        let experts = Flops { ran: expert_rows * self.expert_flops, native: self.native_rows * self.expert_flops };
        let forward = Flops { ran: other + experts.ran, native: other + experts.native };
        Work { tokens: 1, moe_visits: self.moe_layers, expert_rows, experts, forward }
    }

    /// What one token costs a router that reads `signals`, over native routing; it is part of scope `forward`. `lm_head`
    /// tells whether the token's logits are computed anyway.
    pub fn signals(&self, signals: Signals, lm_head: bool) -> u64 {
        let gram = if signals.gram { self.gram_flops } else { 0 };
        let lens = if signals.lens { self.lens_flops } else { 0 };
        let head = if signals.surprisal && !lm_head { self.lm_head_flops } else { 0 };
        self.moe_layers * (gram + lens) + head
    }
}

/// Expert weights read in one step: (layer, expert) pairs, and bytes beside native routing's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertReads {
    pub ran: u64,
    pub bytes_ran: u64,
    pub bytes_native: u64,
}

impl ExpertReads {
    /// Reads of a step whose weights take `expert_bytes` per expert.
    pub fn of(trace: &StepTrace, expert_bytes: u64) -> Self {
        let (ran, native) = (trace.unique_experts, trace.unique_experts_native);
        Self { ran, bytes_ran: ran * expert_bytes, bytes_native: native * expert_bytes }
    }
}

/// Two D×F products, three with a gate.
fn ffn_flops(hidden: usize, width: usize, activation: Activation) -> u64 {
    (if activation.gated() { 6 } else { 4 }) * hidden as u64 * width as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{AttentionShape, LayerShape, MoeShape};

    /// Layer 0 is dense with a window of 3, layer 1 a mixture with a shared expert.
    fn tiny() -> ModelShape {
        ModelShape {
            hidden: 4,
            vocab: 10,
            max_positions: 64,
            attention: AttentionShape { heads: 2, kv_heads: 1, head_dim: 3 },
            layers: vec![
                LayerShape { sliding_window: Some(3), ffn: FfnShape::Dense { width: 7 } },
                LayerShape { sliding_window: None, ffn: FfnShape::Moe },
            ],
            activation: Activation::Swiglu,
            moe: MoeShape {
                experts: 5,
                top_k: 2,
                expert_width: 6,
                shared_width: Some(8),
                renormalise: true,
                layers: 1,
                router: None,
            },
            parameters: 0,
        }
    }

    #[test]
    fn a_token_costs_what_a_hand_count_says() {
        let work = CostModel::new(&tiny()).token(5, 1, true);
        // q: 4→6, k and v: 4→3 each, o: 6→4; twice (two layers).
        let projections = 2 * (2 * (4 * 6) + 2 * (4 * 3) * 2 + 2 * (6 * 4));
        // Layer 0 sees 3 keys, layer 1 sees 5; 2 heads × 3 dims, score and value.
        let scores = (3 + 5) * (2 * 3) * 2 * 2;
        let dense = 3 * 2 * 4 * 7;
        let gate = 2 * 4 * 5;
        let shared = 3 * 2 * 4 * 8 + 2 * 4;
        let lm_head = 2 * 4 * 10;
        let expert = 3 * 2 * 4 * 6;
        let other = projections + scores + dense + gate + shared + lm_head;
        assert_eq!(work.experts, Flops { ran: expert, native: 2 * expert });
        assert_eq!(work.forward, Flops { ran: other + expert, native: other + 2 * expert });
        assert_eq!(work.experts.saved(), 0.5);
    }

    #[test]
    fn nets_without_a_gate_have_two_products_of_three() {
        let gated = CostModel::new(&tiny()).token(1, 2, false);
        let plain = CostModel::new(&ModelShape { activation: Activation::Gelu, ..tiny() }).token(1, 2, false);
        assert_eq!(3 * plain.experts.ran, 2 * gated.experts.ran);
        // One product less in the dense layer, the shared expert and two experts.
        assert_eq!(gated.forward.ran - plain.forward.ran, 2 * 4 * (7 + 8 + 2 * 6));
    }

    #[test]
    fn a_model_without_mixtures_runs_no_expert_and_saves_nothing() {
        let dense = LayerShape { sliding_window: None, ffn: FfnShape::Dense { width: 7 } };
        let moe = MoeShape { experts: 1, top_k: 1, shared_width: None, layers: 0, ..tiny().moe };
        let work = CostModel::new(&ModelShape { layers: vec![dense; 2], moe, ..tiny() }).token(3, 0, true);
        assert_eq!((work.moe_visits, work.experts), (0, Flops::default()));
        assert_eq!(work.forward.ran, work.forward.native);
        assert_eq!((work.experts_per_token(), work.experts.saved(), work.forward.saved()), (0.0, 0.0, 0.0));
    }

    #[test]
    fn a_router_that_costs_more_shows_a_negative_saving() {
        let cost = CostModel::new(&tiny());
        let mut work = cost.token(1, 5, false);
        work += cost.token(2, 3, false);
        assert_eq!(work.experts_per_token(), 4.0);
        assert_eq!(work.experts.saved(), -1.0);
        assert!(work.forward.saved() < 0.0 && work.forward.saved() > -1.0);
    }

    #[test]
    fn nothing_run_saves_nothing() {
        assert_eq!(Flops::default().saved(), 0.0);
        assert_eq!(Work::default().experts_per_token(), 0.0);
    }
}
