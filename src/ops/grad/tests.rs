//! Every operation's kernels against candle's own operations: values and gradients.

use super::experts::{combine_composed, expert_linear_composed, route_weights_composed};
use super::*;
use crate::moe::{Routing, RoutingBuilder};
use crate::types::Activation;
use candle_core::Var;
use std::sync::Arc;

/// Values in −1..1 that no two tests share.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn host(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-3f32, |a, w| a.max(w.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: {g} against {w}");
    }
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Value and gradients of `Σ op(inputs) ⊙ random`.
fn outcome(op: Op<'_>, inputs: &[Var]) -> (Vec<f32>, Vec<Vec<f32>>) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let weights = Tensor::from_vec(values(y.elem_count(), 99), y.shape(), &Device::Cpu).unwrap();
    let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |v: &Var| host(grads.get(v.as_tensor()).expect("every input gets a gradient"));
    (host(&y), inputs.iter().map(of).collect())
}

/// Holds `fast` against `composed` on inputs of these shapes.
fn agree(what: &str, shapes: &[&[usize]], tolerance: f32, fast: Op<'_>, composed: Op<'_>) {
    let input = |(i, shape): (usize, &&[usize])| {
        Var::from_vec(values(shape.iter().product(), i as u64 + 1), *shape, &Device::Cpu).unwrap()
    };
    let inputs: Vec<Var> = shapes.iter().enumerate().map(input).collect();
    let (y, grads) = outcome(fast, &inputs);
    let (y_want, grads_want) = outcome(composed, &inputs);
    close(&format!("{what}: value"), &y, &y_want, tolerance);
    for (i, (g, w)) in grads.iter().zip(&grads_want).enumerate() {
        close(&format!("{what}: gradient of input {i}"), g, w, tolerance);
    }
}

/// Seven tokens over four experts; expert 2 has none, and k varies.
fn routing() -> Arc<Routing> {
    let chosen: [&[u16]; 7] = [&[0, 1], &[3], &[1, 3, 0], &[0], &[3, 1], &[1], &[0, 3]];
    let mut builder = RoutingBuilder::new(chosen.len(), 4);
    chosen.iter().enumerate().for_each(|(t, c)| builder.choose(t, c));
    Arc::new(builder.finish(chosen.len()).unwrap())
}

#[test]
fn linear_agrees_with_candle() {
    let run = |t: &[Tensor]| linear(&t[0], &t[1], None, Precision::F32);
    agree("linear", &[&[9, 5], &[6, 5]], 1e-5, &run, &|t| linear::composed(&t[0], &t[1], None, Precision::F32));
    let run = |t: &[Tensor]| linear(&t[0], &t[1], Some(&t[2]), Precision::F32);
    let composed = |t: &[Tensor]| linear::composed(&t[0], &t[1], Some(&t[2]), Precision::F32);
    agree("linear with bias", &[&[9, 5], &[6, 5], &[6]], 1e-5, &run, &composed);
}

#[test]
fn bf16_products_are_f32_products_of_rounded_factors() {
    let round = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    let (x, w) = (values(64 * 48, 1), values(32 * 48, 2));
    let x = Tensor::from_vec(x, (64, 48), &Device::Cpu).unwrap();
    let w = Tensor::from_vec(w, (32, 48), &Device::Cpu).unwrap();
    let got = linear(&x, &w, None, Precision::Bf16).unwrap();
    let want = round(&x).unwrap().matmul(&round(&w).unwrap().t().unwrap()).unwrap();
    close("bf16", &host(&got), &host(&want), 1e-5);
}

#[test]
fn expert_projections_agree_with_candle_also_where_experts_have_no_rows() {
    let r = routing();
    let rows = r.rows();
    for gather in [true, false] {
        let n = if gather { r.tokens() } else { rows };
        let run = |t: &[Tensor]| expert_linear(&t[0], &t[1], None, &r, gather, Precision::F32);
        let composed = |t: &[Tensor]| expert_linear_composed(&t[0], &t[1], None, &r, gather, Precision::F32);
        agree("experts", &[&[n, 5], &[4, 6, 5]], 1e-5, &run, &composed);
        let run = |t: &[Tensor]| expert_linear(&t[0], &t[1], Some(&t[2]), &r, gather, Precision::F32);
        let composed = |t: &[Tensor]| expert_linear_composed(&t[0], &t[1], Some(&t[2]), &r, gather, Precision::F32);
        agree("experts with bias", &[&[n, 5], &[4, 6, 5], &[4, 6]], 1e-5, &run, &composed);
    }
}

#[test]
fn combining_agrees_with_candle_also_where_tokens_have_no_rows() {
    for r in [routing(), Arc::new(routing().capped(2))] {
        let run = |t: &[Tensor]| combine(&t[0], &t[1], &r);
        agree("combine", &[&[r.rows(), 5], &[r.rows()]], 1e-5, &run, &|t| combine_composed(&t[0], &t[1], &r));
    }
}

#[test]
fn weights_of_rows_agree_with_candle_raw_and_renormalised_capped_and_not() {
    let chosen = routing();
    for r in [chosen.clone(), Arc::new(chosen.capped(2))] {
        for renormalise in [false, true] {
            let run = |t: &[Tensor]| route_weights(&t[0], &chosen, &r, renormalise);
            let composed = |t: &[Tensor]| route_weights_composed(&t[0], &chosen, &r, renormalise);
            agree("weights", &[&[7, 4]], 1e-5, &run, &composed);
        }
    }
}

