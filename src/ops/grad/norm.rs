//! Normalisation over the last dimension.

use super::{gradient, output, slice, with3};
use crate::ops::cpu::train::norm as kernel;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `x / sqrt(mean(x²) + eps) ⊙ w`: `x [T, D]`, `w [D]` (Zhang & Sennrich, arXiv 1910.07467).
///
/// # Errors
/// A failure of the device.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return candle_nn::ops::rms_norm_slow(x, w, eps);
    }
    x.contiguous()?.apply_op2(w, RmsNorm { eps })
}

/// `(x − mean(x)) / sqrt(var(x) + eps) ⊙ w + b`: `x [T, D]`, `w` and `b` `[D]` (Ba et al., arXiv 1607.06450).
///
/// # Errors
/// A failure of the device.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return candle_nn::ops::layer_norm_slow(x, w, b, eps);
    }
    x.contiguous()?.apply_op3(w, b, LayerNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        output(kernel::rms_norm(slice(s1, l1)?, slice(s2, l2)?, self.eps), l1.shape())
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dw) = with3(x, w, &dy, |x, w, dy| kernel::rms_norm_backward(x, w, self.eps, dy))?;
        Ok((gradient(dx, x)?, gradient(dw, w)?))
    }
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        output(kernel::layer_norm(slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?, self.eps), l1.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dw, db) = with3(x, w, &dy, |x, w, dy| kernel::layer_norm_backward(x, w, self.eps, dy))?;
        Ok((gradient(dx, x)?, gradient(dw, w)?, gradient(db, b)?))
    }
}
