//! The mixture: experts' projections of their rows, the gate's weights, the sum per token. Rows lie as the routing's CSR
//! has them; no tensor is tokens × experts × anything.

use super::linear::{Gather, Groups, apply};
use super::{Precision, composed_product, gradient, output, slice, with2, with3};
use crate::moe::Routing;
use crate::ops::cpu::train::combine::{TokenRows, combine as sum_rows, combine_backward};
use crate::ops::cpu::train::routing::{WeightRule, row_weights, row_weights_backward};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// Every row by its expert's matrix: `w [E, O, I]`, `b [E, O]` → `[R, O]`. With `gather`, x is `[T, I]` and row r is its
/// token's; without, x is `[R, I]`.
///
/// # Errors
/// A failure of the device.
pub fn expert_linear(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    routing: &Arc<Routing>,
    gather: bool,
    precision: Precision,
) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return expert_linear_composed(x, w, b, routing, gather, precision);
    }
    let offsets = routing.offsets_e1().iter().map(|o| *o as usize).collect();
    let gather = gather.then(|| Gather { routing: routing.clone() });
    apply(x, w, b, Groups { offsets, gather, precision })
}

pub(super) fn expert_linear_composed(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    routing: &Routing,
    gather: bool,
    precision: Precision,
) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(routing.experts());
    for e in 0..routing.experts() {
        let rows = routing.expert_rows(e);
        if rows.is_empty() {
            continue;
        }
        let x = match gather {
            true => x.index_select(&Tensor::new(&routing.token_r()[rows], x.device())?, 0)?,
            false => x.narrow(0, rows.start, rows.len())?,
        };
        let y = composed_product(&x, &w.get(e)?, precision)?;
        parts.push(match b {
            Some(b) => y.broadcast_add(&b.get(e)?)?,
            None => y,
        });
    }
    Tensor::cat(&parts, 0)
}

/// What the rows' outputs are multiplied by, `z [T, E] → [R]`: the softmax over all experts, and with `renormalise`
/// divided by its sum over all experts that the token chose, also those whose rows capacity dropped. `routing` is `chosen`
/// after capacity.
///
/// # Errors
/// A failure of the device.
pub fn route_weights(z: &Tensor, chosen: &Arc<Routing>, routing: &Arc<Routing>, renormalise: bool) -> Result<Tensor> {
    if !z.device().is_cpu() {
        return route_weights_composed(z, chosen, routing, renormalise);
    }
    let chosen = renormalise.then(|| {
        let mut mask = vec![false; z.elem_count()];
        places(chosen).into_iter().for_each(|at| mask[at as usize] = true);
        mask
    });
    z.contiguous()?.apply_op1(RouteWeights { chosen, routing: routing.clone() })
}

/// Places of the rows' probabilities in `[T, E]`.
fn places(routing: &Routing) -> Vec<u32> {
    let experts = routing.experts();
    let rows = (0..experts).flat_map(|e| routing.expert_rows(e).map(move |row| (e, row)));
    rows.map(|(e, row)| routing.token_r()[row] * experts as u32 + e as u32).collect()
}

pub(super) fn route_weights_composed(
    z: &Tensor,
    chosen: &Routing,
    routing: &Routing,
    renormalise: bool,
) -> Result<Tensor> {
    let device = z.device();
    let p = candle_nn::ops::softmax(z, D::Minus1)?.flatten_all()?;
    let p_r = p.index_select(&Tensor::new(places(routing), device)?, 0)?;
    if !renormalise {
        return Ok(p_r);
    }
    let p_chosen = p.index_select(&Tensor::new(places(chosen), device)?, 0)?;
    let zeros = Tensor::zeros(chosen.tokens(), z.dtype(), device)?;
    let sum_t = zeros.index_add(&Tensor::new(chosen.token_r(), device)?, &p_chosen, 0)?;
    p_r / sum_t.index_select(&Tensor::new(routing.token_r(), device)?, 0)?
}

struct RouteWeights {
    /// Which experts every token chose, `[T · E]`, where weights are shares of those.
    chosen: Option<Vec<bool>>,
    routing: Arc<Routing>,
}

impl RouteWeights {
    fn rule(&self) -> WeightRule<'_> {
        match &self.chosen {
            Some(chosen) => WeightRule::Renormalised { chosen },
            None => WeightRule::Raw,
        }
    }
}

impl CustomOp1 for RouteWeights {
    fn name(&self) -> &'static str {
        "route weights"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let w = row_weights(slice(storage, layout)?, self.routing.token_r(), self.routing.offsets_e1(), self.rule());
        output(w, self.routing.rows())
    }

    fn bwd(&self, z: &Tensor, _w: &Tensor, dw: &Tensor) -> Result<Option<Tensor>> {
        let dw = dw.contiguous()?;
        let dz = with2(z, &dw, |z, dw| {
            row_weights_backward(z, self.routing.token_r(), self.routing.offsets_e1(), self.rule(), dw)
        })?;
        gradient(dz, z)
    }
}

/// Every token's weighted sum over its rows: `y [R, D]`, `weights [R]` → `[T, D]`; 0 for a token without rows.
///
/// # Errors
/// A failure of the device.
pub fn combine(y: &Tensor, weights: &Tensor, routing: &Arc<Routing>) -> Result<Tensor> {
    if !y.device().is_cpu() {
        return combine_composed(y, weights, routing);
    }
    y.contiguous()?.apply_op2(weights, Combine { routing: routing.clone() })
}

pub(super) fn combine_composed(y: &Tensor, weights: &Tensor, routing: &Routing) -> Result<Tensor> {
    let weighted = y.broadcast_mul(&weights.unsqueeze(1)?)?;
    let zeros = Tensor::zeros((routing.tokens(), y.dim(1)?), y.dtype(), y.device())?;
    zeros.index_add(&Tensor::new(routing.token_r(), y.device())?, &weighted, 0)
}

struct Combine {
    routing: Arc<Routing>,
}

impl CustomOp2 for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = l1.dims()[1];
        let out = sum_rows(slice(s1, l1)?, slice(s2, l2)?, d, TokenRows::of_routing(&self.routing));
        output(out, (self.routing.tokens(), d))
    }

    fn bwd(&self, y: &Tensor, w: &Tensor, _out: &Tensor, d_out: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_out = d_out.contiguous()?;
        let d = y.dim(1)?;
        let (dy, dw) = with3(y, w, &d_out, |y, w, d_out| combine_backward(y, w, d, self.routing.token_r(), d_out))?;
        Ok((gradient(dy, y)?, gradient(dw, w)?))
    }
}
