//! THE CPU/CUDA seam. Model code holds these objects and tensors; weight layouts and kernels stay in here.
//!
//! `reference` is plain and obviously right, and what the fast paths are tested against. `cpu` packs weights
//! at load into its kernels' layout and keeps activations in f32; `cuda` keeps candle tensors in the chosen
//! dtype. On the CPU a token's result does not depend on the other tokens of the step, to the bit; on CUDA that
//! holds but for cuBLAS products, whose order of sums may follow the number of rows.
//!
//! `grad` holds what training adds: operations that gradients flow through.
//!
//! Legend: T tokens in the step, I/O a projection's widths, D model width, F expert width, R routed rows.

mod backend;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod experts;
pub mod grad;
mod host;
mod kv;
mod linear;
mod norm;
pub mod profile;
mod read_out;
pub mod reference;
mod rotary;
#[cfg(test)]
mod testing;
mod threads;

pub use backend::{Backend, BackendError};
pub use cpu::{Machine, PackCache};
pub use experts::{Experts, ExpertsBuilder, FeedForward, HostFfn, HostLinear};
pub use host::HostTensor;
pub use kv::{KvCache, KvShape, Segment, StepLayout, attention};
pub use linear::{Embedding, Linear};
pub use norm::Norm;
pub use read_out::ReadOut;
pub use rotary::Rotary;
pub use threads::{ThreadsError, on_pool, use_threads};

use candle_core::{DType, Result, Tensor};

/// Copies a tensor to the host as f32, row-major. On CUDA this waits for the device.
pub fn to_host(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Lends the elements of a tensor on the host as f32, row-major. On CUDA this waits for the device.
pub fn on_host<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    if x.device().is_cpu() && x.dtype() == DType::F32 && x.is_contiguous() {
        cpu::with_f32(x, f)
    } else {
        Ok(f(&to_host(x)?))
    }
}

/// `x + y`, of one shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { cpu::add(x, y) } else { x + y }
}

/// `x`, cut to `±limit`.
pub fn clip(x: &Tensor, limit: f64) -> Result<Tensor> {
    if x.device().is_cpu() { cpu::clamp(x, -limit as f32, limit as f32) } else { x.clamp(-limit, limit) }
}

/// √(Σ xᵢ² / n) of n numbers.
pub fn root_mean_square(x: &[f32]) -> f32 {
    cpu::root_mean_square(x)
}

/// Puts `e^((x − max)·by)` in the place of every `x`, of which none may be larger than `max`, and a `by` from 0 on:
/// relative error below 10⁻⁵, 0 where the result would be no normal number.
pub fn exponentiate(x: &mut [f32], max: f32, by: f32) {
    cpu::exponentiate(x, max, by);
}

/// H(softmax(z)) in nats; NaN where a number is.
pub fn softmax_entropy(z: &[f32]) -> f32 {
    cpu::softmax_entropy(z)
}

/// Rows `rows` of `x`, `[T, D] → [rows, D]`.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let rows = Tensor::new(rows, x.device())?;
    x.index_select(&rows, 0)
}

/// `x · sigmoid(gate)` row by row: `x [T, D]`, `gate [T, 1]`.
pub fn sigmoid_gated(x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&candle_nn::ops::sigmoid(&gate.to_dtype(x.dtype())?)?)
}
