//! SwiGLU nets without biases: all experts of a layer stacked, rows gathered by expert.

use super::launch::{Element, Held, Kernel, cuda, for_dtype, launch, packed, tensor};
use crate::moe::Routing;
use crate::ops::{Backend, HostTensor};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, Tensor};
use candle_nn::moe::moe_gemm;

/// Threads of the elementwise kernels' blocks.
const THREADS: usize = 256;

/// The weights of all experts of a layer.
#[derive(Debug)]
pub(crate) struct GroupedSwiglu {
    /// Gate over up: `[E, 2F, D]`.
    gate_up: Tensor,
    /// `[E, D, F]`
    down: Tensor,
}

impl GroupedSwiglu {
    /// The one expert's `down(silu(gate(x)) ⊙ up(x))` for every token: `x [T, D] → [T, D]`.
    pub(crate) fn swiglu(&self, x: &Tensor) -> Result<Tensor> {
        if self.gate_up.dim(0)? != 1 {
            candle_core::bail!("a dense SwiGLU was asked of {} experts", self.gate_up.dim(0)?);
        }
        self.one(0, &packed(x, self.gate_up.dtype())?)
    }

    /// Every token's weighted sum over its experts: `x [T, D] → [T, D]`.
    pub(crate) fn forward(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        let tokens = x.dims2()?.0;
        let experts = self.gate_up.dim(0)?;
        if (tokens, experts) != (routing.tokens(), routing.experts()) {
            candle_core::bail!(
                "a routing of {} tokens over {} experts was given {tokens} tokens and {experts} experts",
                routing.tokens(),
                routing.experts()
            );
        }
        let token_r = Tensor::new(routing.token_r(), x.device())?;
        let x_r = packed(x, self.gate_up.dtype())?.index_select(&token_r, 0)?;
        let y_r = if self.fits_moe_gemm()? { self.grouped(&x_r, routing)? } else { self.one_by_one(&x_r, routing)? };
        weighted_sum(&y_r, routing)
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.gate_up.elem_count() + self.down.elem_count()) * self.gate_up.dtype().size_in_bytes()
    }

    /// What candle's kernel can take: 16-bit elements, rows of whole 16-byte loads, and a prefix sum over the experts
    /// in one block of threads.
    fn fits_moe_gemm(&self) -> Result<bool> {
        let (experts, d, f) = self.down.dims3()?;
        let narrow = self.down.dtype() != DType::F32;
        Ok(narrow && d.is_multiple_of(8) && f.is_multiple_of(8) && experts <= 1024)
    }

    /// All experts at once: `x_r [R, D] → [R, D]`, both sorted by expert.
    fn grouped(&self, x_r: &Tensor, routing: &Routing) -> Result<Tensor> {
        let device = x_r.device();
        // The kernel reads the input and writes the output at a row's id. With rows gathered beforehand the ids just
        // count, every row is written, and a token may have any number of experts.
        let row_r = Tensor::arange(0, routing.rows() as u32, device)?;
        let expert_r: Vec<u32> =
            (0..routing.experts()).flat_map(|e| std::iter::repeat_n(e as u32, routing.expert_rows(e).len())).collect();
        let expert_r = Tensor::new(expert_r, device)?;
        // `is_prefill` picks the fragments' shape and a thrust scan, which allocates and waits. Both shapes compute the
        // same product; one of them for all steps keeps a row's bits the same in prefill and decode.
        let product = |x: &Tensor, w: &Tensor| moe_gemm(x, w, &None, &row_r, &expert_r, 1, false);
        product(&silu_mul(&product(x_r, &self.gate_up)?)?, &self.down)
    }

    /// One expert after the other through cuBLAS: `x_r [R, D] → [R, D]`, both sorted by expert.
    fn one_by_one(&self, x_r: &Tensor, routing: &Routing) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(routing.unique_experts());
        for e in 0..routing.experts() {
            let rows = routing.expert_rows(e);
            if !rows.is_empty() {
                parts.push(self.one(e, &x_r.narrow(0, rows.start, rows.len())?)?);
            }
        }
        packed(&Tensor::cat(&parts, 0)?, x_r.dtype())
    }

    /// Expert `e` for all rows of `x`.
    fn one(&self, e: usize, x: &Tensor) -> Result<Tensor> {
        let gate_up = x.matmul(&self.gate_up.get(e)?.t()?)?;
        silu_mul(&gate_up)?.matmul(&self.down.get(e)?.t()?)
    }
}

/// Takes experts one by one, so that loading holds one of them beside the stacks.
pub(crate) struct GroupedSwigluBuilder {
    experts: usize,
    pushed: usize,
    stacks: Option<GroupedSwiglu>,
}

impl GroupedSwigluBuilder {
    pub(crate) fn new(experts: usize) -> Self {
        Self { experts, pushed: 0, stacks: None }
    }

