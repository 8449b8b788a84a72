//! One group per layer of the system: routing, projections, grouped experts, attention, one whole step; and routers that
//! look at the batch, beside native.
//!
//! `cargo bench` prints times; ratios within one run are what is worth quoting.

use candle_core::{DType, Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{CausalLm, LoadOptions, Loaded, StepInput, load};
use moe_serve::moe::router::{GateInput, ROUTERS, StepTokens};
use moe_serve::moe::{Policy, RouteCtx, Routing, RoutingBuilder, StepTrace};
use moe_serve::ops::{
    Backend, Experts, ExpertsBuilder, HostFfn, HostTensor, KvCache, KvShape, Linear, Segment, StepLayout, attention,
    on_pool,
};
use moe_serve::types::{Activation, BlockId, MoeShape};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

/// Reproducible numbers in ±1.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn host(seed: u64, rows: usize, columns: usize) -> HostTensor {
    HostTensor::from_f32(&[rows, columns], &numbers(seed, rows * columns))
}

/// Every router on one OLMoE-shaped layer (64 experts, 8 native).
fn routing(c: &mut Criterion) {
    let shape = MoeShape {
        experts: 64,
        top_k: 8,
        expert_width: 1024,
        shared_width: None,
        renormalise: false,
        layers: 1,
        router: None,
    };
    let mut group = c.benchmark_group("routing_64_experts");
    for tokens in [1, 32, 512] {
        let logits: Vec<f32> = numbers(1, tokens * 64).iter().map(|z| z * 3.0).collect();
        let step = decoded(tokens, 128);
        group.throughput(Throughput::Elements(tokens as u64));
        // Those that read a file are measured by the bench `routing_cost`.
        for router in ROUTERS.iter().filter(|router| !router.example.contains(".json")) {
            let policies = [Arc::new(Policy::build(&router.example.parse().expect("a spec"), &shape).expect("fits"))];
            group.bench_function(BenchmarkId::new(router.name, tokens), |b| {
                b.iter(|| {
                    RouteCtx::new(&shape, &policies, &step)
                        .route(0, GateInput::logits(black_box(&logits)))
                        .expect("routes")
                });
            });
        }
    }
    group.finish();
}

/// Our packed kernels beside candle's matmul on the same shapes.
fn projections(c: &mut Criterion) {
    for (inputs, outputs) in [(2048, 1024), (2048, 2048)] {
        let weight = host(1, outputs, inputs);
        let mut group = c.benchmark_group(format!("linear_{inputs}x{outputs}"));
        for rows in [1, 16, 64, 512] {
            let x = Tensor::from_vec(numbers(2, rows * inputs), (rows, inputs), &Device::Cpu).expect("a tensor");
            group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
            for dtype in [DType::F32, DType::BF16] {
                let ours = Linear::new(&weight, None, &Backend::cpu(dtype)).expect("packs");
                group.bench_function(BenchmarkId::new(format!("packed_{dtype:?}"), rows), |b| {
                    b.iter(|| ours.forward(black_box(&x)).expect("runs"));
                });
            }
            let theirs = weight.to_tensor(DType::F32, &Device::Cpu).and_then(|w| w.t()).expect("a tensor");
            group.bench_function(BenchmarkId::new("candle_F32", rows), |b| {
                b.iter(|| black_box(&x).matmul(&theirs).expect("runs"));
            });
        }
        group.finish();
    }
}

fn experts_of(e: usize, d: usize, f: usize, dtype: DType) -> Experts {
    let mut builder = ExpertsBuilder::new(e, Activation::Swiglu, &Backend::cpu(dtype));
    for i in 0..e as u64 {
        let net = HostFfn::swiglu(host(3 * i, f, d), host(3 * i + 1, f, d), host(3 * i + 2, d, f));
        builder.push(&net).expect("packs");
    }
    builder.finish().expect("packs")
}

/// Each token to `k` of `e` experts, spread evenly.
fn spread(tokens: usize, e: usize, k: usize) -> Routing {
    let mut builder = RoutingBuilder::new(tokens, e);
    for t in 0..tokens {
        let chosen: Vec<u16> = (0..k).map(|i| ((t * 7 + i * (e / k)) % e) as u16).collect();
        builder.choose(t, &chosen);
        builder.weigh(t).iter_mut().for_each(|slot| slot.1 = 1.0 / k as f32);
    }
    builder.finish(tokens).expect("a valid routing")
}

