//! Arithmetic element by element and row by row, on the one pool that computes everything else: candle's operations have a
//! pool of their own, whose threads wait actively and would take the cores from ours.

use super::isa::multiversion;
use super::math;
use super::rows::FLOPS_PER_COPY;
use super::{SharedOut, for_each, with_f32};
use candle_core::{Device, Result, Tensor};

/// Elements of a work item: what it copies is still in the first cache when it is changed.
const CHUNK: usize = 1 << 13;

/// `x + y`, of one shape.
pub(crate) fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.shape() != y.shape() {
        candle_core::bail!("{:?} cannot be added to {:?}", y.shape(), x.shape());
    }
    with_f32(y, |y| changed(x, 1, |start, part| add_to(part, &y[start..start + part.len()])))?
}

// Adds element by element, as far as both go.
multiversion!(pub(super) fn add_to(x: &mut [f32], y: &[f32]) = add_to_body);

#[inline(always)]
fn add_to_body(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `x`, cut to `low..=high`.
pub(crate) fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    changed(x, 1, |_, part| part.iter_mut().for_each(|x| *x = x.clamp(low, high)))
}

// See [`crate::ops::exponentiate`].
multiversion!(pub(crate) fn exponentiate(x: &mut [f32], max: f32, by: f32) = exponentiate_body);

#[inline(always)]
fn exponentiate_body(x: &mut [f32], max: f32, by: f32) {
    x.iter_mut().for_each(|x| *x = math::exp((*x - max) * by));
}

/// Adds `bias` to every row of `y`.
pub(super) fn add_bias(y: &mut [f32], bias: &[f32]) {
    let (len, out) = (y.len(), SharedOut::new(y));
    in_chunks(len, bias.len(), |row, start, chunk| {
        debug_assert_eq!(row * bias.len(), start);
        // SAFETY: items have disjoint chunks.
        let part = unsafe { std::slice::from_raw_parts_mut(out.from(start), chunk) };
        part.chunks_exact_mut(bias.len()).for_each(|y| add_to(y, bias));
    });
}

/// What `body` makes of `x` in place, some whole rows of `row` elements at a time; it is told which row is their first.
pub(super) fn changed(x: &Tensor, row: usize, body: impl Fn(usize, &mut [f32]) + Sync + Send) -> Result<Tensor> {
    let y = with_f32(x, |x| {
        // SAFETY: items copy all of `x`, chunk by chunk.
        unsafe {
            written(x.len(), |out| {
                in_chunks(x.len(), row, |first, start, chunk| {
                    // Items write disjoint chunks.
                    let to = out.from(start);
                    std::ptr::copy_nonoverlapping(x[start..start + chunk].as_ptr(), to, chunk);
                    body(first, std::slice::from_raw_parts_mut(to, chunk));
                });
            })
        }
    })?;
    Tensor::from_vec(y, x.shape(), &Device::Cpu)
}

/// `len` elements that `write` puts there, without zeros before.
///
/// # Safety
/// It must write all of them.
pub(super) unsafe fn written(len: usize, write: impl FnOnce(SharedOut)) -> Vec<f32> {
    let mut y = Vec::with_capacity(len);
    write(SharedOut::unwritten(&mut y));
    // SAFETY: the capacity is there, and the caller's word that elements are written.
    unsafe { y.set_len(len) };
    y
}

/// Calls `body` for chunks of `len` elements, whole rows of `row` each: with a chunk's first row, first element and length.
fn in_chunks(len: usize, row: usize, body: impl Fn(usize, usize, usize) + Sync + Send) {
    let row = row.max(1);
    assert!(len.is_multiple_of(row), "{len} elements are no rows of {row}");
    let rows = (CHUNK / row).max(1);
    for_each(len.div_ceil(rows * row), len * FLOPS_PER_COPY, |item| {
        let start = item * rows * row;
        body(item * rows, start, (rows * row).min(len - start));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_scaled_differences() {
        let x: Vec<f32> = (0..100).map(|i| i as f32 * 0.3 - 20.0).chain([f32::NEG_INFINITY]).collect();
        for by in [0.0f32, 0.5, 1.0, 30.0] {
            let mut y = x.clone();
            exponentiate(&mut y, 9.7, by);
            for (y, x) in y.into_iter().zip(&x[..100]) {
                let exponent = f64::from(x - 9.7) * f64::from(by);
                let want = if exponent < -87.0 { 0.0 } else { exponent.exp() };
                assert!((f64::from(y) - want).abs() <= 1e-5 * want + 1e-37, "{x} by {by}: {y}, not {want}");
            }
        }
        let mut y = x.clone();
        exponentiate(&mut y, 9.7, f32::MAX);
        assert_eq!(y[100], 0.0);
    }
}
