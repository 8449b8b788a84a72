//! Feed-forward nets over packed weights: gate and up fused with the activation, then down, then the weighted sum per
//! token.

use super::kernel::{Rows, matmul, multiply};
use super::pack::{NR, PackedMatrix};
use super::{SharedOut, for_each, isa::multiversion, with_f32};
use crate::moe::Routing;
use crate::ops::{HostFfn, HostTensor};
use crate::types::Activation;
use candle_core::{DType, Device, Result, Tensor};

/// One expert's weights.
#[derive(Debug)]
pub(crate) struct PackedFfn {
    /// What makes h: gate and up, panels taking turns, so that one work item has both halves of its columns; or up
    /// alone.
    inner: PackedMatrix,
    /// Of `inner`, in the order of its columns, padded to whole panels.
    inner_bias: Option<Vec<f32>>,
    down: PackedMatrix,
    /// `[D]`
    down_bias: Option<Vec<f32>>,
    activation: Activation,
    width: usize,
}

impl PackedFfn {
    /// `net` must have a gate iff the activation has one.
    pub(crate) fn pack(net: &HostFfn, activation: Activation, dtype: DType) -> Self {
        let inner: Vec<_> = net.gate.iter().chain([&net.up]).collect();
        let width = net.up.weight.dims2().0;
        let weights: Vec<&HostTensor> = inner.iter().map(|linear| &linear.weight).collect();
        let inner_bias = inner.iter().any(|linear| linear.bias.is_some()).then(|| {
            let mut columns = vec![0.0; width.div_ceil(NR) * inner.len() * NR];
            for (turn, bias) in inner.iter().enumerate().filter_map(|(i, linear)| Some((i, linear.bias.as_ref()?))) {
                let panels = columns.chunks_exact_mut(NR).skip(turn).step_by(inner.len());
                panels.zip(bias.to_f32().chunks(NR)).for_each(|(panel, b)| panel[..b.len()].copy_from_slice(b));
            }
            columns
        });
        Self {
            inner: PackedMatrix::interleave(&weights, dtype),
            inner_bias,
            down: PackedMatrix::pack(&net.down.weight, dtype),
            down_bias: net.down.bias.as_ref().map(HostTensor::to_f32),
            activation,
            width,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let biases = self.inner_bias.iter().chain(&self.down_bias).map(|bias| size_of_val(&bias[..]));
        self.inner.bytes() + self.down.bytes() + biases.sum::<usize>()
    }

    /// Panels of h, the F columns between the projections.
    fn hidden_panels(&self) -> usize {
        self.width.div_ceil(NR)
    }

    /// FLOPs of h for `rows` rows of `d` inputs.
    fn hidden_flops(&self, rows: usize, d: usize) -> usize {
        2 * (1 + usize::from(self.activation.gated())) * rows * d * self.width
    }

    /// Columns `panel` of h for all rows of `x`, to `h`, whose rows are F apart.
    ///
    /// # Safety
    /// `h` must be valid for `x.len()` rows, and no one else may write these columns.
    unsafe fn hidden(&self, x: Rows<'_>, panel: usize, h: *mut f32) {
        /// Rows at a time: both halves of a tile stay in the first-level cache.
        const ROWS: usize = 48;
        let mut tile = [0.0; ROWS * 2 * NR];
        let columns = NR.min(self.width - panel * NR);
        let parts = 1 + usize::from(self.activation.gated());
        let stride = parts * NR;
        for first in (0..x.len()).step_by(ROWS) {
            let rows = first..x.len().min(first + ROWS);
            let count = rows.len();
            // SAFETY: the tile holds `count` rows of `parts` panels; `h` is the caller's word.
            unsafe {
                multiply(x, rows, &self.inner, parts * panel..parts * (panel + 1), tile.as_mut_ptr(), stride);
                for (row, tile) in tile.chunks_exact_mut(stride).take(count).enumerate() {
                    if let Some(bias) = &self.inner_bias {
                        add(tile, &bias[panel * stride..]);
                    }
                    let out = std::slice::from_raw_parts_mut(h.add((first + row) * self.width + panel * NR), columns);
                    match self.activation {
                        Activation::Swiglu => swiglu_columns(tile, out),
                        Activation::Gelu => gelu_columns(tile, out),
                        Activation::Relu => relu_columns(tile, out),
                        Activation::Silu => silu_columns(tile, out),
                    }
                }
            }
        }
    }

    /// Columns `panel` of `down(h)` for all rows of `h`, to `y`, where these columns begin and whose rows are D apart.
    ///
    /// # Safety
    /// `y` must be valid for `h.len()` rows, and no one else may write these columns.
    unsafe fn output(&self, h: Rows<'_>, panel: usize, y: *mut f32) {
        let d = self.down.outputs();
        // SAFETY: the caller's word.
        unsafe { multiply(h, 0..h.len(), &self.down, panel..panel + 1, y, d) };
        if let Some(bias) = &self.down_bias {
            let bias = &bias[panel * NR..d.min((panel + 1) * NR)];
            for row in 0..h.len() {
                // SAFETY: these columns of the row, just written.
                add(unsafe { std::slice::from_raw_parts_mut(y.add(row * d), bias.len()) }, bias);
            }
        }
    }
}

/// Adds element by element, as far as `x` goes.
fn add(x: &mut [f32], bias: &[f32]) {
    x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
}

multiversion!(fn swiglu_columns(gate_up: &[f32], out: &mut [f32]) = swiglu_columns_body);
multiversion!(fn gelu_columns(up: &[f32], out: &mut [f32]) = gelu_columns_body);
multiversion!(fn relu_columns(up: &[f32], out: &mut [f32]) = relu_columns_body);
multiversion!(fn silu_columns(up: &[f32], out: &mut [f32]) = silu_columns_body);

#[inline(always)]
fn swiglu_columns_body(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(NR);
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + (-g).exp()) * u;
    }
}

