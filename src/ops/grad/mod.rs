//! Differentiable operations for training. On the CPU each is one node of candle's graph whose forward and backward
//! passes are the kernels of `cpu::train`; on other devices it is composed of candle's own differentiable operations,
//! which are also what the tests hold the kernels against.
//!
//! Tensors are f32; `precision` says what factors of matrix products are rounded to.
//!
//! Legend: T tokens, I/O a projection's widths, D model width, E experts, F expert width, R routed rows, V vocabulary.

mod attention;
mod experts;
mod linear;
mod loss;
mod norm;
mod optim;
mod pointwise;
#[cfg(test)]
mod tests;

pub use super::cpu::gemm::Precision;
pub use super::cpu::train::adamw::AdamW as AdamStep;
pub use super::cpu::train::loss::Score;
pub use attention::{AttentionShape, RopeTable, attention};
pub use experts::{combine, expert_linear, route_weights};
pub use linear::linear;
pub use loss::{cross_entropy, scores};
pub use norm::{layer_norm, rms_norm};
pub use optim::{Moments, adamw, sum_of_squares};
pub use pointwise::{activate, dropout, embed};

use super::cpu::with_f32;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Tensor};

/// Whether `device` multiplies bf16 faster than f32.
pub fn bf16_is_faster(device: &Device) -> bool {
    match device {
        Device::Cpu => super::cpu::gemm::has_amx(),
        _ => true,
    }
}

/// Has the allocator keep the memory that is given back to it, for programs that train: every step frees and takes the
/// same large buffers, and getting their pages anew from the system takes a third of a small model's step.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            safe fn mallopt(parameter: i32, value: i32) -> i32;
        }
        // M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h: no buffer is mapped by itself, none is given back.
        for parameter in [-3, -1] {
            mallopt(parameter, i32::MAX);
        }
    }
}

/// The elements of a contiguous f32 operand.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => candle_core::bail!("a contiguous f32 CPU tensor was expected, got {layout:?}"),
    }
}

/// What a forward pass on the CPU returns.
fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    let shape = shape.into();
    debug_assert_eq!(values.len(), shape.elem_count());
    Ok((CpuStorage::F32(values), shape))
}

/// A gradient of the CPU as a tensor.
fn gradient(values: Vec<f32>, like: &Tensor) -> Result<Option<Tensor>> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some)
}

/// Lends the elements of several tensors.
fn with2<R>(a: &Tensor, b: &Tensor, f: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R> {
    with_f32(a, |a| with_f32(b, |b| f(a, b)))?
}

fn with3<R>(a: &Tensor, b: &Tensor, c: &Tensor, f: impl FnOnce(&[f32], &[f32], &[f32]) -> R) -> Result<R> {
    with_f32(a, |a| with2(b, c, |b, c| f(a, b, c)))?
}

/// `x · wᵀ` of candle's own, with factors in `precision`: `x [N, I]`, `w [O, I]`.
fn composed_product(x: &Tensor, w: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::F32 => x.matmul(&w.t()?),
        Precision::Bf16 => x.to_dtype(DType::BF16)?.matmul(&w.to_dtype(DType::BF16)?.t()?)?.to_dtype(DType::F32),
    }
}
