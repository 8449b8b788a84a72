//! Applies the policies of one step, layer by layer, and counts what they did.

use super::gate::GateTable;
use super::{GateInput, GateView, Policy, Signals};
use crate::moe::{MoeLayer, Routing, RoutingBuilder, RoutingError};
use crate::types::{MoeShape, TokenId};
use candle_core::Tensor;
use std::sync::Arc;

/// The tokens of one step, as routing needs them; one entry per token.
#[derive(Clone, Debug, Default)]
pub struct StepTokens {
    pub token_t: Vec<TokenId>,
    /// Position in its sequence.
    pub position_t: Vec<u32>,
    /// Index into the step's policies.
    pub policy_t: Vec<u16>,
    /// −log p of the token after what stands before it, in nats, by the model as its policy runs it; NaN where it is not
    /// known, as for the first. Empty in steps where no policy reads it.
    pub surprisal_t: Vec<f32>,
    /// Whose the token is: tokens of different tenants are never routed by one another. Empty where all are one's, and in
    /// steps where every policy is batch invariant.
    pub tenant_t: Vec<u32>,
    /// Whether the token is decoded: its sequence's prompt is complete, and it is the last token known. Empty where none
    /// is, and in steps where every policy is batch invariant.
    pub decodes_t: Vec<bool>,
}

/// What routing did in one step, in counts; exact, and taken from values that are on the host anyway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepTrace {
    /// Experts each token used in each MoE layer, `[T, layers]`.
    pub k_tl: Vec<u16>,
    /// How often a (token, layer) used k experts, index k, `[E + 1]`.
    pub k_histogram: Vec<u64>,
    /// Tokens per expert, `[layers × E]`.
    pub expert_tokens: Vec<u64>,
    /// (layer, expert) pairs whose weights were read.
    pub unique_experts: u64,
    /// The same, had every token been given its k0 most probable experts: native routing, but for checkpoints with a
    /// rule of their own ([`MoeShape::router`]), whose savings are counted against static top-k0 all the same.
    pub unique_experts_native: u64,
    /// Mean over the tokens of H(p) / log E per layer, `[layers]`.
    pub entropy_l: Vec<f64>,
}

/// Looks at every mixture of a step as it is routed: how calibration sees a model.
pub trait Probe: Send {
    /// `layer` is about to run on `x [T, D]`, whose tokens are all in `gate`, with every signal that the model can give
    /// ([`GateView::signals`]).
    ///
    /// # Errors
    /// A failure of the device.
    fn visit(&mut self, layer: &MoeLayer, x: &Tensor, gate: &GateView<'_>) -> candle_core::Result<()>;
}

/// Routing state of one step: made before the forward pass, read after it.
pub struct RouteCtx<'a> {
    shape: &'a MoeShape,
    policies: &'a [Arc<Policy>],
    step: &'a StepTokens,
    /// Rows of each policy, `[policies]`.
    rows_p: Vec<Vec<u32>>,
    signals: Wanted,
    table: GateTable,
    trace: StepTrace,
    probe: Option<&'a mut dyn Probe>,
}

/// The signals of a step: what is asked for with a probe is taken where it is there.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// What policies read.
    read: Signals,
    /// What the model is asked for.
    asked: Signals,
}

impl<'a> RouteCtx<'a> {
    /// `policy_t` of `step` indexes `policies`.
    pub fn new(shape: &'a MoeShape, policies: &'a [Arc<Policy>], step: &'a StepTokens) -> Self {
        let mut rows_p = vec![Vec::new(); policies.len()];
        for (row, &policy) in step.policy_t.iter().enumerate() {
            rows_p[policy as usize].push(row as u32);
        }
        let trace = StepTrace {
            k_tl: vec![0; step.token_t.len() * shape.layers],
            k_histogram: vec![0; shape.experts + 1],
            expert_tokens: vec![0; shape.layers * shape.experts],
            entropy_l: vec![0.0; shape.layers],
            ..Default::default()
        };
        let read = policies.iter().zip(&rows_p).filter(|(_, rows)| !rows.is_empty());
        let read = read.fold(Signals::default(), |all, (policy, _)| all | policy.signals());
        let signals = Wanted { read, asked: read };
        Self { shape, policies, step, rows_p, signals, table: GateTable::default(), trace, probe: None }
    }

