//! One mixture-of-experts layer, alone: ten inputs, five outputs, four ReLU experts, two of them for every token; trained
//! for a moment, then asked with every expert weighted by a dense softmax.
//!
//! ```console
//! $ cargo run --release --example moe_layer
//! ```

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use moe_serve::moe::loss::load_balance;
use moe_serve::moe::router::{GateInput, StepTokens};
use moe_serve::moe::{Policy, RouteCtx, Routing};
use moe_serve::ops::grad::{self, Precision};
use moe_serve::types::{Activation, MoeShape};
use std::sync::Arc;

const INPUTS: usize = 10;
const HIDDEN: usize = 16;
const OUTPUTS: usize = 5;
const EXPERTS: usize = 4;
const TOKENS: usize = 256;

/// Gate and experts. Each expert is `down(relu(up(x)))`.
struct MoeLayer {
    /// `[EXPERTS, INPUTS]`
    gate: Var,
    /// `[EXPERTS, HIDDEN, INPUTS]`
    up: Var,
    /// `[EXPERTS, OUTPUTS, HIDDEN]`
    down: Var,
    shape: MoeShape,
}

impl MoeLayer {
    fn new() -> Result<Self> {
        let normal = |shape: &[usize]| Var::randn(0f32, 0.3, shape, &Device::Cpu);
        let shape = MoeShape {
            experts: EXPERTS,
            top_k: 2,
            expert_width: HIDDEN,
            shared_width: None,
            renormalise: true,
            layers: 1,
            router: None,
        };
        Ok(Self {
            gate: normal(&[EXPERTS, INPUTS])?,
            up: normal(&[EXPERTS, HIDDEN, INPUTS])?,
            down: normal(&[EXPERTS, OUTPUTS, HIDDEN])?,
            shape,
        })
    }

    /// `x [T, INPUTS] → [T, OUTPUTS]`, with the gate's logits `[T, EXPERTS]` and the routing that `router` made of them.
    fn forward(&self, x: &Tensor, router: &str) -> Result<(Tensor, Tensor, Arc<Routing>)> {
        let tokens = x.dim(0)?;
        let logits = grad::linear(x, &self.gate, None, Precision::F32)?;
        let policy = [Arc::new(Policy::build(&router.parse()?, &self.shape)?)];
        let step = StepTokens {
            token_t: vec![0; tokens],
            position_t: (0..tokens as u32).collect(),
            policy_t: vec![0; tokens],
            ..Default::default()
        };
        let logits_te: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let routing = Arc::new(RouteCtx::new(&self.shape, &policy, &step).route(0, GateInput::logits(&logits_te))?);
        let weights = grad::route_weights(&logits, &routing, &routing, self.shape.renormalise)?;
        // Rows of tokens, sorted by expert: no tensor is tokens × experts × width.
        let h = grad::expert_linear(x, &self.up, None, &routing, true, Precision::F32)?;
        let h = grad::activate(&h, Activation::Relu)?;
        let y = grad::expert_linear(&h, &self.down, None, &routing, false, Precision::F32)?;
        Ok((grad::combine(&y, &weights, &routing)?, logits, routing))
    }
}

fn main() -> Result<()> {
    let layer = MoeLayer::new()?;
    let x = Tensor::randn(0f32, 1.0, (TOKENS, INPUTS), &Device::Cpu)?;
    // Something to learn: which half of the target is there depends on the sign of the first input.
    let sign = x.narrow(1, 0, 1)?.ge(0.0)?.to_dtype(candle_core::DType::F32)?;
    let target = x.narrow(1, 1, OUTPUTS)?.broadcast_mul(&sign)?;

    let mut first = None;
    for step in 0..300 {
        let (y, logits, routing) = layer.forward(&x, "topk:2")?;
        let error = (&y - &target)?.sqr()?.mean_all()?;
        let balance = load_balance(&logits, &routing)?;
        let grads = (&error + (&balance * 0.01)?)?.backward()?;
        for var in [&layer.gate, &layer.up, &layer.down] {
            if let Some(grad) = grads.get(var) {
                var.set(&(var.as_tensor() - (grad * 0.5)?)?)?;
            }
        }
        let error: f32 = error.to_scalar()?;
        let first = *first.get_or_insert(error);
        if step % 60 == 59 {
            let rows: Vec<usize> = (0..EXPERTS).map(|e| routing.expert_rows(e).len()).collect();
            println!("step {:3}: error {error:.4} (first {first:.4}), rows per expert {rows:?}", step + 1);
        }
    }

    // The dense variant: every expert computes every token, weighted by the softmax over all of them.
    for router in ["topk:1", "topk:2", "dynk:0.9,mass=full", "topk:4"] {
        let (y, _, routing) = layer.forward(&x, router)?;
        let error: f32 = (&y - &target)?.sqr()?.mean_all()?.to_scalar()?;
        println!("{router:20} {:.2} experts per token, error {error:.4}", routing.rows() as f64 / TOKENS as f64);
    }
    Ok(())
}
