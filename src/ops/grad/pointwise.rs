//! What is computed element by element, or row by row out of a table.

use super::{gradient, output, slice, with2};
use crate::ops::cpu::train::dropout::dropout as masked;
use crate::ops::cpu::train::embedding::{gather, scatter_add};
use crate::ops::cpu::with_f32;
use crate::types::Activation;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};

/// The nonlinearity of a feed-forward net: `h [R, F] → [R, F]`, with SwiGLU `[R, 2F] → [R, F]`, `silu(gate) ⊙ up`.
///
/// # Errors
/// A failure of the device.
pub fn activate(h: &Tensor, activation: Activation) -> Result<Tensor> {
    if !h.device().is_cpu() {
        return activate_composed(h, activation);
    }
    h.contiguous()?.apply_op1(Activate(activation))
}

pub(super) fn activate_composed(h: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Swiglu => {
            let halves = h.chunk(2, D::Minus1)?;
            halves[0].silu()? * &halves[1]
        }
        Activation::Gelu => h.gelu(),
        Activation::Relu => h.relu(),
        Activation::Silu => h.silu(),
    }
}

struct Activate(Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, wide) = (layout.dims()[0], layout.dims()[1]);
        let width = if self.0.gated() { wide / 2 } else { wide };
        output(self.0.forward(slice(storage, layout)?, width), (rows, width))
    }

    fn bwd(&self, h: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dh = with2(h, &dy, |h, dy| self.0.backward(h, dy, y.dims()[1]))?;
        gradient(dh, h)
    }
}

/// Rows `ids` of `table [V, D]` → `[T, D]`.
///
/// # Errors
/// An id outside the table, or a failure of the device.
pub fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= table.dims()[0]) {
        candle_core::bail!("token id {id} is outside the table of {} rows", table.dims()[0]);
    }
    if !table.device().is_cpu() {
        return table.index_select(&Tensor::new(ids, table.device())?, 0);
    }
    table.apply_op1(Embed { ids: ids.to_vec() })
}

struct Embed {
    ids: Vec<u32>,
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = layout.dims()[1];
        output(gather(slice(storage, layout)?, d, &self.ids), (self.ids.len(), d))
    }

    fn bwd(&self, table: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (rows, d) = table.dims2()?;
        let mut d_table = vec![0.0; rows * d];
        with_f32(&dy.contiguous()?, |dy| scatter_add(dy, d, &self.ids, &mut d_table))?;
        gradient(d_table, table)
    }
}

/// Zeroes a share `p` of the elements and scales the others by `1 / (1 − p)` (Srivastava et al., 2014). What is zeroed
/// depends on `seed` and the element's place alone.
///
/// # Errors
/// A failure of the device.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        let ones = vec![1.0; x.elem_count()];
        let mask = Tensor::from_vec(masked(&ones, p, seed), x.shape(), x.device())?;
        return x * mask;
    }
    x.contiguous()?.apply_op1(Dropout { p, seed })
}

struct Dropout {
    p: f32,
    seed: u64,
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(masked(slice(storage, layout)?, self.p, self.seed), layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_f32(&dy.contiguous()?, |dy| masked(dy, self.p, self.seed))?;
        gradient(dx, x)
    }
}
