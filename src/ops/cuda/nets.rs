//! The feed-forward nets of a layer: stacked where they are SwiGLUs without biases, else one by one from candle's
//! operations.

use super::experts::{GroupedSwiglu, GroupedSwigluBuilder, weighted_sum};
use super::launch::packed;
use crate::moe::Routing;
use crate::ops::{Backend, HostFfn, HostLinear};
use crate::types::Activation;
use candle_core::{DType, Result, Tensor};

/// All nets of a layer.
#[derive(Debug)]
pub(crate) enum Nets {
    Stacked(GroupedSwiglu),
    Single(Vec<Net>),
}

impl Nets {
    /// The one net for every token: `x [T, D] → [T, D]`.
    pub(crate) fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Stacked(experts) => experts.swiglu(x),
            Self::Single(nets) => match nets.as_slice() {
                [net] => net.forward(&packed(x, net.up.weight.dtype())?),
                _ => candle_core::bail!("a dense net was asked of {} experts", nets.len()),
            },
        }
    }

    /// Every token's weighted sum over its experts: `x [T, D] → [T, D]`.
    pub(crate) fn forward(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        match self {
            Self::Stacked(experts) => experts.forward(x, routing),
            Self::Single(nets) => one_by_one(nets, x, routing),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Stacked(experts) => experts.bytes(),
            Self::Single(nets) => nets.iter().map(Net::bytes).sum(),
        }
    }
}

fn one_by_one(nets: &[Net], x: &Tensor, routing: &Routing) -> Result<Tensor> {
    let tokens = x.dims2()?.0;
    if (tokens, nets.len()) != (routing.tokens(), routing.experts()) {
        candle_core::bail!(
            "a routing of {} tokens over {} experts was given {tokens} tokens and {} experts",
            routing.tokens(),
            routing.experts(),
            nets.len()
        );
    }
    let dtype = nets[0].up.weight.dtype();
    let token_r = Tensor::new(routing.token_r(), x.device())?;
    let x_r = packed(x, dtype)?.index_select(&token_r, 0)?;
    let mut parts = Vec::with_capacity(routing.unique_experts());
    for (e, net) in nets.iter().enumerate() {
        let rows = routing.expert_rows(e);
        if !rows.is_empty() {
            parts.push(net.forward(&x_r.narrow(0, rows.start, rows.len())?)?);
        }
    }
    weighted_sum(&packed(&Tensor::cat(&parts, 0)?, dtype)?, routing)
}

/// One net.
#[derive(Debug)]
pub(crate) struct Net {
    activation: Activation,
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
}

impl Net {
    fn new(net: &HostFfn, activation: Activation, backend: &Backend) -> Result<Self> {
        let projection = |linear| Projection::new(linear, backend);
        Ok(Self {
            activation,
            gate: net.gate.as_ref().map(projection).transpose()?,
            up: projection(&net.up)?,
            down: projection(&net.down)?,
        })
    }

    /// `x [R, D] → [R, D]`; what lies between the projections is computed in f32.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let up = self.up.forward(x)?.to_dtype(DType::F32)?;
        let h = match (&self.gate, self.activation) {
            (Some(gate), _) => (gate.forward(x)?.to_dtype(DType::F32)?.silu()? * up)?,
            // Candle's `gelu` is the approximation by tanh.
            (None, Activation::Gelu) => up.gelu()?,
            (None, Activation::Relu) => up.relu()?,
            (None, Activation::Silu | Activation::Swiglu) => up.silu()?,
        };
        self.down.forward(&h.to_dtype(x.dtype())?)
    }

    fn bytes(&self) -> usize {
        self.gate.iter().chain([&self.up, &self.down]).map(Projection::bytes).sum()
    }
}

/// A weight `[O, I]` with its bias `[O]`.
#[derive(Debug)]
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    fn new(linear: &HostLinear, backend: &Backend) -> Result<Self> {
        let (dtype, device) = (backend.dtype(), backend.device());
        let bias = linear.bias.as_ref().map(|bias| bias.to_tensor(dtype, device)).transpose()?;
        Ok(Self { weight: linear.weight.to_tensor(dtype, device)?, bias })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn bytes(&self) -> usize {
        let elements = self.weight.elem_count() + self.bias.as_ref().map_or(0, Tensor::elem_count);
        elements * self.weight.dtype().size_in_bytes()
    }
}

/// Takes nets one by one, so that loading holds one of them beside those on the device.
pub(crate) struct NetsBuilder {
    experts: usize,
    activation: Activation,
    /// Until a net turns out to be none that can be stacked.
    stacked: Option<GroupedSwigluBuilder>,
    single: Vec<Net>,
}

impl NetsBuilder {
    pub(crate) fn new(experts: usize, activation: Activation) -> Self {
        let stacked = activation.gated().then(|| GroupedSwigluBuilder::new(experts));
        Self { experts, activation, stacked, single: Vec::new() }
    }

    /// The next net; all have biases, or none.
    pub(crate) fn push(&mut self, net: &HostFfn, backend: &Backend) -> Result<()> {
        match (&mut self.stacked, &net.gate) {
            (Some(stacked), Some(gate)) if net.projections().all(|linear| linear.bias.is_none()) => {
                stacked.push(&gate.weight, &net.up.weight, &net.down.weight, backend)
            }
            _ => {
                self.stacked = None;
                self.single.push(Net::new(net, self.activation, backend)?);
                Ok(())
            }
        }
    }

    /// All nets together.
    pub(crate) fn finish(self) -> Result<Nets> {
        match self.stacked {
            Some(stacked) => Ok(Nets::Stacked(stacked.finish()?)),
            None if self.single.len() == self.experts => Ok(Nets::Single(self.single)),
            None => candle_core::bail!("{} of {} experts were given", self.single.len(), self.experts),
        }
    }
}
