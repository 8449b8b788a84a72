//! Projections, of all tokens or of each expert's rows.

use super::{Precision, composed_product, gradient, output, slice};
use crate::ops::cpu::gemm::{Matrix, Product, products};
use crate::ops::cpu::train::bias::{add_bias, sum_of_rows};
use crate::ops::cpu::train::combine::{TokenRows, scatter_rows};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// `y = x·wᵀ + b`: `x [T, I]`, `w [O, I]`, `b [O]`.
///
/// # Errors
/// A failure of the device.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>, precision: Precision) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed(x, w, b, precision);
    }
    let tokens = x.dim(0)?;
    apply(x, w, b, Groups { offsets: vec![0, tokens], gather: None, precision })
}

pub(super) fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>, precision: Precision) -> Result<Tensor> {
    let y = composed_product(x, w, precision)?;
    match b {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

/// Runs `groups` as one node.
pub(super) fn apply(x: &Tensor, w: &Tensor, b: Option<&Tensor>, groups: Groups) -> Result<Tensor> {
    let x = x.contiguous()?;
    match b {
        None => x.apply_op2(w, groups),
        Some(b) => x.apply_op3(w, b, groups),
    }
}

/// Rows in groups, each multiplied by a matrix of its own: `w` is `[G, O, I]`, or `[O, I]` for one group.
pub(super) struct Groups {
    /// Rows of group g are `offsets[g]..offsets[g + 1]`, `[G + 1]`.
    pub offsets: Vec<usize>,
    /// Row r is row `tokens[r]` of x; without it, row r.
    pub gather: Option<Gather>,
    pub precision: Precision,
}

/// Which token every row is, and how gradients of rows go back to tokens.
pub(super) struct Gather {
    pub routing: Arc<crate::moe::Routing>,
}

impl Groups {
    fn widths(&self, w: &Shape) -> (usize, usize) {
        let dims = w.dims();
        (dims[dims.len() - 2], dims[dims.len() - 1])
    }

    fn rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// The rows of x that group `g` multiplies.
    fn input<'a>(&'a self, x: &'a [f32], inputs: usize, g: usize) -> Matrix<'a> {
        let rows = self.offsets[g]..self.offsets[g + 1];
        match &self.gather {
            Some(gather) => Matrix::new(x, x.len() / inputs, inputs).gathered(&gather.routing.token_r()[rows]),
            None => Matrix::new(&x[rows.start * inputs..rows.end * inputs], rows.len(), inputs),
        }
    }

    fn forward(&self, x: &[f32], w: &[f32], b: Option<&[f32]>, (outputs, inputs): (usize, usize)) -> Vec<f32> {
        let mut y = vec![0.0; self.rows() * outputs];
        let mut jobs = Vec::with_capacity(self.offsets.len() - 1);
        let mut rest = &mut y[..];
        for (g, w) in w.chunks_exact(outputs * inputs).enumerate() {
            let (c, after) = rest.split_at_mut((self.offsets[g + 1] - self.offsets[g]) * outputs);
            rest = after;
            jobs.push(Product::new(self.input(x, inputs, g), Matrix::new(w, outputs, inputs).t(), c));
        }
        products(&mut jobs, self.precision);
        drop(jobs);
        if let Some(b) = b {
            for (b, rows) in b.chunks_exact(outputs).zip(self.offsets.windows(2)) {
                add_bias(&mut y[rows[0] * outputs..rows[1] * outputs], b);
            }
        }
        y
    }

    /// Gradients of x and w.
    fn backward(&self, x: &[f32], w: &[f32], dy: &[f32], (outputs, inputs): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
        let mut dx_r = vec![0.0; self.rows() * inputs];
        let mut dw = vec![0.0; w.len()];
        let mut jobs = Vec::with_capacity(2 * self.offsets.len());
        let mut rest = &mut dx_r[..];
        for (g, (w, dw)) in w.chunks_exact(outputs * inputs).zip(dw.chunks_exact_mut(outputs * inputs)).enumerate() {
            let rows = self.offsets[g]..self.offsets[g + 1];
            let dy = Matrix::new(&dy[rows.start * outputs..rows.end * outputs], rows.len(), outputs);
            let (dx, after) = rest.split_at_mut(rows.len() * inputs);
            rest = after;
            jobs.push(Product::new(dy, Matrix::new(w, outputs, inputs), dx));
            jobs.push(Product::new(dy.t(), self.input(x, inputs, g), dw));
        }
        products(&mut jobs, self.precision);
        drop(jobs);
        let dx = match &self.gather {
            None => dx_r,
            Some(gather) => scatter_rows(&dx_r, inputs, TokenRows::of_routing(&gather.routing)),
        };
        (dx, dw)
    }

    fn grads(&self, x: &Tensor, w: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let widths = self.widths(w.shape());
        let (dx, dw) = super::with3(x, w, &dy, |x, w, dy| self.backward(x, w, dy, widths))?;
        Ok((gradient(dx, x)?, gradient(dw, w)?))
    }
}

impl CustomOp2 for Groups {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let widths = self.widths(l2.shape());
        let y = self.forward(slice(s1, l1)?, slice(s2, l2)?, None, widths);
        output(y, (self.rows(), widths.0))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.grads(x, w, dy)
    }
}

impl CustomOp3 for Groups {
    fn name(&self) -> &'static str {
        "linear with bias"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let widths = self.widths(l2.shape());
        let y = self.forward(slice(s1, l1)?, slice(s2, l2)?, Some(slice(s3, l3)?), widths);
        output(y, (self.rows(), widths.0))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let outputs = b.dim(candle_core::D::Minus1)?;
        let (dx, dw) = self.grads(x, w, dy)?;
        let db = crate::ops::cpu::with_f32(&dy.contiguous()?, |dy| {
            let groups = self.offsets.windows(2).map(|o| &dy[o[0] * outputs..o[1] * outputs]);
            groups.flat_map(|dy| sum_of_rows(dy, outputs)).collect::<Vec<f32>>()
        })?;
        Ok((dx, dw, gradient(db, b)?))
    }
}
