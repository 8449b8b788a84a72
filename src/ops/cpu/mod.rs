//! CPU kernels: weights packed at load, activations f32, every output summed over its inputs in one fixed
//! order, so that neither the number of rows nor of threads changes a bit.

mod aligned;
mod attention;
mod attention_kernel;
mod cache;
mod elementwise;
mod entropy;
mod experts;
pub(super) mod gemm;
mod isa;
mod kernel;
mod machine;
mod math;
mod norm;
mod pack;
mod quants;
mod read_out;
mod rows;
pub(super) mod train;

pub(super) use attention::KvStore;
pub use cache::PackCache;
pub(super) use elementwise::{add, clamp, exponentiate};
pub(super) use entropy::softmax_entropy;
pub(super) use experts::{PackedFfn, feed_forward, grouped_experts};
pub(super) use isa::describe;
pub use machine::Machine;
pub(super) use norm::{layer_norm, rms_norm, rms_norm_telling, root_mean_square, rotate};
pub(super) use pack::{PackedMatrix, Packing};
pub(super) use read_out::read_out_entropies;

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

/// `x [T, I] → [T, O]` for each of several matrices, with `bias [O]` added where there is one.
pub(super) fn linears<const N: usize>(x: &Tensor, of: [(&PackedMatrix, Option<&Tensor>); N]) -> Result<[Tensor; N]> {
    let (tokens, inputs) = x.dims2()?;
    let w = of.map(|(w, _)| w);
    if let Some(w) = w.iter().find(|w| w.inputs() != inputs) {
        candle_core::bail!("a projection of {} inputs was given {inputs}", w.inputs());
    }
    if w.windows(2).any(|pair| Form::of(pair[0]) != Form::of(pair[1])) {
        candle_core::bail!("projections of the same rows are packed in different ways");
    }
    let mut y = with_f32(x, |x| in_form_of(w[0], x, |x| kernel::matmuls(x, w)))?;
    for (y, (_, bias)) in y.iter_mut().zip(of) {
        if let Some(bias) = bias {
            with_f32(bias, |bias| elementwise::add_bias(y, bias))?;
        }
    }
    let y = y.into_iter().zip(w).map(|(y, w)| Tensor::from_vec(y, (tokens, w.outputs()), &Device::Cpu));
    Ok(y.collect::<Result<Vec<_>>>()?.try_into().expect("one of each matrix"))
}

/// Lends rows `x` in the form that products with `w` read.
fn in_form_of<R>(w: &PackedMatrix, x: &[f32], f: impl FnOnce(Rows<'_>) -> R) -> R {
    match Form::of(w) {
        Form::F32 => f(Rows::of_f32(x, w.inputs())),
        form => f(RowBuffer::rounded(form, x, w.inputs()).rows()),
    }
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

/// Below this many FLOPs a parallel region costs more than it saves.
const PARALLEL_FLOPS_MIN: usize = 1 << 18;

/// Work items for each thread, where there is enough to do.
const ITEMS_PER_THREAD: usize = 8;

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
