//! Arithmetic element by element, on the one pool that computes everything else: candle's operations have a pool of their
//! own, whose threads wait actively and would take the cores from ours.

use super::rows::FLOPS_PER_COPY;
use super::{SharedOut, for_each, host_f32, with_f32};
use candle_core::{Device, Result, Tensor};

/// Elements of a work item.
const CHUNK: usize = 1 << 15;

/// `x + y`, of one shape.
pub(crate) fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.shape() != y.shape() {
        candle_core::bail!("{:?} cannot be added to {:?}", y.shape(), x.shape());
    }
    let mut sum = host_f32(x)?;
    with_f32(y, |y| in_chunks(&mut sum, |start, part| part.iter_mut().zip(&y[start..]).for_each(|(s, y)| *s += y)))?;
    Tensor::from_vec(sum, x.shape(), &Device::Cpu)
}

/// `x`, cut to `low..=high`.
pub(crate) fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    let mut cut = host_f32(x)?;
    in_chunks(&mut cut, |_, part| part.iter_mut().for_each(|x| *x = x.clamp(low, high)));
    Tensor::from_vec(cut, x.shape(), &Device::Cpu)
}

/// Adds `bias` to every row of `y`.
pub(super) fn add_bias(y: &mut [f32], bias: &[f32]) {
    in_chunks(y, |start, part| {
        part.iter_mut().zip(bias.iter().cycle().skip(start % bias.len())).for_each(|(y, b)| *y += b);
    });
}

/// Calls `body` for chunks of `values`, with the place where each begins.
fn in_chunks(values: &mut [f32], body: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let len = values.len();
    let out = SharedOut::new(values);
    for_each(len.div_ceil(CHUNK), len * FLOPS_PER_COPY, |item| {
        let start = item * CHUNK;
        // SAFETY: items have disjoint chunks.
        body(start, unsafe { std::slice::from_raw_parts_mut(out.from(start), CHUNK.min(len - start)) });
    });
}
