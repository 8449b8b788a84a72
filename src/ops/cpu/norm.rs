//! Norms and rotary embedding.

use super::elementwise::changed;
use super::isa::multiversion;
use candle_core::{Result, Tensor};

/// `x [T, n·W]`, every W elements by their root mean square, times `weight [W]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor> {
    changed(x, weight.len(), |_, rows| rms_norm_rows(rows, weight, eps))
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

multiversion!(fn rms_norm_rows(x: &mut [f32], weight: &[f32], eps: f32) = rms_norm_body);

#[inline(always)]
fn rms_norm_body(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let scale = 1.0 / (mean_of(row, |v| v * v) + eps).sqrt();
        row.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
    }
}

multiversion!(fn layer_norm_rows(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) = layer_norm_body);

#[inline(always)]
fn layer_norm_body(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let mean = mean_of(row, |v| v);
        // The variance from what is left of the mean, not from sums of squares, which cancel.
        row.iter_mut().for_each(|v| *v -= mean);
        let scale = 1.0 / (mean_of(row, |v| v * v) + eps).sqrt();
        row.iter_mut().zip(weight.iter().zip(bias)).for_each(|(v, (w, b))| *v = *v * scale * w + b);
    }
}

/// The mean of `f` over a row, summed in 16 lanes: an order that depends on nothing but the row's width.
#[inline(always)]
fn mean_of(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let chunks = row.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane += f(*v));
    }
    (lanes.iter().sum::<f32>() + rest) / row.len() as f32
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
