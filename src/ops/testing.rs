//! What the tests of both backends are made with.

use super::{Backend, Experts, ExpertsBuilder, HostTensor, reference};
use crate::moe::{Routing, RoutingBuilder};

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

/// `e` experts, packed and plain.
pub(super) fn experts_of(
    seed: u64,
    e: usize,
    d: usize,
    f: usize,
    backend: &Backend,
) -> (Experts, Vec<reference::ExpertWeights>) {
    let mut builder = ExpertsBuilder::new(e, backend);
    let mut plain = Vec::new();
    for i in 0..e as u64 {
        let (gate, up, down) =
            (weights(seed + 3 * i, f, d), weights(seed + 3 * i + 1, f, d), weights(seed + 3 * i + 2, d, f));
        builder.push(&gate, &up, &down).unwrap();
        plain.push((gate.to_f32(), up.to_f32(), down.to_f32()));
    }
    (builder.finish().unwrap(), plain)
}
