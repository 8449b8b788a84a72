//! An estimator of your own and a router of your own, on the bundled checkpoint, each beside static routing at the same
//! mean k.
//!
//! ```console
//! $ cargo run --release --example own_router
//! ```

use anyhow::{Context, Result};
use moe_serve::engine::{Engine, EngineConfig, Found, KvSize};
use moe_serve::eval::{How, InProcess, Lm};
use moe_serve::model::LoadOptions;
use moe_serve::model::hub::HubOptions;
use moe_serve::moe::router::{Complexity, Estimator, GateView, Router, TokenGate};
use moe_serve::moe::{Policy, RoutingBuilder};
use moe_serve::types::{DeviceChoice, DtypeChoice, MoeShape};
use std::sync::Arc;

/// The first tokens of a sequence are hard, since all later ones look back at them; after these, a token is as hard as the
/// gate's second choice is close to its first.
struct EarlyOrUnsure {
    /// Tokens that are hard whatever the gate says.
    early: u32,
}

impl Estimator for EarlyOrUnsure {
    fn measure(&self, token: &TokenGate<'_>) -> f32 {
        match token.order_e {
            _ if token.position < self.early => 1.0,
            [first, second, ..] => 1.0 - (token.probs_e[*first as usize] - token.probs_e[*second as usize]),
            _ => 0.0,
        }
    }

    fn squash(&self, measure: f32) -> f32 {
        measure
    }
}

/// The fewest experts that gather a share of the native top-k0's probability, which changes evenly from the first mixture
/// to the last.
struct Tapered {
    first: f32,
    last: f32,
    top_k: usize,
}

impl Router for Tapered {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let depth = gate.layer as f32 / (gate.shape.layers - 1).max(1) as f32;
        let share = self.first + (self.last - self.first) * depth;
        for token in gate.tokens() {
            let native = &token.order_e[..self.top_k];
            let p = |e: &u16| token.probs_e[*e as usize];
            let wanted = share * native.iter().map(p).sum::<f32>();
            let mut gathered = 0.0;
            // One expert more than do not suffice, and never more than native.
            let short = native[..self.top_k - 1].iter().take_while(|e| {
                gathered += p(e);
                gathered < wanted
            });
            let k = 1 + short.count();
            out.choose(token.row, &native[..k]);
        }
    }

    fn experts_max(&self) -> usize {
        self.top_k
    }

    fn describe(&self, shape: &MoeShape) -> String {
        format!("k in 1..={}, share {} falling to {} of the native weight", shape.top_k, self.first, self.last)
    }
}

/// Puts the policy that `make` makes into the checkpoint, and gives the experts per token on the sample text.
fn run(make: impl FnOnce(&MoeShape) -> Result<Policy>) -> Result<f64> {
    let options = LoadOptions { dtype: DtypeChoice::Auto, device: DeviceChoice::Auto, ..Default::default() };
    let opened = Found::find(None, &HubOptions::from_env())?.load(&options)?;
    let shape = opened.loaded.model.shape().clone();
    let policy = make(&shape.moe)?;
    let name = policy.spec().to_string();
    println!("{name}: {}", policy.describe());

    let config = EngineConfig { kv_size: Some(KvSize::Blocks(64)), ..Default::default() };
    let engine = Engine::start(opened.name, opened.loaded, opened.text.clone(), policy, config)?;
    let lm = InProcess::new(Arc::new(engine), opened.text, &shape);
    let ids = lm.encode(include_str!("../eval/samples/text.txt"))?;
    let scored = lm.score(&ids[..256], &How::default())?;
    let routed = scored.routed.context("an engine of this program tells what routing did")?;
    let [ran, native] = routed.expert_flops;
    let loss = -scored.logprobs.iter().sum::<f64>() / scored.logprobs.len() as f64;
    println!(
        "  {:.3} experts per token, {:+.1} % of the expert FLOPs saved, {loss:.4} nats per token",
        routed.mean_k(),
        100.0 * (1.0 - ran as f64 / native as f64)
    );
    Ok(routed.mean_k())
}

/// Static routing whose k per layer, spread evenly, comes closest to `mean_k`.
fn static_at(mean_k: f64, shape: &MoeShape) -> Result<Policy> {
    let rows = |layers: usize| (mean_k * layers as f64).round() as usize;
    let k_l: Vec<String> = (0..shape.layers).map(|l| (rows(l + 1) - rows(l)).to_string()).collect();
    Ok(Policy::build(&format!("layers:{}", k_l.join(",")).parse()?, shape)?)
}

fn main() -> Result<()> {
    run(|shape| Ok(Policy::build(&"native".parse()?, shape)?))?;

    let k = run(|shape| {
        let estimator = Box::new(EarlyOrUnsure { early: 4 });
        let router = Complexity::new("early-or-unsure", estimator, 1..=shape.top_k);
        Ok(Policy::of("early-or-unsure", Box::new(router), shape))
    })?;
    run(|shape| static_at(k, shape))?;

    let k = run(|shape| {
        let router = Tapered { first: 0.9, last: 0.6, top_k: shape.top_k };
        Ok(Policy::of("tapered", Box::new(router), shape))
    })?;
    run(|shape| static_at(k, shape))?;
    Ok(())
}
