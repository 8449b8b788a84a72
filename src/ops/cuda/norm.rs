//! Norms and rotary embedding.

use super::launch::{Element, Held, Kernel, cuda, for_dtype, launch, packed, tensor};
use crate::ops::StepLayout;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{DType, Result, Tensor};

/// `x / sqrt(mean(x²) + eps) ⊙ w` over every `W` elements: `x [T, n·W]`, `w [W]` → `[T, n·W]` in x's dtype.
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    let width = w.dims1()?;
    if !x.dim(candle_core::D::Minus1)?.is_multiple_of(width) {
        candle_core::bail!("a norm of width {width} was given rows of shape {:?}", x.shape());
    }
    let (x, w) = (packed(x, x.dtype())?, packed(w, x.dtype())?);
    for_dtype!(x.dtype(), rms_norm_as(&x, &w, eps))
}

fn rms_norm_as<E: Element>(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    let device = cuda(x.device())?;
    let width = w.elem_count();
    let (x_held, w_held) = (Held::new(x), Held::new(w));
    // SAFETY: the kernel writes every element.
    let mut y = unsafe { device.alloc::<E>(x.elem_count())? };
    let kernel = Kernel::new::<E>("rms_norm", device)?;
    let mut args = kernel.args();
    let width_arg = width as u32;
    args.arg(x_held.elements::<E>()?).arg(w_held.elements::<E>()?).arg(&mut y).arg(&width_arg).arg(&eps);
    // A whole number of warps that hangs on the width alone.
    let threads = width.next_multiple_of(32).min(512) as u32;
    // SAFETY: rms_norm(x, w, y, unsigned, float); x and y hold as many groups of `width` as there are blocks.
    unsafe { launch(&mut args, (x.elem_count() / width, 1, 1), threads)? };
    Ok(tensor(y, x.shape(), device))
}

/// `(x − m) / sqrt(mean((x − m)²) + eps) ⊙ w + b` with m the mean, over every `W` elements: `x [T, n·W]`, `w` and `b`
/// `[W]` → `[T, n·W]` in x's dtype. Candle's operations, in f32.
pub(crate) fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<Tensor> {
    let width = w.dims1()?;
    let groups = x.to_dtype(DType::F32)?.reshape(((), width))?;
    let centred = groups.broadcast_sub(&groups.mean_keepdim(1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(1)? + f64::from(eps))?.sqrt()?;
    let normed = centred.broadcast_div(&deviation)?;
    let y = normed.broadcast_mul(&w.to_dtype(DType::F32)?)?.broadcast_add(&b.to_dtype(DType::F32)?)?;
    y.reshape(x.shape())?.to_dtype(x.dtype())
}

/// Rotates every head of `x [T, heads·hd]` by its token's position; `cos` and `sin` are `[positions, hd/2]` in f32.
pub(crate) fn rotate(x: &Tensor, step: &StepLayout, head_dim: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let positions = step.positions().iter().max().map_or(0, |&p| p as usize + 1);
    if tokens != step.tokens() || !width.is_multiple_of(head_dim) || positions > cos.dim(0)? {
        candle_core::bail!(
            "a rotary table of {} positions and heads of {head_dim} was given {:?} for {} tokens up to position \
             {positions}",
            cos.dim(0)?,
            x.shape(),
            step.tokens()
        );
    }
    let x = packed(x, x.dtype())?;
    let (cos, sin) = (packed(cos, DType::F32)?, packed(sin, DType::F32)?);
    for_dtype!(x.dtype(), rotate_as(&x, step, head_dim, &cos, &sin))
}

fn rotate_as<E: Element>(x: &Tensor, step: &StepLayout, head_dim: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let device = cuda(x.device())?;
    let (tokens, width) = x.dims2()?;
    let (x_held, cos_held, sin_held) = (Held::new(x), Held::new(cos), Held::new(sin));
    let position_t = super::attention::tables(step)?.position_t();
    // SAFETY: the kernel writes every element.
    let mut y = unsafe { device.alloc::<E>(x.elem_count())? };
    let kernel = Kernel::new::<E>("rotate", device)?;
    let mut args = kernel.args();
    let (width, half) = (width as u32, (head_dim / 2) as u32);
    args.arg(x_held.elements::<E>()?).arg(&mut y).arg(&position_t);
    args.arg(cos_held.elements::<f32>()?).arg(sin_held.elements::<f32>()?).arg(&width).arg(&half);
    // SAFETY: rotate(x, y, positions, cos, sin, unsigned, unsigned); x and y hold a row and `position_t` a position
    // for every block, and the tables reach to all positions of the step.
    unsafe { launch(&mut args, (tokens, 1, 1), 128)? };
    Ok(tensor(y, x.shape(), device))
}