#[test]
fn norms_agree_with_candle() {
    let run = |t: &[Tensor]| rms_norm(&t[0], &t[1], 1e-5);
    agree("rms norm", &[&[6, 10], &[10]], 1e-4, &run, &|t| candle_nn::ops::rms_norm_slow(&t[0], &t[1], 1e-5));
    let run = |t: &[Tensor]| layer_norm(&t[0], &t[1], &t[2], 1e-5);
    let composed = |t: &[Tensor]| candle_nn::ops::layer_norm_slow(&t[0], &t[1], &t[2], 1e-5);
    agree("layer norm", &[&[6, 10], &[10], &[10]], 1e-4, &run, &composed);
}

#[test]
fn activations_agree_with_candle() {
    for activation in [Activation::Swiglu, Activation::Gelu, Activation::Relu, Activation::Silu] {
        let run = |t: &[Tensor]| activate(&t[0], activation);
        let composed = |t: &[Tensor]| pointwise::activate_composed(&t[0], activation);
        agree(&format!("{activation:?}"), &[&[5, 12]], 1e-4, &run, &composed);
    }
}

#[test]
fn attention_agrees_with_candle_with_and_without_rotation_and_shared_heads() {
    for (kv_heads, rotated, seq) in [(4, false, 5), (2, true, 7), (1, true, 70)] {
        let shape = AttentionShape { batch: 2, seq, heads: 4, kv_heads, head_dim: 6 };
        let rope = rotated.then(|| Arc::new(RopeTable::new(seq, 6, 10_000.0)));
        let width = (4 + 2 * kv_heads) * 6;
        let run = |t: &[Tensor]| attention(&t[0], shape, rope.as_ref(), Precision::F32);
        let composed = |t: &[Tensor]| attention::attention_composed(&t[0], shape, rope.as_ref(), Precision::F32);
        agree("attention", &[&[2 * seq, width]], 1e-4, &run, &composed);
    }
}

#[test]
fn cross_entropy_agrees_with_candle_and_leaves_ignored_targets_out() {
    let targets = [3, u32::MAX, 0, 10, 3];
    let run = |t: &[Tensor]| cross_entropy(&t[0], &t[1], &targets, 0.25, Precision::F32);
    let composed = |t: &[Tensor]| loss::cross_entropy_composed(&t[0], &t[1], &targets, 0.25, Precision::F32);
    agree("cross-entropy", &[&[5, 6], &[11, 6]], 1e-4, &run, &composed);
    let x = Tensor::zeros((1, 6), DType::F32, &Device::Cpu).unwrap();
    let w = Tensor::zeros((11, 6), DType::F32, &Device::Cpu).unwrap();
    let error = cross_entropy(&x, &w, &[11], 1.0, Precision::F32).unwrap_err().to_string();
    assert!(error.contains("11 is outside the vocabulary of 11"), "{error}");
}

#[test]
fn scores_are_losses_and_ranks() {
    let x = Tensor::new(&[[1f32, 0.0]; 2], &Device::Cpu).unwrap();
    let w = Tensor::new(&[[0f32, 0.0], [2.0, 0.0], [1.0, 0.0]], &Device::Cpu).unwrap();
    let got = scores(&x, &w, &[0, 1], Precision::F32).unwrap();
    let sum = (1.0 + 2f32.exp() + 1f32.exp()).ln();
    assert!((got[0].nll - sum).abs() < 1e-6 && (got[1].nll - (sum - 2.0)).abs() < 1e-6);
    assert_eq!((got[0].rank, got[1].rank), (2, 0));
}

#[test]
fn embedding_sums_the_gradients_of_equal_ids() {
    let ids = [2, 0, 2, 3];
    let run = |t: &[Tensor]| embed(&t[0], &ids);
    let composed = |t: &[Tensor]| t[0].index_select(&Tensor::new(&ids, &Device::Cpu)?, 0);
    agree("embedding", &[&[5, 3]], 1e-5, &run, &composed);
    assert!(embed(&Tensor::zeros((5, 3), DType::F32, &Device::Cpu).unwrap(), &[5]).is_err());
}

#[test]
fn dropout_lets_gradients_through_where_it_let_values_through() {
    let ones = vec![1.0; 40];
    let mask = super::super::cpu::train::dropout::dropout(&ones, 0.5, 7);
    assert!(mask.contains(&0.0) && mask.contains(&2.0));
    let mask = Tensor::from_vec(mask, (4, 10), &Device::Cpu).unwrap();
    agree("dropout", &[&[4, 10]], 1e-6, &|t| dropout(&t[0], 0.5, 7), &|t| &t[0] * &mask);
}

#[test]
fn the_optimisers_update_is_the_same_on_the_host_and_composed() {
    let step = AdamStep {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        correction1: 0.1,
        correction2: 0.01,
        clip: 0.5,
    };
    let fresh = || Var::from_vec(values(50, 3), 50, &Device::Cpu).unwrap();
    let grad = Tensor::from_vec(values(50, 4), 50, &Device::Cpu).unwrap();
    let (fast, composed) = (fresh(), fresh());
    let mut host_moments = Moments::zeros(&fast).unwrap();
    let zeros = composed.zeros_like().unwrap();
    let mut device_moments = Moments::Device { m: zeros.clone(), v: zeros };
    for _ in 0..3 {
        adamw(&fast, &grad, &mut host_moments, &step).unwrap();
        adamw(&composed, &grad, &mut device_moments, &step).unwrap();
    }
    close("adamw", &host(&fast), &host(&composed), 1e-5);
    let squares: f64 = host(&grad).iter().map(|g| f64::from(*g).powi(2)).sum();
    assert!((sum_of_squares(&grad).unwrap() - squares).abs() < 1e-6 * squares);
}
