//! Feed-forward nets over packed weights: gate and up fused with the activation, then down, then the weighted sum per
//! token.

use super::elementwise::{add_bias, add_to};
use super::isa::multiversion;
use super::kernel::{PANELS_PER_ITEM, counted_rows, matmuls, products, rows_max};
use super::math;
use super::pack::{NR, PackedMatrix, Packing};
use super::rows::{Form, Gather, RowBuffer, Rows};
use super::{ITEMS_PER_THREAD, SharedOut, for_each, in_form_of, with_f32};
use crate::moe::Routing;
use crate::ops::{HostFfn, HostTensor};
use crate::types::Activation;
use candle_core::{Device, Result, Tensor};
use std::ops::Range;

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
    pub(crate) fn pack(net: &HostFfn, activation: Activation, packing: &Packing) -> Self {
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
            inner: PackedMatrix::interleave(&weights, packing),
            inner_bias,
            down: PackedMatrix::pack(&net.down.weight, packing),
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

    /// Of these, the most that one work item takes.
    fn hidden_panels_max(&self) -> usize {
        PANELS_PER_ITEM / (1 + usize::from(self.activation.gated()))
    }

    /// FLOPs of h for `rows` rows of `d` inputs.
    fn hidden_flops(&self, rows: usize, d: usize) -> usize {
        2 * (1 + usize::from(self.activation.gated())) * rows * d * self.width
    }

    /// The columns of `panels` of h for all rows of `x`, to rows `first..` of `h`. `next` is whose columns will be asked for
    /// next, and from which panel on.
    ///
    /// # Safety
    /// No one else may write these columns of these rows.
    unsafe fn hidden(
        &self,
        x: Rows<'_>,
        panels: Range<usize>,
        (h, first): (&RowBuffer, usize),
        next: Option<(&Self, usize)>,
    ) {
        let parts = 1 + usize::from(self.activation.gated());
        let next = next.map(|(next, panel)| (&next.inner, parts * panel));
        products(x, &self.inner, parts * panels.start..parts * panels.end, next, |row, start, products| {
            if let Some(bias) = &self.inner_bias {
                add_to(products, &bias[start * NR..]);
            }
            for (panel, products) in (start / parts..).zip(products.chunks(parts * NR)) {
                let mut out = [0.0; NR];
                match self.activation {
                    Activation::Swiglu => swiglu_columns(products, &mut out),
                    Activation::Gelu => gelu_columns(products, &mut out),
                    Activation::Relu => relu_columns(products, &mut out),
                    Activation::Silu => silu_columns(products, &mut out),
                }
                let columns = NR.min(self.width - panel * NR);
                // SAFETY: the caller's word.
                unsafe { h.write(first + row, panel * NR, &out[..columns]) };
            }
        });
    }

    /// The columns of `panels` of `down(h)` for all rows of `h`: some of a row's, with its number and their first panel, to
    /// `each`. `next` is as for [`Self::hidden`].
    fn output(
        &self,
        h: Rows<'_>,
        panels: Range<usize>,
        next: Option<(&Self, usize)>,
        mut each: impl FnMut(usize, usize, &[f32]),
    ) {
        let next = next.map(|(next, panel)| (&next.down, panel));
        products(h, &self.down, panels, next, |row, start, products| {
            if let Some(bias) = &self.down_bias {
                add_to(products, &bias[start * NR..]);
            }
            each(row, start, products);
        });
    }
}

multiversion!(fn swiglu_columns(gate_up: &[f32], out: &mut [f32]) = swiglu_columns_body);
multiversion!(fn gelu_columns(up: &[f32], out: &mut [f32]) = gelu_columns_body);
multiversion!(fn relu_columns(up: &[f32], out: &mut [f32]) = relu_columns_body);
multiversion!(fn silu_columns(up: &[f32], out: &mut [f32]) = silu_columns_body);

#[inline(always)]
fn swiglu_columns_body(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(NR);
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g * math::sigmoid(*g) * u;
    }
}

#[inline(always)]
fn gelu_columns_body(up: &[f32], out: &mut [f32]) {
    /// 2·√(2/π): x/2·(1 + tanh z) is x · sigmoid(2z).
    const SCALE: f32 = 1.595_769;
    for (o, x) in out.iter_mut().zip(up) {
        *o = x * math::sigmoid(SCALE * (x + 0.044_715 * x * x * x));
    }
}

#[inline(always)]
fn relu_columns_body(up: &[f32], out: &mut [f32]) {
    // Not `max`, which would make 0 of NaN.
    out.iter_mut().zip(up).for_each(|(o, x)| *o = if *x < 0.0 { 0.0 } else { *x });
}

#[inline(always)]
fn silu_columns_body(up: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(up).for_each(|(o, x)| *o = x * math::sigmoid(*x));
}

multiversion!(fn add_scaled(sum: &mut [f32], scale: f32, x: &[f32]) = add_scaled_body);

#[inline(always)]
fn add_scaled_body(sum: &mut [f32], scale: f32, x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += scale * x);
}

