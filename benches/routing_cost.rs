//! What routing adds to a decode step of the bundled checkpoint: every router at the checkpoint's own number of experts, so
//! that what differs from `native` is the routing itself. Prints the README's table: `cargo bench --bench routing_cost`.
//!
//! Steps of the two are taken in turns, so that what else runs on the machine weighs on both alike.

use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{CausalLm, LoadOptions, StepInput, load};
use moe_serve::moe::calibration::{Calibration, Calibrations, HeldOut, PolicyTable, Rung};
use moe_serve::moe::router::{ESTIMATORS, Rule, StepTokens};
use moe_serve::moe::{Policy, RouteCtx};
use moe_serve::ops::{KvCache, KvShape, Segment, StepLayout, on_pool};
use moe_serve::types::{BlockId, MoeShape};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Pairs of steps that count, and those before them.
const ROUNDS: usize = 2400;
const WARM_UP: usize = 60;
/// Batches that are measured.
const BATCHES: [usize; 2] = [1, 32];
/// Position of the tokens that are decoded.
const CONTEXT: usize = 128;
const BLOCK_SIZE: usize = 16;

/// Routers that take k0 experts whatever the token.
fn specs(shape: &MoeShape) -> Vec<String> {
    let k0 = shape.top_k;
    let mut specs: Vec<String> = [
        "native",
        "dynk:1",
        "ratio:0.000001",
        "threshold:0.000001",
        "skip:0.000001",
        "contrib:1,cal=policy.json",
        "policy:policy.json",
    ]
    .map(String::from)
    .into();
    specs.extend([format!("topk:{k0}"), format!("oea:{k0}"), format!("xbudget:{}", shape.experts)]);
    let estimators = ESTIMATORS.iter().filter(|entry| entry.calibrates).map(|entry| entry.name);
    specs
        .extend(estimators.chain(["gradient-norm:entropy"]).map(|name| format!("complexity:{name},min={k0},max={k0}")));
    specs
}

/// A policy that takes all k0 experts by rules of every kind, for a calibration that knows nothing.
fn calibrations(shape: &MoeShape) -> Calibrations {
    let rules = [Rule::Score { tau: 1.0 }, Rule::Contribution { tau: 1.0 }, Rule::Threshold { theta: 0.0 }];
    let rules = rules.into_iter().cycle().take(shape.layers).collect();
    let mut calibration = Calibration::uninformed(shape, "");
    calibration.policy = Some(PolicyTable {
        scope: "experts".into(),
        target: 1.0,
        batch: None,
        lsq: true,
        rungs: vec![Rung { cost: 1.0, mean_k: shape.top_k as f64, rules }],
        held_out: HeldOut::default(),
    });
    let calibrations = Calibrations::new(|| Ok(String::new()));
    calibrations.insert("policy.json", calibration);
    calibrations
}

/// A batch of sequences that decode.
struct Decode<'a> {
    model: &'a CausalLm,
    kv: KvCache,
    layout: StepLayout,
    rows: Vec<u32>,
    tokens: StepTokens,
}

impl<'a> Decode<'a> {
    fn new(model: &'a CausalLm, batch: usize) -> Self {
        let shape = model.shape();
        let each = CONTEXT / BLOCK_SIZE + 1;
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: each * batch,
            block_size: BLOCK_SIZE,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        let kv = KvCache::new(kv_shape, model.backend()).expect("memory");
        let blocks = |s: usize| (0..each).map(|b| BlockId((s * each + b) as u32)).collect();
        let segments = (0..batch).map(|s| Segment { start: CONTEXT, len: 1, blocks: blocks(s) }).collect();
        let layout = StepLayout::new(segments, &kv, model.backend()).expect("a layout");
        let tokens = StepTokens {
            token_t: (0..batch as u32).map(|i| 100 + i).collect(),
            position_t: vec![CONTEXT as u32; batch],
            policy_t: vec![0; batch],
            surprisal_t: vec![2.0; batch],
            tenant_t: vec![0; batch],
            decodes_t: vec![true; batch],
        };
        Self { model, kv, layout, rows: (0..batch as u32).collect(), tokens }
    }

    /// Time of a step by `policy` by that of one by `native`; each goes first in half of the pairs.
    fn ratio(&mut self, policy: &Arc<Policy>, native: &Arc<Policy>) -> f64 {
        let pairs = (0..WARM_UP + ROUNDS).map(|round| {
            if round % 2 == 0 {
                self.step(policy) / self.step(native)
            } else {
                let native = self.step(native);
                self.step(policy) / native
            }
        });
        median(pairs.skip(WARM_UP).collect())
    }

    /// Seconds of one step, made as the engine makes it.
    fn step(&mut self, policy: &Arc<Policy>) -> f64 {
        on_pool(|| self.step_here(policy))
    }

    fn step_here(&mut self, policy: &Arc<Policy>) -> f64 {
        let started = Instant::now();
        let input = StepInput { tokens: &self.tokens.token_t, layout: &self.layout, logit_rows: &self.rows };
        let policies = std::slice::from_ref(policy);
        let mut routes = RouteCtx::new(&self.model.shape().moe, policies, &self.tokens);
        let hidden = self.model.forward(&input, &mut self.kv, &mut routes).expect("runs").expect("rows");
        black_box(self.model.logits(&hidden, 0, self.rows.len()).expect("runs"));
        started.elapsed().as_secs_f64()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories");
    let bars = indicatif::MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
    let files = resolve(dir, &HubOptions::default(), &bars).expect("the bundled checkpoint");
    let model = load(&files, &LoadOptions::default(), |_, _| {}).expect("loads").model;
    let moe = model.shape().moe.clone();
    let files = calibrations(&moe);
    let policy = |spec: &str| {
        Arc::new(Policy::build_with(&spec.parse().expect("a spec"), &moe, &files).unwrap_or_else(|e| panic!("{e}")))
    };
    let native = policy("native");
    let mut decodes = BATCHES.map(|batch| Decode::new(&model, batch));
    println!("| router, at k = {} | {} |", moe.top_k, BATCHES.map(|b| format!("batch {b}")).join(" | "));
    println!("|---|{}", "---|".repeat(BATCHES.len()));
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let is_wanted = |spec: &String| wanted.is_empty() || wanted.iter().any(|part| spec.contains(part));
    for spec in specs(&moe).into_iter().filter(is_wanted) {
        let policy = policy(&spec);
        let ratios = decodes.each_mut().map(|decode| decode.ratio(&policy, &native));
        println!("| `{spec}` | {} |", ratios.map(|ratio| format!("{ratio:.3}")).join(" | "));
    }
    let times = decodes.each_mut().map(|d| median((0..ROUNDS).map(|_| d.step(&native)).collect()));
    println!("| µs of a `native` step | {} |", times.map(|seconds| format!("{:.0}", seconds * 1e6)).join(" | "));
}
