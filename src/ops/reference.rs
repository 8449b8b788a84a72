//! The operations written the plain way: what every fast path must agree with.

use crate::moe::Routing;

/// `x [T, I] · wᵀ [I, O]`, f64 accumulation.
pub fn linear(x: &[f32], w: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len() / inputs * outputs);
    for row in x.chunks_exact(inputs) {
        for w_row in w.chunks_exact(inputs) {
            y.push(row.iter().zip(w_row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32);
        }
    }
    y
}

/// `silu(x) = x · sigmoid(x)`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// SwiGLU: `down(silu(gate(x)) ⊙ up(x))`; `gate`, `up` are `[F, D]`, `down` is `[D, F]`.
pub fn swiglu(x: &[f32], gate: &[f32], up: &[f32], down: &[f32], d: usize, f: usize) -> Vec<f32> {
    let (g, u) = (linear(x, gate, d, f), linear(x, up, d, f));
    let h: Vec<f32> = g.iter().zip(&u).map(|(g, u)| silu(*g) * u).collect();
    linear(&h, down, f, d)
}

/// The weights of one expert: gate `[F, D]`, up `[F, D]`, down `[D, F]`.
pub type ExpertWeights = (Vec<f32>, Vec<f32>, Vec<f32>);

/// Every token's weighted sum over its experts.
pub fn experts(x: &[f32], experts: &[ExpertWeights], routing: &Routing, d: usize, f: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (e, (gate, up, down)) in experts.iter().enumerate() {
        for row in routing.expert_rows(e) {
            let t = routing.token_r()[row] as usize;
            let out = swiglu(&x[t * d..(t + 1) * d], gate, up, down, d, f);
            for (y, o) in y[t * d..(t + 1) * d].iter_mut().zip(out) {
                *y += routing.weight_r()[row] * o;
            }
        }
    }
    y
}

/// `x / sqrt(mean(x²) + eps) ⊙ weight` over the last `weight.len()` elements (Zhang & Sennrich, 2019).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        y.extend(row.iter().zip(weight).map(|(v, w)| (f64::from(*v) * scale) as f32 * w));
    }
    y
}

/// Causal softmax attention of one query head over the keys it sees: `q [hd]`, `keys` and `values` one row per
/// visible position.
pub fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<f32> {
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| f64::from(scale) * q.iter().zip(*k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0.0; q.len()];
    for (score, value) in scores.iter().zip(values) {
        let p = (score - max).exp() / sum;
        for (o, v) in out.iter_mut().zip(*value) {
            *o += (p * f64::from(*v)) as f32;
        }
    }
    out
}