/// Grouped experts at native k and half of it: what fewer experts save.
fn grouped_experts(c: &mut Criterion) {
    let (e, d, f) = (16, 1024, 512);
    let mut group = c.benchmark_group(format!("experts_{e}x{d}x{f}"));
    for dtype in [DType::F32, DType::BF16] {
        let experts = experts_of(e, d, f, dtype);
        for tokens in [1, 16, 256] {
            let x = Tensor::from_vec(numbers(9, tokens * d), (tokens, d), &Device::Cpu).expect("a tensor");
            for k in [4, 2] {
                let routing = spread(tokens, e, k);
                group.bench_function(BenchmarkId::new(format!("{dtype:?}_k{k}"), tokens), |b| {
                    b.iter(|| experts.forward(black_box(&x), &routing).expect("runs"));
                });
            }
        }
    }
    group.finish();
}

/// Attention without and with the entropies of its weights: a prompt of 512 tokens, and 16 sequences of 512 that decode.
fn entropies(c: &mut Criterion) {
    let (context, block_size, heads, kv_heads) = (512, 16, 16, 4);
    let backend = Backend::cpu(DType::BF16);
    for head_dim in [64, 128] {
        let mut group = c.benchmark_group(format!("attention_{heads}x{kv_heads}x{head_dim}"));
        for (name, sequences, start) in [("prefill", 1, 0), ("decode", 16, context - 1)] {
            let each = context / block_size;
            let kv_shape = KvShape { layers: 1, blocks: sequences * each, block_size, kv_heads, head_dim };
            let mut kv = KvCache::new(kv_shape, &backend).expect("memory");
            let layout = |start: usize| {
                let blocks = |s: usize| (0..each).map(|b| BlockId((s * each + b) as u32)).collect();
                let segments = (0..sequences).map(|s| Segment { start, len: context - start, blocks: blocks(s) });
                StepLayout::new(segments.collect(), &kv, &backend).expect("a layout")
            };
            let (full, step) = (layout(0), layout(start));
            let rows = |seed: u64, heads: usize, step: &StepLayout| {
                let shape = (step.tokens(), heads * head_dim);
                Tensor::from_vec(numbers(seed, shape.0 * shape.1), shape, &Device::Cpu).expect("a tensor")
            };
            let qkv = |step: &StepLayout| [rows(1, heads, step), rows(2, kv_heads, step), rows(3, kv_heads, step)];
            attention(qkv(&full).each_ref(), 0, None, &mut kv, &full, None).expect("runs");
            let (qkv, mut entropy_t) = (qkv(&step), Vec::new());
            for asked in [false, true] {
                group.bench_function(BenchmarkId::new(name, if asked { "entropy" } else { "plain" }), |b| {
                    b.iter(|| {
                        let entropy_t = asked.then_some(&mut entropy_t);
                        attention(black_box(&qkv).each_ref(), 0, None, &mut kv, &step, entropy_t).expect("runs")
                    });
                });
            }
        }
        group.finish();
    }
}

fn bundled() -> Loaded {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories");
    let bars = indicatif::MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
    let files = resolve(dir, &HubOptions::default(), &bars).expect("the bundled checkpoint");
    load(&files, &LoadOptions::default(), |_, _| {}).expect("loads")
}

/// A decode step: `batch` sequences of one tenant at position 128, one token each.
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
        let (block_size, context) = (16, 128);
        let each = context / block_size + 1;
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: each * batch,
            block_size,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        let kv = KvCache::new(kv_shape, model.backend()).expect("memory");
        let blocks = |s: usize| (0..each).map(|b| BlockId((s * each + b) as u32)).collect();
        let segments = (0..batch).map(|s| Segment { start: context, len: 1, blocks: blocks(s) }).collect();
        let layout = StepLayout::new(segments, &kv, model.backend()).expect("a layout");
        Self { model, kv, layout, rows: (0..batch as u32).collect(), tokens: decoded(batch, context) }
    }

    /// One step, on the pool as the engine's.
    fn run(&mut self, policies: &[Arc<Policy>]) -> (Tensor, StepTrace) {
        on_pool(|| self.run_here(policies))
    }

    fn run_here(&mut self, policies: &[Arc<Policy>]) -> (Tensor, StepTrace) {
        let input = StepInput { tokens: &self.tokens.token_t, layout: &self.layout, logit_rows: &self.rows };
        let mut routes = RouteCtx::new(&self.model.shape().moe, policies, &self.tokens);
        let hidden = self.model.forward(&input, &mut self.kv, &mut routes).expect("runs").expect("rows");
        (self.model.logits(&hidden, 0, self.rows.len()).expect("runs"), routes.into_trace())
    }
}

