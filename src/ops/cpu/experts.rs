//! SwiGLU feed-forward nets over packed weights: gate and up fused with the activation, then down, then the
//! weighted sum per token.

use super::kernel::{Rows, matmul, multiply};
use super::pack::{NR, PackedMatrix};
use super::{SharedOut, for_each, isa::multiversion, with_f32};
use crate::moe::Routing;
use crate::ops::HostTensor;
use candle_core::{DType, Device, Result, Tensor};

/// One expert's weights.
#[derive(Debug)]
pub(crate) struct PackedSwiglu {
    /// Gate and up, panels taking turns, so that one work item has both halves of its columns.
    gate_up: PackedMatrix,
    down: PackedMatrix,
    width: usize,
}

impl PackedSwiglu {
    /// `gate` and `up` are `[F, D]`, `down` is `[D, F]`.
    pub(crate) fn pack(gate: &HostTensor, up: &HostTensor, down: &HostTensor, dtype: DType) -> Self {
        let width = gate.dims2().0;
        Self { gate_up: PackedMatrix::interleave(&[gate, up], dtype), down: PackedMatrix::pack(down, dtype), width }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }

    /// Panels of h, the F columns between the projections.
    fn hidden_panels(&self) -> usize {
        self.width.div_ceil(NR)
    }

    /// Columns `panel` of `h = silu(gate(x)) ⊙ up(x)` for all rows of `x`, to `h`, whose rows are F apart.
    ///
    /// # Safety
    /// `h` must be valid for `x.len()` rows, and no one else may write these columns.
    unsafe fn hidden(&self, x: Rows<'_>, panel: usize, h: *mut f32) {
        /// Rows at a time: both halves of a tile stay in the first-level cache.
        const ROWS: usize = 48;
        let mut tile = [0.0; ROWS * 2 * NR];
        let columns = NR.min(self.width - panel * NR);
        for first in (0..x.len()).step_by(ROWS) {
            let rows = first..x.len().min(first + ROWS);
            let count = rows.len();
            // SAFETY: the tile holds `count` rows of two panels; `h` is the caller's word.
            unsafe {
                multiply(x, rows, &self.gate_up, 2 * panel..2 * panel + 2, tile.as_mut_ptr(), 2 * NR);
                for row in 0..count {
                    let out = std::slice::from_raw_parts_mut(h.add((first + row) * self.width + panel * NR), columns);
                    swiglu_columns(&tile[row * 2 * NR..(row + 1) * 2 * NR], out);
                }
            }
        }
    }
}

multiversion!(fn swiglu_columns(gate_up: &[f32], out: &mut [f32]) = swiglu_columns_body);

#[inline(always)]
fn swiglu_columns_body(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(NR);
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + (-g).exp()) * u;
    }
}

/// A dense SwiGLU: `x [T, D] → [T, D]`.
pub(crate) fn swiglu(x: &Tensor, net: &PackedSwiglu) -> Result<Tensor> {
    let (tokens, d) = x.dims2()?;
    let mut y = vec![0.0; tokens * d];
    with_f32(x, |x| {
        let x = Rows::new(x, d);
        let mut h = vec![0.0; tokens * net.width];
        let out = SharedOut::new(&mut h);
        for_each(net.hidden_panels(), 4 * tokens * d * net.width, |panel| {
            // SAFETY: items write disjoint columns.
            unsafe { net.hidden(x, panel, out.from(0)) };
        });
        matmul(Rows::new(&h, net.width), &net.down, &mut y);
    })?;
    Tensor::from_vec(y, (tokens, d), &Device::Cpu)
}

/// The rows of expert `e` in `x`, which holds all routed rows, `width` wide.
fn expert_rows<'a>(x: &'a [f32], routing: &Routing, e: usize, width: usize) -> Rows<'a> {
    let rows = routing.expert_rows(e);
    Rows::new(&x[rows.start * width..rows.end * width], width)
}

/// Every token's weighted sum over its experts: `x [T, D] → [T, D]`.
pub(crate) fn grouped_swiglu(x: &Tensor, experts: &[PackedSwiglu], routing: &Routing) -> Result<Tensor> {
    let (tokens, d) = x.dims2()?;
    if (tokens, experts.len()) != (routing.tokens(), routing.experts()) {
        candle_core::bail!(
            "a routing of {} tokens over {} experts was given {tokens} tokens and {} experts",
            routing.tokens(),
            routing.experts(),
            experts.len()
        );
    }
    let width = experts[0].width;
    let rows = routing.rows();
    let active: Vec<usize> = (0..experts.len()).filter(|&e| !routing.expert_rows(e).is_empty()).collect();

    // h [R, F]: rows sorted by expert, so every expert's rows are one block.
    let mut h = vec![0.0; rows * width];
    let gathered: Vec<f32> = with_f32(x, |x| {
        let row = |t: &u32| &x[*t as usize * d..(*t as usize + 1) * d];
        routing.token_r().iter().flat_map(row).copied().collect()
    })?;
    let panels = experts[0].hidden_panels();
    let out = SharedOut::new(&mut h);
    for_each(active.len() * panels, 4 * rows * d * width, |item| {
        let (i, panel) = (item / panels, item % panels);
        let e = active[i];
        // SAFETY: items write disjoint columns of disjoint row blocks.
        unsafe {
            experts[e].hidden(
                expert_rows(&gathered, routing, e, d),
                panel,
                out.from(routing.expert_rows(e).start * width),
            )
        };
    });
    drop(gathered);

    // y [R, D]: what each expert says about each of its tokens.
    let mut y = vec![0.0; rows * d];
    let out = SharedOut::new(&mut y);
    let panels = d.div_ceil(NR);
    for_each(active.len() * panels, 2 * rows * d * width, |item| {
        let (i, panel) = (item / panels, item % panels);
        let e = active[i];
        let h = expert_rows(&h, routing, e, width);
        let first = routing.expert_rows(e).start * d + panel * NR;
        // SAFETY: items write disjoint columns of disjoint row blocks.
        unsafe { multiply(h, 0..h.len(), &experts[e].down, panel..panel + 1, out.from(first), d) };
    });

    let mut sums = vec![0.0; tokens * d];
    for (t, sum) in sums.chunks_exact_mut(d).enumerate() {
        for &row in routing.token_rows(t) {
            let row = row as usize;
            let weight = routing.weight_r()[row];
            sum.iter_mut().zip(&y[row * d..(row + 1) * d]).for_each(|(s, y)| *s += weight * y);
        }
    }
    Tensor::from_vec(sums, (tokens, d), &Device::Cpu)
}
