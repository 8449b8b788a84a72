//! One mixture layer: gate, routing, grouped experts, shared expert.

use super::RouteCtx;
use super::router::GateInput;
use crate::ops::profile::{Part, timed};
use crate::ops::{self, Experts, FeedForward, Linear};
use candle_core::{Result, Tensor};
use std::sync::OnceLock;

/// A mixture of experts.
#[derive(Debug)]
pub struct MoeLayer {
    /// Index among the model's MoE layers.
    pub index: usize,
    /// `[E, D]`, in f32.
    pub gate: Linear,
    /// Products of the gate's rows, `[E, E]`, once a router has asked for them.
    gram_ee: OnceLock<Vec<f32>>,
    pub experts: Experts,
    pub shared: Option<SharedExpert>,
}

/// What the decoder knows of a step's tokens at a layer beside their hidden states, as far as
/// [`RouteCtx::signals`] asks for it.
#[derive(Debug, Default)]
pub struct TokenSignals {
    /// See [`GateInput::attention_entropy_t`].
    pub attention_entropy_t: Vec<f32>,
    /// See [`GateInput::lens_entropy_t`].
    pub lens_entropy_t: Vec<f32>,
}

/// An expert that every token passes, scaled by a sigmoid gate of its own (Qwen2-MoE).
#[derive(Debug)]
pub struct SharedExpert {
    pub net: FeedForward,
    /// `[1, D]`
    pub gate: Linear,
}

impl MoeLayer {
    /// Mixture `index` of its model.
    pub fn new(index: usize, gate: Linear, experts: Experts, shared: Option<SharedExpert>) -> Self {
        Self { index, gate, gram_ee: OnceLock::new(), experts, shared }
    }

    /// `x [T, D] → [T, D]`, routed by `routes`.
    pub fn forward(&self, x: &Tensor, signals: &TokenSignals, routes: &mut RouteCtx<'_>) -> Result<Tensor> {
        let routing = timed(Part::Routing, self.index, || {
            let asked = routes.signals();
            let logits_te = self.gate.forward(x)?;
            let gram_ee = if asked.gram { self.gram(logits_te.dim(1)?)? } else { &[] };
            let TokenSignals { attention_entropy_t, lens_entropy_t } = signals;
            let mut route = |logits_te: &[f32], hidden_td: &[f32]| {
                let input = GateInput { logits_te, hidden_td, gram_ee, attention_entropy_t, lens_entropy_t };
                let routing = routes.route(self.index, input).map_err(candle_core::Error::wrap)?;
                routes.probe(self, x, input).map(|()| routing)
            };
            ops::on_host(&logits_te, |logits_te| {
                if asked.hidden {
                    ops::on_host(x, |hidden_td| route(logits_te, hidden_td))?
                } else {
                    route(logits_te, &[])
                }
            })?
        })?;
        let y = timed(Part::Experts, self.index, || self.experts.forward(x, &routing))?;
        let Some(shared) = &self.shared else { return Ok(y) };
        let gated = || ops::sigmoid_gated(&shared.net.forward(x)?, &shared.gate.forward(x)?);
        ops::add(&y, &timed(Part::Dense, self.index, gated)?)
    }

    fn gram(&self, experts: usize) -> Result<&[f32]> {
        if self.gram_ee.get().is_none() {
            let rows: Vec<u32> = (0..experts as u32).collect();
            let gram_ee = ops::to_host(&self.gate.forward(&self.gate.rows(&rows)?)?)?;
            // Who was faster computed the same.
            let _ = self.gram_ee.set(gram_ee);
        }
        Ok(self.gram_ee.get().map_or(&[], Vec::as_slice))
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, |s| s.net.bytes() + s.gate.bytes());
        self.gate.bytes() + self.experts.bytes() + shared
    }
}