    /// The next expert: `gate` and `up` are `[F, D]`, `down` is `[D, F]`.
    pub(crate) fn push(
        &mut self,
        gate: &HostTensor,
        up: &HostTensor,
        down: &HostTensor,
        backend: &Backend,
    ) -> Result<()> {
        let (dtype, device) = (backend.dtype(), backend.device());
        let (f, d) = gate.dims2();
        let stacks = match &mut self.stacks {
            Some(stacks) => stacks,
            none => none.insert(GroupedSwiglu {
                gate_up: Tensor::zeros((self.experts, 2 * f, d), dtype, device)?,
                down: Tensor::zeros((self.experts, d, f), dtype, device)?,
            }),
        };
        let e = self.pushed;
        let halves = stacks.gate_up.reshape((2 * self.experts, f, d))?;
        halves.slice_set(&gate.to_tensor(dtype, device)?.unsqueeze(0)?, 0, 2 * e)?;
        halves.slice_set(&up.to_tensor(dtype, device)?.unsqueeze(0)?, 0, 2 * e + 1)?;
        stacks.down.slice_set(&down.to_tensor(dtype, device)?.unsqueeze(0)?, 0, e)?;
        self.pushed += 1;
        Ok(())
    }

    /// All experts together.
    pub(crate) fn finish(self) -> Result<GroupedSwiglu> {
        match self.stacks {
            Some(stacks) if self.pushed == self.experts => Ok(stacks),
            _ => candle_core::bail!("{} of {} experts were given", self.pushed, self.experts),
        }
    }
}

/// `silu(gate) ⊙ up`: `[R, 2F] → [R, F]`.
fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    for_dtype!(gate_up.dtype(), silu_mul_as(gate_up))
}

fn silu_mul_as<E: Element>(gate_up: &Tensor) -> Result<Tensor> {
    let device = cuda(gate_up.device())?;
    let (rows, width) = gate_up.dims2()?;
    let f = width / 2;
    let gate_up = Held::new(gate_up);
    // SAFETY: the kernel writes every element.
    let mut h = unsafe { device.alloc::<E>(rows * f)? };
    let kernel = Kernel::new::<E>("silu_mul", device)?;
    let mut args = kernel.args();
    let f_arg = f as u32;
    args.arg(gate_up.elements::<E>()?).arg(&mut h).arg(&f_arg);
    // SAFETY: silu_mul(gate_up, h, unsigned), with a block row for every row of both.
    unsafe { launch(&mut args, (rows, f.div_ceil(THREADS), 1), THREADS as u32)? };
    Ok(tensor(h, (rows, f), device))
}

/// `y_r [R, D] → [T, D]`: every token's weighted rows, summed in ascending order in f32. `y_r` must be [`packed`].
pub(super) fn weighted_sum(y_r: &Tensor, routing: &Routing) -> Result<Tensor> {
    for_dtype!(y_r.dtype(), combine(y_r, routing))
}

/// A [`Routing`]'s way back from rows to tokens, uploaded at once.
struct CombineTables {
    tokens: usize,
    rows: usize,
    /// `starts_t1 [T + 1]`, `row_of [R]`, and the bits of `weight_r [R]`.
    words: CudaSlice<u32>,
}

impl CombineTables {
    fn new(routing: &Routing, device: &CudaDevice) -> Result<Self> {
        let (tokens, rows) = (routing.tokens(), routing.rows());
        let mut words = Vec::with_capacity(tokens + 1 + 2 * rows);
        let mut start = 0;
        words.push(start);
        for t in 0..tokens {
            start += routing.token_rows(t).len() as u32;
            words.push(start);
        }
        (0..tokens).for_each(|t| words.extend(routing.token_rows(t)));
        words.extend(routing.weight_r().iter().map(|w| w.to_bits()));
        Ok(Self { tokens, rows, words: device.clone_htod(&words)? })
    }

    fn starts_t1(&self) -> CudaView<'_, u32> {
        self.words.slice(..self.tokens + 1)
    }

    fn row_of(&self) -> CudaView<'_, u32> {
        self.words.slice(self.tokens + 1..self.tokens + 1 + self.rows)
    }

    fn weight_bits_r(&self) -> CudaView<'_, u32> {
        self.words.slice(self.tokens + 1 + self.rows..)
    }
}

fn combine<E: Element>(y_r: &Tensor, routing: &Routing) -> Result<Tensor> {
    let device = cuda(y_r.device())?;
    let d = y_r.dims2()?.1;
    let tables = CombineTables::new(routing, device)?;
    let (starts_t1, row_of, weight_bits_r) = (tables.starts_t1(), tables.row_of(), tables.weight_bits_r());
    let y_r = Held::new(y_r);
    // SAFETY: the kernel writes every element.
    let mut sum = unsafe { device.alloc::<E>(tables.tokens * d)? };
    let kernel = Kernel::new::<E>("combine", device)?;
    let mut args = kernel.args();
    let d_arg = d as u32;
    args.arg(y_r.elements::<E>()?).arg(&weight_bits_r).arg(&starts_t1).arg(&row_of).arg(&mut sum).arg(&d_arg);
    // SAFETY: combine(y, weights, starts, rows, sum, unsigned): the weights are the bits of floats, a `Routing` names
    // rows of y alone, and there is a block row for every token.
    unsafe { launch(&mut args, (tables.tokens, d.div_ceil(THREADS), 1), THREADS as u32)? };
    Ok(tensor(sum, (tables.tokens, d), device))
}
