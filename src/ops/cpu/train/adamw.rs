//! AdamW, and the norm for clipping.

use super::super::isa::multiversion;
use super::CHUNK;
use rayon::prelude::*;

/// One step's constants (Loshchilov and Hutter 2019, algorithm 2, decay scaled by the learning rate).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// `1 − beta1ᵗ` and `1 − beta2ᵗ` of step t, counted from 1.
    pub correction1: f32,
    pub correction2: f32,
    /// What gradients are multiplied by first: 1 where nothing is clipped.
    pub clip: f32,
}

impl AdamW {
    /// Updates parameters and both moments in place.
    pub(crate) fn step(&self, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        assert_eq!((grad.len(), m.len(), v.len()), (param.len(), param.len(), param.len()));
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        param
            .par_chunks_mut(CHUNK)
            .zip(grad.par_chunks(CHUNK))
            .zip(moments)
            .for_each(|((param, grad), (m, v))| step_chunk(self, param, grad, m, v));
    }
}

multiversion!(
    fn step_chunk(adamw: &AdamW, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) = step_chunk_body
);

#[inline(always)]
fn step_chunk_body(adamw: &AdamW, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, correction1, correction2, clip } = *adamw;
    let keep = 1.0 - lr * weight_decay;
    let rate = lr / correction1;
    let root = 1.0 / correction2.sqrt();
    for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
        let g = g * clip;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *p = *p * keep - rate * *m / (v.sqrt() * root + eps);
    }
}

/// Σ gᵢ², for the norm over all gradients.
pub(crate) fn sum_of_squares(grad: &[f32]) -> f64 {
    let sums: Vec<f64> = grad
        .par_chunks(CHUNK)
        .map(|grad| {
            let mut sum = 0.0;
            sum_chunk(grad, &mut sum);
            sum
        })
        .collect();
    sums.iter().sum()
}

multiversion!(fn sum_chunk(grad: &[f32], sum: &mut f64) = sum_chunk_body);

#[inline(always)]
fn sum_chunk_body(grad: &[f32], sum: &mut f64) {
    let mut lanes = [0.0f64; 16];
    let (grad, rest) = grad.as_chunks::<16>();
    for grad in grad {
        for i in 0..16 {
            lanes[i] += f64::from(grad[i]) * f64::from(grad[i]);
        }
    }
    *sum = add_lanes(&lanes) + rest.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
}

/// Not inlined, for the reason given in `math`.
#[inline(never)]
fn add_lanes(lanes: &[f64; 16]) -> f64 {
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn three_steps_match_the_published_algorithm() {
        let n = 37;
        let (mut param, mut m, mut v) = (random(n, 1), vec![0.0; n], vec![0.0; n]);
        let (mut p64, mut m64, mut v64) = (wide(&param), vec![0.0f64; n], vec![0.0f64; n]);
        for t in 1..=3 {
            let grad = random(n, 10 + t as u32);
            let adamw = AdamW {
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                correction1: 1.0 - 0.9f32.powi(t),
                correction2: 1.0 - 0.95f32.powi(t),
                clip: 0.5,
            };
            adamw.step(&mut param, &grad, &mut m, &mut v);
            for i in 0..n {
                let g = 0.5 * f64::from(grad[i]);
                m64[i] = 0.9 * m64[i] + 0.1 * g;
                v64[i] = 0.95 * v64[i] + 0.05 * g * g;
                let (m_hat, v_hat) = (m64[i] / (1.0 - 0.9f64.powi(t)), v64[i] / (1.0 - 0.95f64.powi(t)));
                p64[i] -= 0.01 * (m_hat / (v_hat.sqrt() + 1e-8) + 0.1 * p64[i]);
            }
        }
        assert_close(&param, &p64);
        assert_close(&m, &m64);
        assert_close(&v, &v64);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let grad = random(3 * CHUNK + 5, 1);
        assert_same_bits_on_any_threads(|| {
            let sum = sum_of_squares(&grad);
            vec![sum as f32, (sum - f64::from(sum as f32)) as f32]
        });
        let want: f64 = grad.iter().map(|g| f64::from(*g).powi(2)).sum();
        assert!((sum_of_squares(&grad) / want - 1.0).abs() < 1e-12);
    }
}