    /// The same with a `probe` that looks on.
    pub fn probed(self, probe: &'a mut dyn Probe) -> Self {
        let asked = Signals { surprisal: self.signals.read.surprisal, ..Signals::ALL };
        Self { signals: Wanted { asked, ..self.signals }, probe: Some(probe), ..self }
    }

    /// What the step's policies read beside the gate's logits, and with a probe all that there is.
    pub fn signals(&self) -> Signals {
        self.signals.asked
    }

    /// Routes MoE layer `layer` (counted among the MoE layers) by its gate.
    ///
    /// # Errors
    /// A signal that a policy reads and that is not there, or a router that breaks an invariant of [`Routing`].
    pub fn route(&mut self, layer: usize, input: GateInput<'_>) -> Result<Routing, RoutingError> {
        let tokens = self.step.token_t.len();
        assert_eq!(input.logits_te.len(), tokens * self.shape.experts, "one logit per token and expert");
        let have = Signals { surprisal: !self.step.surprisal_t.is_empty(), ..input.signals() };
        if let [name, ..] = self.signals.read.missing(have)[..] {
            return Err(RoutingError::Signal { name });
        }
        self.table.fill(input.logits_te, self.shape.experts);
        let mut builder = RoutingBuilder::new(tokens, self.shape.experts);
        for (policy, rows) in self.policies.iter().zip(&self.rows_p) {
            if !rows.is_empty() {
                let (table, step) = (&self.table, self.step);
                policy.route(&GateView { layer, shape: self.shape, table, input, step, rows }, &mut builder);
            }
        }
        let routing = builder.finish(tokens)?;
        self.count(layer, &routing);
        Ok(routing)
    }

    /// Shows the layer that was just routed to the probe, if there is one.
    pub(in crate::moe) fn probe(
        &mut self,
        layer: &MoeLayer,
        x: &Tensor,
        input: GateInput<'_>,
    ) -> candle_core::Result<()> {
        let Some(probe) = &mut self.probe else { return Ok(()) };
        let rows: Vec<u32> = (0..self.step.token_t.len() as u32).collect();
        let (table, step, shape) = (&self.table, self.step, self.shape);
        probe.visit(layer, x, &GateView { layer: layer.index, shape, table, input, step, rows: &rows })
    }

    fn count(&mut self, layer: usize, routing: &Routing) {
        let experts = self.shape.experts;
        let mut native_e = vec![false; experts];
        let mut entropy = 0.0;
        for t in 0..routing.tokens() {
            let k = routing.token_rows(t).len();
            self.trace.k_tl[t * self.shape.layers + layer] = k as u16;
            self.trace.k_histogram[k] += 1;
            let (probs_e, order_e) = self.table.row(t);
            order_e[..self.shape.top_k].iter().for_each(|&e| native_e[e as usize] = true);
            let nats = probs_e.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum::<f32>();
            entropy += f64::from(nats);
        }
        for e in 0..experts {
            self.trace.expert_tokens[layer * experts + e] += routing.expert_rows(e).len() as u64;
        }
        self.trace.unique_experts += routing.unique_experts() as u64;
        self.trace.unique_experts_native += native_e.iter().filter(|n| **n).count() as u64;
        let nats_max = (experts.max(2) as f64).ln();
        self.trace.entropy_l[layer] = entropy / nats_max / routing.tokens().max(1) as f64;
    }

    /// What was counted.
    pub fn into_trace(self) -> StepTrace {
        self.trace
    }
}
