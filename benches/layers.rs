//! One group per layer of the system: routing, projections, grouped experts, attention, one whole step.
//!
//! `cargo bench` prints times; ratios within one run are what is worth quoting.

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{LoadOptions, Loaded, StepInput, load};
use moe_serve::moe::router::{GateInput, ROUTERS, StepTokens};
use moe_serve::moe::{Policy, RouteCtx, Routing, RoutingBuilder};
use moe_serve::ops::{
    Backend, Experts, ExpertsBuilder, HostFfn, HostTensor, KvCache, KvShape, Linear, Segment, StepLayout, attention,
};
use moe_serve::types::{Activation, BlockId, MoeShape};
use std::hint::black_box;
use std::sync::Arc;

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
        let step = StepTokens {
            token_t: (0..tokens as u32).collect(),
            position_t: (0..tokens as u32).collect(),
            policy_t: vec![0; tokens],
            ..Default::default()
        };
        group.throughput(Throughput::Elements(tokens as u64));
        for router in ROUTERS {
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

/// A decode step of the bundled checkpoint: `batch` sequences at position 128, one token each.
fn step(c: &mut Criterion) {
    let loaded = bundled();
    let model = &loaded.model;
    let shape = model.shape();
    let (block_size, context) = (16, 128);
    let mut group = c.benchmark_group("decode_step_bundled");
    for batch in [1usize, 32] {
        let each = context / block_size + 1;
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: each * batch,
            block_size,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        let mut kv = KvCache::new(kv_shape, model.backend()).expect("memory");
        let blocks = |s: usize| (0..each).map(|b| BlockId((s * each + b) as u32)).collect();
        let segments = (0..batch).map(|s| Segment { start: context, len: 1, blocks: blocks(s) }).collect();
        let layout = StepLayout::new(segments, &kv, model.backend()).expect("a layout");
        let rows: Vec<u32> = (0..batch as u32).collect();
        let tokens = StepTokens {
            token_t: (0..batch as u32).map(|i| 100 + i).collect(),
            position_t: vec![context as u32; batch],
            policy_t: vec![0; batch],
            ..Default::default()
        };
        let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &rows };
        group.throughput(Throughput::Elements(batch as u64));
        for router in ["native", "topk:1", "dynk:0.8", "ratio:0.5", "threshold:0.2"] {
            let policies = [Arc::new(Policy::build(&router.parse().expect("a spec"), &shape.moe).expect("fits"))];
            group.bench_function(BenchmarkId::new(router, batch), |b| {
                b.iter(|| {
                    let mut routes = RouteCtx::new(&shape.moe, &policies, &tokens);
                    let hidden = model.forward(&input, &mut kv, &mut routes).expect("runs").expect("rows");
                    model.logits(&hidden, 0, batch).expect("runs")
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = layers;
    config = Criterion::default().sample_size(20);
    targets = routing, projections, grouped_experts, entropies, step
}
criterion_main!(layers);
