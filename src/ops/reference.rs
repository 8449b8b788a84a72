//! The operations written the plain way: what every fast path must agree with.

use crate::moe::Routing;
use crate::types::Activation;

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

/// GELU by tanh: `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))`.
pub fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())) as f32
}

/// A projection: weight `[O, I]`, bias `[O]` where there is one.
#[derive(Clone, Debug)]
pub struct Projection {
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
}

impl Projection {
    /// `x [T, I] → [T, O]`.
    pub fn forward(&self, x: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
        let mut y = linear(x, &self.weight, inputs, outputs);
        if let Some(bias) = &self.bias {
            y.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += b);
        }
        y
    }
}

/// A feed-forward net: gate (a SwiGLU's) and up `[F, D]`, down `[D, F]`.
#[derive(Clone, Debug)]
pub struct Ffn {
    pub activation: Activation,
    pub gate: Option<Projection>,
    pub up: Projection,
    pub down: Projection,
}

/// `down(silu(gate(x)) ⊙ up(x))`, or `down(act(up(x)))` without a gate.
pub fn feed_forward(x: &[f32], net: &Ffn, d: usize, f: usize) -> Vec<f32> {
    let mut h = net.up.forward(x, d, f);
    match (&net.gate, net.activation) {
        (Some(gate), _) => h.iter_mut().zip(gate.forward(x, d, f)).for_each(|(u, g)| *u *= silu(g)),
        (None, Activation::Gelu) => h.iter_mut().for_each(|u| *u = gelu(*u)),
        (None, Activation::Relu) => h.iter_mut().for_each(|u| *u = u.max(0.0)),
        (None, Activation::Silu | Activation::Swiglu) => h.iter_mut().for_each(|u| *u = silu(*u)),
    }
    net.down.forward(&h, f, d)
}

/// Every token's weighted sum over its experts.
pub fn experts(x: &[f32], experts: &[Ffn], routing: &Routing, d: usize, f: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (e, net) in experts.iter().enumerate() {
        for row in routing.expert_rows(e) {
            let t = routing.token_r()[row] as usize;
            let out = feed_forward(&x[t * d..(t + 1) * d], net, d, f);
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

/// `(x − mean(x)) / sqrt(mean((x − mean(x))²) + eps) ⊙ weight + bias` over the last `weight.len()` elements (Ba et al.,
/// 2016).
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let n = row.len() as f64;
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        let normed = row.iter().map(|v| (f64::from(*v) - mean) * scale);
        y.extend(normed.zip(weight).zip(bias).map(|((v, w), b)| (v * f64::from(*w) + f64::from(*b)) as f32));
    }
    y
}

/// How a query head spreads over the keys it sees, softmax of their products: `q [hd]`, `keys` one row per visible
/// position.
pub fn attention_weights(q: &[f32], keys: &[&[f32]], scale: f32) -> Vec<f64> {
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| f64::from(scale) * q.iter().zip(*k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}

/// Entropy in nats: `−Σ p·ln p`.
pub fn entropy(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

/// Causal softmax attention of one query head over the keys it sees: `q [hd]`, `keys` and `values` one row per
/// visible position.
pub fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<f32> {
    let mut out = vec![0.0; q.len()];
    for (p, value) in attention_weights(q, keys, scale).into_iter().zip(values) {
        for (o, v) in out.iter_mut().zip(*value) {
            *o += (p * f64::from(*v)) as f32;
        }
    }
    out
}
