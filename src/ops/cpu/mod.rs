//! CPU kernels: weights packed at load, activations f32, every output summed over its inputs in one fixed
//! order, so that neither the number of rows nor of threads changes a bit.

mod aligned;
mod attention;
mod attention_kernel;
mod cache;
mod elementwise;
mod experts;
pub(super) mod gemm;
mod isa;
mod kernel;
mod machine;
mod math;
mod norm;
mod pack;
mod quants;
mod rows;
pub(super) mod train;

pub(super) use attention::KvStore;
pub use cache::PackCache;
pub(super) use elementwise::{add, clamp};
pub(super) use experts::{PackedFfn, feed_forward, grouped_experts};
pub(super) use isa::describe;
pub use machine::Machine;
pub(super) use norm::{layer_norm, rms_norm, rotate};
pub(super) use pack::{PackedMatrix, Packing};

use candle_core::{CpuStorage, Device, Result, Storage, Tensor};
use rayon::prelude::*;
use rows::{Form, RowBuffer, Rows};

/// Lends the elements of a contiguous f32 CPU tensor.
pub(super) fn with_f32<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => candle_core::bail!("a contiguous f32 CPU tensor was expected, got {:?} {:?}", x.dtype(), layout),
    }
}

/// `x [T, I] → [T, O]`, with `bias [O]` added where there is one.
pub(super) fn linear(x: &Tensor, w: &PackedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, inputs) = x.dims2()?;
    if inputs != w.inputs() {
        candle_core::bail!("a projection of {} inputs was given {inputs}", w.inputs());
    }
    let mut y = with_f32(x, |x| match Form::of(w) {
        Form::F32 => kernel::matmul(Rows::of_f32(x, inputs), w),
        Form::Bf16 => kernel::matmul(RowBuffer::rounded(x, inputs).rows(), w),
    })?;
    if let Some(bias) = bias {
        with_f32(bias, |bias| elementwise::add_bias(&mut y, bias))?;
    }
    Tensor::from_vec(y, (tokens, w.outputs()), &Device::Cpu)
}

/// Rows `ids` of `w`, unpacked.
pub(super) fn embed(ids: &[u32], w: &PackedMatrix) -> Result<Tensor> {
    let width = w.inputs();
    let mut y = vec![0.0; ids.len() * width];
    let out = SharedOut::new(&mut y);
    for_each(ids.len(), ids.len() * width * rows::FLOPS_PER_COPY, |item| {
        // SAFETY: items write disjoint rows.
        let row = unsafe { std::slice::from_raw_parts_mut(out.from(item * width), width) };
        w.unpack_row(ids[item] as usize, row);
    });
    Tensor::from_vec(y, (ids.len(), width), &Device::Cpu)
}

/// See [`crate::ops::softmax_entropy`].
pub(super) fn softmax_entropy(z: &[f32]) -> f32 {
    let mut entropy = 0.0;
    entropy_of(z, &mut entropy);
    entropy
}

isa::multiversion!(fn entropy_of(z: &[f32], entropy: &mut f32) = entropy_of_body);

#[inline(always)]
fn entropy_of_body(z: &[f32], entropy: &mut f32) {
    let max = math::max(z);
    // With w = e^(z − max) and s = Σw: H = log s − Σ w·(z − max) / s.
    let [sum, weighted] = math::sums_by(z, |z| {
        let e = math::exp(z - max);
        [e, e * (z - max)]
    });
    *entropy = sum.ln() - weighted / sum;
}

/// Below this many FLOPs a parallel region costs more than it saves.
const PARALLEL_FLOPS_MIN: usize = 1 << 20;

/// Runs `f` for every item of `0..items`, on all threads when `flops` in all are worth it.
fn for_each(items: usize, flops: usize, f: impl Fn(usize) + Sync + Send) {
    if items > 1 && flops >= PARALLEL_FLOPS_MIN {
        (0..items).into_par_iter().with_max_len(1).for_each(f);
    } else {
        (0..items).for_each(f);
    }
}

/// A mutable buffer that work items write disjoint parts of.
#[derive(Clone, Copy)]
struct SharedOut<E = f32> {
    start: *mut E,
    len: usize,
}

// SAFETY: work items write disjoint ranges only; see the calls of `from`.
unsafe impl<E: Send> Send for SharedOut<E> {}
// SAFETY: as above.
unsafe impl<E: Send> Sync for SharedOut<E> {}

impl<E> SharedOut<E> {
    fn new(out: &mut [E]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len() }
    }

    /// The whole capacity, which holds nothing yet.
    fn unwritten(out: &mut Vec<E>) -> Self {
        Self { start: out.as_mut_ptr(), len: out.capacity() }
    }

    /// The elements from `at` on.
    ///
    /// # Safety
    /// No two work items may write the same element, and none may outlive the buffer.
    unsafe fn from(self, at: usize) -> *mut E {
        debug_assert!(at <= self.len);
        // SAFETY: `at` is within the buffer or one past it.
        unsafe { self.start.add(at) }
    }
}

#[cfg(test)]
mod tests;
