//! The optimiser's update and the norm of gradients.

use crate::ops::cpu::train::adamw::{AdamW, sum_of_squares as squares};
use crate::ops::cpu::with_f32;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor, Var};
use std::sync::Mutex;

/// First and second moments of one parameter's gradients.
pub enum Moments {
    Host { m: Vec<f32>, v: Vec<f32> },
    Device { m: Tensor, v: Tensor },
}

impl Moments {
    /// 0 for every element of `param`, where it lives.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn zeros(param: &Tensor) -> Result<Self> {
        match param.device() {
            Device::Cpu => {
                let zeros = vec![0.0; param.elem_count()];
                Ok(Self::Host { m: zeros.clone(), v: zeros })
            }
            _ => Ok(Self::Device { m: param.zeros_like()?, v: param.zeros_like()? }),
        }
    }

    /// Copies to be stored, in the parameter's `shape`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn tensors(&self, shape: &Shape) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Host { m, v } => {
                Ok((Tensor::from_slice(m, shape, &Device::Cpu)?, Tensor::from_slice(v, shape, &Device::Cpu)?))
            }
            Self::Device { m, v } => Ok((m.clone(), v.clone())),
        }
    }

    /// What [`Self::tensors`] gave.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn from_tensors(m: &Tensor, v: &Tensor) -> Result<Self> {
        match m.device() {
            Device::Cpu => Ok(Self::Host { m: crate::ops::to_host(m)?, v: crate::ops::to_host(v)? }),
            _ => Ok(Self::Device { m: m.clone(), v: v.clone() }),
        }
    }
}

/// One AdamW step of `param` (Loshchilov & Hutter, arXiv 1711.05101):
/// `p −= lr · (m̂ / (√v̂ + eps) + weight_decay · p)`.
///
/// # Errors
/// A failure of the device.
pub fn adamw(param: &Var, grad: &Tensor, moments: &mut Moments, step: &AdamW) -> Result<()> {
    match moments {
        Moments::Host { m, v } => param.inplace_op2(grad, &Update { moments: Mutex::new((m, v)), step }),
        Moments::Device { m, v } => {
            let grad = (grad * f64::from(step.clip))?;
            let (beta1, beta2) = (f64::from(step.beta1), f64::from(step.beta2));
            *m = ((&*m * beta1)? + (&grad * (1.0 - beta1))?)?;
            *v = ((&*v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
            let mean = (&*m / f64::from(step.correction1))?;
            let root = ((&*v / f64::from(step.correction2))?.sqrt()? + f64::from(step.eps))?;
            let decay = (param.as_tensor() * f64::from(step.weight_decay))?;
            let change = ((mean / root)? + decay)?;
            param.set(&(param.as_tensor() - (change * f64::from(step.lr))?)?)
        }
    }
}

struct Update<'a> {
    moments: Mutex<(&'a mut Vec<f32>, &'a mut Vec<f32>)>,
    step: &'a AdamW,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let grad = super::slice(s2, l2)?;
        let (CpuStorage::F32(param), Some((start, end))) = (s1, l1.contiguous_offsets()) else {
            candle_core::bail!("a parameter is a contiguous f32 tensor");
        };
        if let Ok(mut moments) = self.moments.lock() {
            let (m, v) = &mut *moments;
            self.step.step(&mut param[start..end], grad, m, v);
        }
        Ok(())
    }
}

/// `Σ x²`.
///
/// # Errors
/// A failure of the device.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    match x.device() {
        Device::Cpu => with_f32(x, squares),
        _ => Ok(f64::from(x.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?)),
    }
}