#[inline(always)]
fn gelu_columns_body(up: &[f32], out: &mut [f32]) {
    /// 2·√(2/π): x/2·(1 + tanh z) is x / (1 + exp(−2z)).
    const SCALE: f32 = 1.595_769;
    for (o, x) in out.iter_mut().zip(up) {
        *o = x / (1.0 + (-SCALE * (x + 0.044_715 * x * x * x)).exp());
    }
}

#[inline(always)]
fn relu_columns_body(up: &[f32], out: &mut [f32]) {
    // Not `max`, which would make 0 of NaN.
    out.iter_mut().zip(up).for_each(|(o, x)| *o = if *x < 0.0 { 0.0 } else { *x });
}

#[inline(always)]
fn silu_columns_body(up: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(up).for_each(|(o, x)| *o = x / (1.0 + (-x).exp()));
}

/// One net for every token: `x [T, D] → [T, D]`.
pub(crate) fn feed_forward(x: &Tensor, net: &PackedFfn) -> Result<Tensor> {
    let (tokens, d) = x.dims2()?;
    let mut y = vec![0.0; tokens * d];
    with_f32(x, |x| {
        let x = Rows::new(x, d);
        let mut h = vec![0.0; tokens * net.width];
        let out = SharedOut::new(&mut h);
        for_each(net.hidden_panels(), net.hidden_flops(tokens, d), |panel| {
            // SAFETY: items write disjoint columns.
            unsafe { net.hidden(x, panel, out.from(0)) };
        });
        matmul(Rows::new(&h, net.width), &net.down, &mut y);
    })?;
    if let Some(bias) = &net.down_bias {
        y.chunks_exact_mut(d).for_each(|row| add(row, bias));
    }
    Tensor::from_vec(y, (tokens, d), &Device::Cpu)
}

/// The rows of expert `e` in `x`, which holds all routed rows, `width` wide.
fn expert_rows<'a>(x: &'a [f32], routing: &Routing, e: usize, width: usize) -> Rows<'a> {
    let rows = routing.expert_rows(e);
    Rows::new(&x[rows.start * width..rows.end * width], width)
}

/// Every token's weighted sum over its experts: `x [T, D] → [T, D]`.
pub(crate) fn grouped_experts(x: &Tensor, experts: &[PackedFfn], routing: &Routing) -> Result<Tensor> {
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
    for_each(active.len() * panels, experts[0].hidden_flops(rows, d), |item| {
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
        let first = routing.expert_rows(e).start * d + panel * NR;
        // SAFETY: items write disjoint columns of disjoint row blocks.
        unsafe { experts[e].output(expert_rows(&h, routing, e, width), panel, out.from(first)) };
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
