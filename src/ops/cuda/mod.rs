//! The CUDA backend: weights and activations are candle tensors in the backend's dtype, dense products are cuBLAS's,
//! grouped ones candle's `moe_gemm`, and the rest are our own kernels (`kernels/ops.cu`), which accumulate in f32.
//!
//! Experts in 16 bits, attention, norms, rotary embedding and the weighted sums compute a token the same way whatever
//! else is in the step. [`Dense`], [`Nets::feed_forward`], experts in f32 and those that are no plain SwiGLUs do not
//! promise it: cuBLAS picks its kernel, and with it the order of sums, by the number of rows.

mod attention;
mod dense;
mod experts;
mod launch;
mod nets;
mod norm;

pub(super) use attention::{KvStore, StepTables};
pub(super) use dense::Dense;
pub(super) use nets::{Nets, NetsBuilder};
pub(super) use norm::{layer_norm, rms_norm, rotate};

use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;

/// Bytes the current device has free.
pub(super) fn free_memory() -> Option<u64> {
    mem_get_info().ok().map(|(free, _)| free as u64)
}

#[cfg(test)]
mod tests;
