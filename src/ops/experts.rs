//! Feed-forward nets: one for every token, or many with a routing.

use super::{Backend, HostTensor, cpu};
use crate::moe::Routing;
use crate::types::Activation;
use candle_core::{Result, Tensor};

/// A projection as it lies in a checkpoint.
#[derive(Clone, Debug)]
pub struct HostLinear {
    /// `[O, I]`
    pub weight: HostTensor,
    /// `[O]`
    pub bias: Option<HostTensor>,
}

/// A feed-forward net as it lies in a checkpoint.
#[derive(Clone, Debug)]
pub struct HostFfn {
    /// `[F, D]`, where the activation has one.
    pub gate: Option<HostLinear>,
    /// `[F, D]`
    pub up: HostLinear,
    /// `[D, F]`
    pub down: HostLinear,
}

impl From<HostTensor> for HostLinear {
    fn from(weight: HostTensor) -> Self {
        Self { weight, bias: None }
    }
}

impl HostFfn {
    /// A SwiGLU without biases: `gate` and `up` are `[F, D]`, `down` is `[D, F]`.
    pub fn swiglu(gate: HostTensor, up: HostTensor, down: HostTensor) -> Self {
        Self { gate: Some(gate.into()), up: up.into(), down: down.into() }
    }

    /// Its projections: gate (if there is one), up, down.
    pub fn projections(&self) -> impl Iterator<Item = &HostLinear> {
        self.gate.iter().chain([&self.up, &self.down])
    }
}

/// The same feed-forward net for every token: a dense layer or a shared expert.
#[derive(Debug)]
pub struct FeedForward {
    experts: Experts,
}

impl FeedForward {
    /// # Errors
    /// A gate that the activation does not have, or the lack of one.
    pub fn new(net: &HostFfn, activation: Activation, backend: &Backend) -> Result<Self> {
        let packing = backend.dense_packing();
        let mut builder = ExpertsBuilder { packing, ..ExpertsBuilder::new(1, activation, backend) };
        builder.push(net)?;
        Ok(Self { experts: builder.finish()? })
    }

    /// `x [T, D] → [T, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.experts.inner {
            Inner::Cpu(experts) => cpu::feed_forward(x, &experts[0]),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.feed_forward(x),
        }
    }

    /// Bytes the weights take.
    pub fn bytes(&self) -> usize {
        self.experts.bytes()
    }
}

/// The routed experts of one layer.
#[derive(Debug)]
pub struct Experts {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Cpu(Vec<cpu::PackedFfn>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Nets),
}

impl Experts {
    /// Every token's weighted sum over its experts: `x [T, D] → [T, D]`. Experts without rows cost nothing.
    pub fn forward(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        match &self.inner {
            Inner::Cpu(experts) => cpu::grouped_experts(x, experts, routing),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.forward(x, routing),
        }
    }

    /// Bytes all experts' weights take.
    pub fn bytes(&self) -> usize {
        match &self.inner {
            Inner::Cpu(experts) => experts.iter().map(cpu::PackedFfn::bytes).sum(),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.bytes(),
        }
    }
}

/// Takes experts one by one, so that loading holds one of them unpacked at a time.
pub struct ExpertsBuilder {
    inner: BuilderInner,
    activation: Activation,
    packing: cpu::Packing,
    #[cfg(feature = "cuda")]
    backend: Backend,
}

enum BuilderInner {
    Cpu(Vec<cpu::PackedFfn>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::NetsBuilder),
}

impl ExpertsBuilder {
    /// For `experts` experts of one shape.
    pub fn new(experts: usize, activation: Activation, backend: &Backend) -> Self {
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            let inner = BuilderInner::Cuda(super::cuda::NetsBuilder::new(experts, activation));
            return Self { inner, activation, packing: backend.expert_packing(), backend: backend.clone() };
        }
        Self {
            inner: BuilderInner::Cpu(Vec::with_capacity(experts)),
            activation,
            packing: backend.expert_packing(),
            #[cfg(feature = "cuda")]
            backend: backend.clone(),
        }
    }

    /// The next expert.
    ///
    /// # Errors
    /// A gate that the activation does not have, or the lack of one.
    pub fn push(&mut self, net: &HostFfn) -> Result<()> {
        if net.gate.is_some() != self.activation.gated() {
            candle_core::bail!("a net of {:?} has {} gate", self.activation, net.gate.as_ref().map_or("no", |_| "a"));
        }
        match &mut self.inner {
            BuilderInner::Cpu(experts) => {
                experts.push(cpu::PackedFfn::pack(net, self.activation, &self.packing));
                Ok(())
            }
            #[cfg(feature = "cuda")]
            BuilderInner::Cuda(builder) => builder.push(net, &self.backend),
        }
    }

    /// All experts together.
    pub fn finish(self) -> Result<Experts> {
        let inner = match self.inner {
            BuilderInner::Cpu(experts) => Inner::Cpu(experts),
            #[cfg(feature = "cuda")]
            BuilderInner::Cuda(builder) => Inner::Cuda(builder.finish()?),
        };
        Ok(Experts { inner })
    }
}
