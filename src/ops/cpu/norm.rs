//! Norms and rotary embedding.

use super::SharedOut;
use super::elementwise::changed;
use super::isa::multiversion;
use super::math;
use candle_core::{Result, Tensor};

/// `x [T, n·W]`, every W elements by their root mean square, times `weight [W]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor> {
    changed(x, weight.len(), |_, rows| rms_norm_rows(rows, weight, eps))
}

/// [`rms_norm`] of `x [T, W]`, and what it multiplies every row with before `weight`, `[T]`.
pub(crate) fn rms_norm_telling(x: &Tensor, weight: &[f32], eps: f32) -> Result<(Tensor, Vec<f32>)> {
    let mut scale_t = vec![0.0; x.elem_count() / weight.len().max(1)];
    let out = SharedOut::new(&mut scale_t);
    let y = changed(x, weight.len(), |first, rows| {
        // SAFETY: items have disjoint rows, of which each has a scale.
        let scales = unsafe { std::slice::from_raw_parts_mut(out.from(first), rows.len() / weight.len()) };
        rms_norm_rows_telling(rows, weight, eps, scales);
    })?;
    Ok((y, scale_t))
}

/// `x [T, n·W]`, every W elements less their mean and by their standard deviation, times `weight [W]` plus `bias [W]`.
pub(crate) fn layer_norm(x: &Tensor, weight: &[f32], bias: &[f32], eps: f32) -> Result<Tensor> {
    changed(x, weight.len(), |_, rows| layer_norm_rows(rows, weight, bias, eps))
}

/// Rotates every head of `x [T, heads·hd]` by its token's position; tables are `[positions, hd/2]`.
pub(crate) fn rotate(x: &Tensor, position_t: &[u32], head_dim: usize, tables: (&[f32], &[f32])) -> Result<Tensor> {
    let (_, width) = x.dims2()?;
    changed(x, width, |first, rows| rotate_rows(rows, &position_t[first..], (width, head_dim), tables))
}

/// See [`crate::ops::root_mean_square`].
pub(crate) fn root_mean_square(x: &[f32]) -> f32 {
    let mut mean = 0.0;
    mean_square_of(x, &mut mean);
    mean.sqrt()
}

multiversion!(fn mean_square_of(x: &[f32], mean: &mut f32) = mean_square_of_body);

#[inline(always)]
fn mean_square_of_body(x: &[f32], mean: &mut f32) {
    *mean = mean_square(x);
}

/// Mean of x², summed in an order that depends on nothing but the number of elements.
#[inline(always)]
fn mean_square(x: &[f32]) -> f32 {
    math::dot(x, x) / x.len() as f32
}

/// What an RMS norm multiplies a row with.
#[inline(always)]
pub(super) fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (mean_square(x) + eps).sqrt()
}

multiversion!(fn rms_norm_rows(x: &mut [f32], weight: &[f32], eps: f32) = rms_norm_body);

#[inline(always)]
fn rms_norm_body(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        rms_norm_row(row, weight, eps);
    }
}

multiversion!(fn rms_norm_rows_telling(
    x: &mut [f32],
    weight: &[f32],
    eps: f32,
    scales: &mut [f32],
) = rms_norm_telling_body);

#[inline(always)]
fn rms_norm_telling_body(x: &mut [f32], weight: &[f32], eps: f32, scales: &mut [f32]) {
    for (row, scale) in x.chunks_exact_mut(weight.len()).zip(scales) {
        *scale = rms_norm_row(row, weight, eps);
    }
}

/// Returns what it multiplies with before `weight`.
#[inline(always)]
fn rms_norm_row(row: &mut [f32], weight: &[f32], eps: f32) -> f32 {
    let scale = rms_scale(row, eps);
    row.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
    scale
}

multiversion!(fn layer_norm_rows(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) = layer_norm_body);

#[inline(always)]
fn layer_norm_body(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let mean = math::sum_by(row, row, |v, _| v) / row.len() as f32;
        // The variance from what is left of the mean, not from sums of squares, which cancel.
        row.iter_mut().for_each(|v| *v -= mean);
        let scale = rms_scale(row, eps);
        row.iter_mut().zip(weight.iter().zip(bias)).for_each(|(v, (w, b))| *v = *v * scale * w + b);
    }
}

multiversion!(fn rotate_rows(
    x: &mut [f32],
    position_t: &[u32],
    widths: (usize, usize),
    tables: (&[f32], &[f32]),
) = rotate_rows_body);

/// `widths` are a row's and a head's.
#[inline(always)]
fn rotate_rows_body(
    x: &mut [f32],
    position_t: &[u32],
    (width, head_dim): (usize, usize),
    (cos, sin): (&[f32], &[f32]),
) {
    let half = head_dim / 2;
    for (row, &position) in x.chunks_exact_mut(width.max(1)).zip(position_t) {
        let at = position as usize * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head.split_at_mut(half);
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}
