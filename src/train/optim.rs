//! AdamW with a global gradient norm, and the learning rate's schedule. Moments are kept here, so that a run can be resumed.

use super::lm::Param;
use super::recipe::OptimSpec;
use crate::ops::grad::{self, AdamStep, Moments};
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

/// Linear warm-up to `lr`, then a cosine down to its minimum at the last step. `step` counts from 0.
pub fn learning_rate(spec: &OptimSpec, step: u64) -> f64 {
    if step < spec.warmup_steps {
        return spec.lr * (step + 1) as f64 / spec.warmup_steps as f64;
    }
    let span = (spec.steps.saturating_sub(spec.warmup_steps)).max(1) as f64;
    let done = ((step - spec.warmup_steps) as f64 / span).min(1.0);
    let low = spec.lr * spec.lr_min_share;
    low + (spec.lr - low) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Gradients of the parameters, in their order, summed over micro-batches.
#[derive(Default)]
pub struct Gradients {
    grad_p: Vec<Tensor>,
}

/// A parameter with a gradient that is no number.
#[derive(Debug, thiserror::Error)]
#[error("the gradient of `{name}` is not finite")]
pub struct NotFinite {
    pub name: String,
}

impl Gradients {
    /// Adds one micro-batch's.
    ///
    /// # Errors
    /// A parameter without a gradient, which would silently never learn.
    pub fn add(&mut self, params: &[Param], store: &GradStore) -> Result<()> {
        let grad = |p: &Param| match store.get(p.var.as_tensor()) {
            Some(grad) => grad.contiguous(),
            None => candle_core::bail!("parameter `{}` got no gradient", p.name),
        };
        let grads = params.iter().map(grad).collect::<Result<Vec<_>>>()?;
        self.grad_p = if self.grad_p.is_empty() {
            grads
        } else {
            self.grad_p.iter().zip(&grads).map(|(sum, g)| sum + g).collect::<Result<_>>()?
        };
        Ok(())
    }

    /// The Euclidean norm of all gradients together.
    ///
    /// # Errors
    /// The first parameter whose gradient is not finite, or a failure of the device.
    pub fn norm(&self, params: &[Param]) -> Result<std::result::Result<f64, NotFinite>> {
        let mut sum = 0.0;
        for (p, grad) in params.iter().zip(&self.grad_p) {
            let squares = grad::sum_of_squares(grad)?;
            if !squares.is_finite() {
                return Ok(Err(NotFinite { name: p.name.clone() }));
            }
            sum += squares;
        }
        Ok(Ok(sum.sqrt()))
    }
}

/// AdamW (Loshchilov & Hutter, arXiv 1711.05101) with bias-corrected moments.
pub struct AdamW {
    moments_p: Vec<Moments>,
    /// Steps taken.
    steps: u64,
}

impl AdamW {
    /// Moments of 0 for every parameter.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn new(params: &[Param]) -> Result<Self> {
        let moments_p = params.iter().map(|p| Moments::zeros(p.var.as_tensor())).collect::<Result<_>>()?;
        Ok(Self { moments_p, steps: 0 })
    }

    /// One step at learning rate `lr`, with gradients scaled by `scale`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn step(&mut self, params: &[Param], grads: &Gradients, spec: &OptimSpec, lr: f64, scale: f64) -> Result<()> {
        self.steps += 1;
        let exponent = self.steps.min(i32::MAX as u64) as i32;
        for ((p, grad), moments) in params.iter().zip(&grads.grad_p).zip(&mut self.moments_p) {
            let step = AdamStep {
                lr: lr as f32,
                beta1: spec.beta1 as f32,
                beta2: spec.beta2 as f32,
                eps: spec.eps as f32,
                weight_decay: if p.decays { spec.weight_decay as f32 } else { 0.0 },
                correction1: (1.0 - spec.beta1.powi(exponent)) as f32,
                correction2: (1.0 - spec.beta2.powi(exponent)) as f32,
                clip: scale as f32,
            };
            grad::adamw(&p.var, grad, moments, &step)?;
        }
        Ok(())
    }

    /// Moments with the names they are stored under.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn moments(&self, params: &[Param]) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(2 * params.len());
        for (p, moments) in params.iter().zip(&self.moments_p) {
            let (m, v) = moments.tensors(p.var.shape())?;
            tensors.push((format!("{}.m", p.name), m));
            tensors.push((format!("{}.v", p.name), v));
        }
        Ok(tensors)
    }

    /// Takes up what [`Self::moments`] gave after `steps` steps. `tensor` finds one by name.
    ///
    /// # Errors
    /// What `tensor` says, or a failure of the device.
    pub fn restore<E: From<candle_core::Error>>(
        &mut self,
        params: &[Param],
        steps: u64,
        mut tensor: impl FnMut(&str, &candle_core::Shape) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<(), E> {
        for (p, moments) in params.iter().zip(&mut self.moments_p) {
            let m = tensor(&format!("{}.m", p.name), p.var.shape())?;
            let v = tensor(&format!("{}.v", p.name), p.var.shape())?;
            *moments = Moments::from_tensors(&m, &v)?;
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> OptimSpec {
        let text = "steps = 110\nbatch = 1\nseq = 1\nlr = 1.0\nlr_min_share = 0.1\nwarmup_steps = 10";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_rate_rises_in_a_line_and_falls_in_a_cosine() {
        let at = |step| learning_rate(&spec(), step);
        assert!((at(0) - 0.1).abs() < 1e-12 && (at(9) - 1.0).abs() < 1e-12);
        assert!((at(10) - 1.0).abs() < 1e-12);
        assert!((at(60) - 0.55).abs() < 1e-12);
        assert!((at(110) - 0.1).abs() < 1e-12 && (at(1000) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn steps_follow_the_published_update() {
        let device = candle_core::Device::Cpu;
        let start = [1.0f32, -2.0, 0.5];
        let var = candle_core::Var::from_slice(&start, 3, &device).unwrap();
        let params = [Param { name: "w".into(), var, decays: true }];
        let spec = OptimSpec { weight_decay: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, ..spec() };
        let mut adam = AdamW::new(&params).unwrap();
        let (mut w, mut m, mut v) = (start.map(f64::from), [0.0; 3], [0.0; 3]);
        for step in 1..=3 {
            let grad = [0.3, -0.1 * f64::from(step), 2.0];
            for i in 0..3 {
                let g = grad[i] * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(step)), v[i] / (1.0 - 0.95f64.powi(step)));
                w[i] -= 0.01 * (mh / (vh.sqrt() + 1e-8) + 0.1 * w[i]);
            }
            let grad = Tensor::from_vec(grad.map(|g| g as f32).to_vec(), 3, &device).unwrap();
            adam.step(&params, &Gradients { grad_p: vec![grad] }, &spec, 0.01, 0.5).unwrap();
        }
        let got: Vec<f32> = params[0].var.to_vec1().unwrap();
        got.iter().zip(w).for_each(|(g, w)| assert!((f64::from(*g) - w).abs() < 1e-6, "{g} against {w}"));
    }

    #[test]
    fn a_gradient_that_is_no_number_is_named() {
        let var = candle_core::Var::zeros(2, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let grad = Tensor::new(&[1.0, f32::NAN], &candle_core::Device::Cpu).unwrap();
        let params = [Param { name: "layers.0.qkv.weight".into(), var, decays: true }];
        let found = Gradients { grad_p: vec![grad] }.norm(&params).unwrap().unwrap_err();
        assert_eq!(found.name, "layers.0.qkv.weight");
    }
}
