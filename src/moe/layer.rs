//! One mixture layer: gate, routing, grouped experts, shared expert.

use super::RouteCtx;
use crate::ops::profile::{Part, timed};
use crate::ops::{self, Experts, FeedForward, Linear};
use candle_core::{Result, Tensor};

/// A mixture of experts.
#[derive(Debug)]
pub struct MoeLayer {
    /// Index among the model's MoE layers.
    pub index: usize,
    /// `[E, D]`, in f32.
    pub gate: Linear,
    pub experts: Experts,
    pub shared: Option<SharedExpert>,
}

/// An expert that every token passes, scaled by a sigmoid gate of its own (Qwen2-MoE).
#[derive(Debug)]
pub struct SharedExpert {
    pub net: FeedForward,
    /// `[1, D]`
    pub gate: Linear,
}

impl MoeLayer {
    /// `x [T, D] → [T, D]`, routed by `routes`.
    pub fn forward(&self, x: &Tensor, routes: &mut RouteCtx<'_>) -> Result<Tensor> {
        let routing = timed(Part::Routing, self.index, || {
            let logits_te = ops::to_host(&self.gate.forward(x)?)?;
            routes.route(self.index, &logits_te).map_err(candle_core::Error::wrap)
        })?;
        let y = timed(Part::Experts, self.index, || self.experts.forward(x, &routing))?;
        let Some(shared) = &self.shared else { return Ok(y) };
        let gated = || ops::sigmoid_gated(&shared.net.forward(x)?, &shared.gate.forward(x)?);
        y + timed(Part::Dense, self.index, gated)?
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, |s| s.net.bytes() + s.gate.bytes());
        self.gate.bytes() + self.experts.bytes() + shared
    }
}