/// Tokens of one tenant, decoded at `position`.
fn decoded(batch: usize, position: usize) -> StepTokens {
    StepTokens {
        // Words, which do not choose the same experts.
        token_t: (0..batch as u32).map(|i| 300 + 59 * i).collect(),
        position_t: vec![position as u32; batch],
        policy_t: vec![0; batch],
        tenant_t: vec![0; batch],
        decodes_t: vec![true; batch],
        ..Default::default()
    }
}

fn policies(spec: &str, shape: &MoeShape) -> [Arc<Policy>; 1] {
    [Arc::new(Policy::build(&spec.parse().expect("a spec"), shape).expect("fits"))]
}

/// A decode step of the bundled checkpoint.
fn step(c: &mut Criterion) {
    let loaded = bundled();
    let mut group = c.benchmark_group("decode_step_bundled");
    for batch in [1usize, 32] {
        let mut decode = Decode::new(&loaded.model, batch);
        group.throughput(Throughput::Elements(batch as u64));
        for router in ["native", "topk:1", "dynk:0.8", "ratio:0.5", "threshold:0.2"] {
            let policies = policies(router, &loaded.model.shape().moe);
            group.bench_function(BenchmarkId::new(router, batch), |b| b.iter(|| decode.run(&policies)));
        }
    }
    group.finish();
}

/// Batch sizes at which routers that look at the batch are measured.
const BATCHES: [usize; 4] = [1, 4, 16, 64];

/// Measures native routing, `oea` with half of k0, and `xbudget` with half the experts that native reads: a step that
/// `run` runs, telling the experts it read in `layers` layers. Prints these.
fn batch_aware<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    batch: usize,
    shape: &MoeShape,
    mut run: impl FnMut(&[Arc<Policy>]) -> (T, u64),
) {
    group.throughput(Throughput::Elements(batch as u64));
    let mut read = |spec: &str| run(&policies(spec, shape)).1 as f64 / shape.layers as f64;
    let half = ((read("native") / 2.0).round() as usize).max(1);
    let specs = ["native".to_string(), format!("oea:{}", (shape.top_k / 2).max(1)), format!("xbudget:{half}")];
    let told: Vec<String> = specs.iter().map(|spec| format!("{spec} {:.2}", read(spec))).collect();
    eprintln!("batch {batch}: experts read per layer: {}", told.join(", "));
    for (name, spec) in ["native", "oea_half", "xbudget_half"].iter().zip(&specs) {
        let policies = policies(spec, shape);
        group.bench_function(BenchmarkId::new(*name, batch), |b| b.iter(|| run(&policies)));
    }
}

/// Routers that look at the batch, in a decode step of the bundled checkpoint.
fn batch_aware_bundled(c: &mut Criterion) {
    let loaded = bundled();
    let mut group = c.benchmark_group("batch_aware_step_bundled");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for batch in BATCHES {
        let mut decode = Decode::new(&loaded.model, batch);
        batch_aware(&mut group, batch, &loaded.model.shape().moe, |policies| {
            let (logits, trace) = decode.run(policies);
            (logits, trace.unique_experts)
        });
    }
    group.finish();
}

/// The same in one mixture of OLMoE's size (64 experts of 2048 × 1024, 8 native) in bf16 with random weights and a random
/// gate, whose tokens agree on nothing: gate, routing and experts, without attention.
fn batch_aware_layer(c: &mut Criterion) {
    let (e, d, f) = (64, 2048, 1024);
    let shape = MoeShape {
        experts: e,
        top_k: 8,
        expert_width: f,
        shared_width: None,
        renormalise: false,
        layers: 1,
        router: None,
    };
    let experts = experts_of(e, d, f, DType::BF16);
    let mut group = c.benchmark_group("batch_aware_layer_64x2048x1024");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for batch in BATCHES {
        let logits: Vec<f32> = numbers(1, batch * e).iter().map(|z| z * 3.0).collect();
        let x = Tensor::from_vec(numbers(2, batch * d), (batch, d), &Device::Cpu).expect("a tensor");
        let tokens = decoded(batch, 128);
        batch_aware(&mut group, batch, &shape, |policies| {
            let mut routes = RouteCtx::new(&shape, policies, &tokens);
            let routing = routes.route(0, GateInput::logits(black_box(&logits))).expect("routes");
            (experts.forward(black_box(&x), &routing).expect("runs"), routing.unique_experts() as u64)
        });
    }
    group.finish();
}

criterion_group! {
    name = layers;
    config = Criterion::default().sample_size(20);
    targets = routing, projections, grouped_experts, entropies, step, batch_aware_bundled, batch_aware_layer
}
criterion_main!(layers);
