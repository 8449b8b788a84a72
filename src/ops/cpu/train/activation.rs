//! Activations between the projections of a feed-forward net.

use super::super::isa::multiversion;
use super::super::math::sigmoid;
use super::chunk_rows;
use crate::types::Activation;
use rayon::prelude::*;

impl Activation {
    /// Columns that make `width` columns of the result.
    pub(crate) fn input_width(self, width: usize) -> usize {
        if self.gated() { 2 * width } else { width }
    }

    /// `h_in [R, input_width]` to `[R, width]`.
    pub(crate) fn forward(self, h_in: &[f32], width: usize) -> Vec<f32> {
        let inputs = self.input_width(width).max(1);
        let mut h = vec![0.0; h_in.len() / inputs * width];
        let rows = chunk_rows(inputs);
        h_in.par_chunks(rows * inputs)
            .zip(h.par_chunks_mut(rows * width.max(1)))
            .for_each(|(h_in, h)| forward_rows(self, h_in, width, h));
        h
    }

    /// The gradient of `h_in [R, input_width]` from `dh [R, width]`.
    pub(crate) fn backward(self, h_in: &[f32], dh: &[f32], width: usize) -> Vec<f32> {
        let inputs = self.input_width(width).max(1);
        let mut d_in = vec![0.0; h_in.len()];
        let rows = chunk_rows(inputs);
        h_in.par_chunks(rows * inputs)
            .zip(dh.par_chunks(rows * width.max(1)))
            .zip(d_in.par_chunks_mut(rows * inputs))
            .for_each(|((h_in, dh), d_in)| backward_rows(self, h_in, dh, width, d_in));
        d_in
    }
}

multiversion!(fn forward_rows(act: Activation, h_in: &[f32], width: usize, h: &mut [f32]) = forward_rows_body);

#[inline(always)]
fn forward_rows_body(act: Activation, h_in: &[f32], width: usize, h: &mut [f32]) {
    match act {
        Activation::Swiglu => {
            for (h_in, h) in h_in.chunks_exact(2 * width).zip(h.chunks_exact_mut(width)) {
                let (gate, up) = h_in.split_at(width);
                for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
                    *h = g * sigmoid(*g) * u;
                }
            }
        }
        Activation::Gelu => h.iter_mut().zip(h_in).for_each(|(h, x)| *h = x * sigmoid(gelu_argument(*x))),
        Activation::Relu => h.iter_mut().zip(h_in).for_each(|(h, x)| *h = if *x > 0.0 { *x } else { 0.0 }),
        Activation::Silu => h.iter_mut().zip(h_in).for_each(|(h, x)| *h = x * sigmoid(*x)),
    }
}

multiversion!(
    fn backward_rows(act: Activation, h_in: &[f32], dh: &[f32], width: usize, d_in: &mut [f32]) = backward_rows_body
);

#[inline(always)]
fn backward_rows_body(act: Activation, h_in: &[f32], dh: &[f32], width: usize, d_in: &mut [f32]) {
    let all = d_in.iter_mut().zip(h_in).zip(dh);
    match act {
        Activation::Swiglu => {
            let rows = h_in.chunks_exact(2 * width).zip(dh.chunks_exact(width));
            for ((h_in, dh), d_in) in rows.zip(d_in.chunks_exact_mut(2 * width)) {
                swiglu_backward_row(h_in, dh, d_in);
            }
        }
        Activation::Gelu => all.for_each(|((d, x), dh)| *d = dh * gelu_slope(*x)),
        Activation::Relu => all.for_each(|((d, x), dh)| *d = if *x > 0.0 { *dh } else { 0.0 }),
        Activation::Silu => all.for_each(|((d, x), dh)| *d = dh * silu_slope(*x, sigmoid(*x))),
    }
}

#[inline(always)]
fn swiglu_backward_row(h_in: &[f32], dh: &[f32], d_in: &mut [f32]) {
    let (gate, up) = h_in.split_at(dh.len());
    let (d_gate, d_up) = d_in.split_at_mut(dh.len());
    for ((((dg, du), g), u), dh) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dh) {
        let s = sigmoid(*g);
        *dg = dh * u * silu_slope(*g, s);
        *du = dh * g * s;
    }
}

/// The derivative of `x·s`, `s = σ(x)`.
#[inline(always)]
fn silu_slope(x: f32, s: f32) -> f32 {
    s * (1.0 + x * (1.0 - s))
}

/// 2·√(2/π)
const GELU_SCALE: f32 = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
const GELU_CUBE: f32 = 0.044_715;

#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    GELU_SCALE * (x + GELU_CUBE * x * x * x)
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let s = sigmoid(gelu_argument(x));
    s * (1.0 + x * (1.0 - s) * (GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x * x)))
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const ALL: [Activation; 4] = [Activation::Swiglu, Activation::Gelu, Activation::Relu, Activation::Silu];

    fn reference(act: Activation, h_in: &[f64], width: usize) -> Vec<f64> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu = |x: f64| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + f64::from(GELU_CUBE) * x.powi(3))).tanh())
        };
        match act {
            Activation::Swiglu => {
                h_in.chunks(2 * width).flat_map(|h| (0..width).map(|i| silu(h[i]) * h[width + i])).collect()
            }
            Activation::Gelu => h_in.iter().map(|x| gelu(*x)).collect(),
            Activation::Relu => h_in.iter().map(|x| x.max(0.0)).collect(),
            Activation::Silu => h_in.iter().map(|x| silu(*x)).collect(),
        }
    }

    #[test]
    fn activations_and_their_gradients_match_the_reference() {
        for act in ALL {
            let width = 37;
            let h_in: Vec<f32> = random(2 * act.input_width(width), 1).iter().map(|x| 5.0 * x).collect();
            let dh = random(2 * width, 2);
            assert_close(&act.forward(&h_in, width), &reference(act, &wide(&h_in), width));
            let want = numeric_gradient(&h_in, |h| inner(&reference(act, h, width), &dh));
            assert_close(&act.backward(&h_in, &dh, width), &want);
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let width = 300;
        for act in ALL {
            let (h_in, dh) = (random(400 * act.input_width(width), 1), random(400 * width, 2));
            assert_same_bits_on_any_threads(|| {
                let mut all = act.forward(&h_in, width);
                all.extend(act.backward(&h_in, &dh, width));
                all
            });
        }
    }
}
