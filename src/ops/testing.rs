//! What the tests of both backends are made with.

use super::{
    Backend, Experts, ExpertsBuilder, HostFfn, HostLinear, HostTensor, KvCache, KvShape, Segment, StepLayout,
    attention, reference, to_host,
};
use crate::moe::{Routing, RoutingBuilder};
use crate::types::{Activation, BlockId};
use candle_core::DType;

/// Reproducible numbers in ±1.
pub(super) fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Numbers that bf16 and f16 hold exactly, so that one reference serves every dtype.
pub(super) fn exact(seed: u64, n: usize) -> Vec<f32> {
    numbers(seed, n).into_iter().map(|x| (x * 64.0).round() / 64.0).collect()
}

/// A matrix of [`exact`] numbers.
pub(super) fn weights(seed: u64, rows: usize, columns: usize) -> HostTensor {
    HostTensor::from_f32(&[rows, columns], &exact(seed, rows * columns))
}

/// Agreement within `tolerance` of the largest magnitude, which is taken for at least 1.
pub(super) fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1.0f32, |m, w| m.max(w.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "element {i}: {g} is not {w} (scale {scale})");
    }
}

/// Routes token t to the experts of bit mask `masks[t]`.
pub(super) fn routed(masks: &[u8], experts: usize) -> Routing {
    let mut builder = RoutingBuilder::new(masks.len(), experts);
    for (t, mask) in masks.iter().enumerate() {
        let chosen: Vec<u16> = (0..experts as u16).filter(|e| mask >> e & 1 == 1).collect();
        builder.choose(t, &chosen);
        builder.weigh(t).iter_mut().enumerate().for_each(|(i, slot)| slot.1 = 0.25 + 0.5 * i as f32);
    }
    builder.finish(masks.len()).unwrap()
}

/// What a net can be.
pub(super) const ACTIVATIONS: [Activation; 4] =
    [Activation::Swiglu, Activation::Gelu, Activation::Relu, Activation::Silu];

/// A net of widths (D, F) and of an activation, with or without biases, as a checkpoint has it and plain.
pub(super) fn net_of(
    seed: u64,
    (d, f): (usize, usize),
    (activation, bias): (Activation, bool),
) -> (HostFfn, reference::Ffn) {
    let linear = |seed: u64, rows: usize, columns: usize| HostLinear {
        weight: weights(seed, rows, columns),
        bias: bias.then(|| HostTensor::from_f32(&[rows], &exact(seed + 500, rows))),
    };
    let plain = |linear: &HostLinear| reference::Projection {
        weight: linear.weight.to_f32(),
        bias: linear.bias.as_ref().map(HostTensor::to_f32),
    };
    let gate = activation.gated().then(|| linear(seed, f, d));
    let net = HostFfn { gate, up: linear(seed + 1, f, d), down: linear(seed + 2, d, f) };
    let gate = net.gate.as_ref().map(plain);
    let plain = reference::Ffn { activation, gate, up: plain(&net.up), down: plain(&net.down) };
    (net, plain)
}

/// `e` experts as [`net_of`] makes them, packed and plain.
pub(super) fn experts_of(
    seed: u64,
    e: usize,
    widths: (usize, usize),
    kind: (Activation, bool),
    backend: &Backend,
) -> (Experts, Vec<reference::Ffn>) {
    let mut builder = ExpertsBuilder::new(e, kind.0, backend);
    let mut plain = Vec::new();
    for i in 0..e as u64 {
        let (net, net_plain) = net_of(seed + 3 * i, widths, kind);
        builder.push(&net).unwrap();
        plain.push(net_plain);
    }
    (builder.finish().unwrap(), plain)
}

/// Copies the blocks of a sequence, goes on with the copy, and checks that both attend as one sequence would.
pub(super) fn check_copied_blocks(backend: &Backend) {
    let (heads, head_dim, block_size) = (2, 8, 4);
    let width = heads * head_dim;
    let shape = KvShape { layers: 2, blocks: 5, block_size, kv_heads: heads, head_dim };
    // Activations on the CPU are f32 whatever the cache holds.
    let dtype = if backend.device().is_cpu() { DType::F32 } else { backend.dtype() };
    let mut kv = KvCache::new(shape, backend).unwrap();
    // Tokens `start..start + len` with keys and values of `seed`, in the given blocks; their attention in both layers.
    let run = |kv: &mut KvCache, start: usize, len: usize, seed: u64, blocks: [u32; 2]| -> Vec<f32> {
        let blocks = blocks.map(BlockId).to_vec();
        let step = StepLayout::new(vec![Segment { start, len, blocks }], kv, backend).unwrap();
        let rows = |seed: u64| {
            let values = HostTensor::from_f32(&[len, width], &exact(seed, len * width));
            values.to_tensor(dtype, backend.device()).unwrap()
        };
        let layer = |layer: usize| {
            let seed = seed + 10 * layer as u64;
            let (q, k, v) = (rows(seed), rows(seed + 1), rows(seed + 2));
            to_host(&attention([&q, &k, &v], layer, None, kv, &step, None).unwrap()).unwrap()
        };
        [0, 1].map(layer).concat()
    };
    run(&mut kv, 0, 6, 1, [3, 1]);
    kv.copy_blocks(&[(BlockId(3), BlockId(0)), (BlockId(1), BlockId(4))]).unwrap();
    let copy = run(&mut kv, 6, 1, 50, [0, 4]);
    assert_ne!(run(&mut kv, 6, 1, 70, [3, 1]), copy, "other keys and values come next");
    assert_eq!(run(&mut kv, 6, 1, 50, [3, 1]), copy, "what is in the copy is what is in the source");
    assert_eq!(run(&mut kv, 6, 1, 50, [0, 4]), copy, "and neither writes into the other");
    assert!(kv.copy_blocks(&[(BlockId(2), BlockId(2))]).is_err());
    assert!(kv.copy_blocks(&[(BlockId(2), BlockId(5))]).is_err());
}