/// One net for every token: `x [T, D] → [T, D]`.
pub(crate) fn feed_forward(x: &Tensor, net: &PackedFfn) -> Result<Tensor> {
    let (tokens, d) = x.dims2()?;
    let h = RowBuffer::new(Form::of(&net.down), tokens, net.width);
    with_f32(x, |x| {
        in_form_of(&net.inner, x, |x| {
            let rows = counted_rows(tokens, Form::of(&net.inner));
            let items = Items::of(net.hidden_panels(), net.hidden_panels_max(), 1, ITEMS_PER_THREAD);
            for_each(items.len(), net.hidden_flops(rows, d), |item| {
                // SAFETY: items write disjoint columns.
                unsafe { net.hidden(x, items.panels(item), (&h, 0), None) };
            });
        });
    })?;
    let [mut y] = matmuls(h.rows(), [&net.down]);
    if let Some(bias) = &net.down_bias {
        add_bias(&mut y, bias);
    }
    Tensor::from_vec(y, (tokens, d), &Device::Cpu)
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
    let (first, rows) = (&experts[0], routing.rows());
    let active: Vec<usize> = (0..experts.len()).filter(|&e| !routing.expert_rows(e).is_empty()).collect();
    // Some rows of an expert, as many as one multiplies at a time.
    let blocks: Vec<(usize, Range<usize>)> =
        active.iter().flat_map(|&e| parts_of(routing.expert_rows(e), rows_max(d)).map(move |rows| (e, rows))).collect();

    // h [R, F]: rows sorted by expert, so every expert's rows are one block.
    let h = RowBuffer::new(Form::of(&first.down), rows, first.width);
    let counted: usize =
        active.iter().map(|&e| counted_rows(routing.expert_rows(e).len(), Form::of(&first.inner))).sum();
    let items = Items::of(first.hidden_panels(), first.hidden_panels_max(), blocks.len(), ITEMS_PER_THREAD);
    with_f32(x, |x| {
        in_form_of(&first.inner, x, |x| {
            let gather = Gather::new(x);
            for_each(blocks.len() * items.len(), first.hidden_flops(counted, d), |item| {
                let of = |item: usize| Some((blocks.get(item / items.len())?, items.panels(item % items.len())));
                let Some(((e, rows), panels)) = of(item) else { return };
                let next = of(item + 1).map(|((e, _), panels)| (&experts[*e], panels.start));
                gather.with(item / items.len(), &routing.token_r()[rows.clone()], |x| {
                    // SAFETY: items write disjoint columns of disjoint row blocks.
                    unsafe { experts[*e].hidden(x, panels, (&h, rows.start), next) }
                });
            });
        });
    })?;

    // A work item has its columns of all experts, one after the other, and so of every token's sum, whose order is thus
    // the same whatever else is in the step.
    let mut sums = vec![0.0; tokens * d];
    let out = SharedOut::new(&mut sums);
    let items = Items::of(d.div_ceil(NR), OUTPUT_PANELS_MAX, 1, OUTPUT_ITEMS_PER_THREAD);
    for_each(items.len(), 2 * counted * d * first.width, |item| {
        let panels = items.panels(item);
        for (i, &e) in active.iter().enumerate() {
            let rows = routing.expert_rows(e);
            let next = match active.get(i + 1) {
                Some(&next) => Some((&experts[next], panels.start)),
                None => active.first().filter(|_| panels.end * NR < d).map(|&next| (&experts[next], panels.end)),
            };
            experts[e].output(h.rows().slice(rows.clone()), panels.clone(), next, |row, panel, y| {
                let row = rows.start + row;
                let at = routing.token_r()[row] as usize * d + panel * NR;
                // SAFETY: items add to disjoint columns.
                let sum = unsafe { std::slice::from_raw_parts_mut(out.from(at), y.len()) };
                add_scaled(sum, routing.weight_r()[row], y);
            });
        }
    });
    Tensor::from_vec(sums, (tokens, d), &Device::Cpu)
}

/// `rows` in as few parts of at most `max` as there may be, of about the same length.
fn parts_of(rows: Range<usize>, max: usize) -> impl Iterator<Item = Range<usize>> {
    let each = rows.len().div_ceil(rows.len().div_ceil(max)).next_multiple_of(16);
    rows.clone().step_by(each).map(move |start| start..rows.end.min(start + each))
}

/// Work items of outputs for each thread: every one reads all of h, and so they are few,
const OUTPUT_ITEMS_PER_THREAD: usize = 2;
/// but not wider than this, in panels, so that their columns of the sums stay in a second-level cache.
const OUTPUT_PANELS_MAX: usize = 16;

/// Panels cut into work items.
#[derive(Clone, Copy)]
struct Items {
    panels: usize,
    /// Of an item; the last one may have fewer.
    each: usize,
}

impl Items {
    /// `panels` of each of `matrices`, at most `each_max` to an item, and `per_thread` items for each thread where there is
    /// enough to do.
    fn of(panels: usize, each_max: usize, matrices: usize, per_thread: usize) -> Self {
        let wanted = per_thread * rayon::current_num_threads();
        Self { panels, each: (panels * matrices / wanted).clamp(1, each_max) }
    }

    /// Items of one matrix.
    fn len(self) -> usize {
        self.panels.div_ceil(self.each)
    }

    fn panels(self, item: usize) -> Range<usize> {
        item * self.each..self.panels.min((item + 1) * self.each)
    }
}
