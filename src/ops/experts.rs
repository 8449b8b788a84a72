//! SwiGLU feed-forward nets: one for every token, or many with a routing.

use super::{Backend, HostTensor, cpu};
use crate::moe::Routing;
use candle_core::{Result, Tensor};

/// `down(silu(gate(x)) ⊙ up(x))` for every token: a dense FFN or a shared expert.
#[derive(Debug)]
pub struct Swiglu {
    experts: Experts,
}

impl Swiglu {
    /// `gate` and `up` are `[F, D]`, `down` is `[D, F]`.
    pub fn new(gate: &HostTensor, up: &HostTensor, down: &HostTensor, backend: &Backend) -> Result<Self> {
        let mut builder = ExpertsBuilder::new(1, backend);
        builder.push(gate, up, down)?;
        Ok(Self { experts: builder.finish()? })
    }

    /// `x [T, D] → [T, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.experts.inner {
            Inner::Cpu(experts) => cpu::swiglu(x, &experts[0]),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.swiglu(x),
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
    Cpu(Vec<cpu::PackedSwiglu>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::GroupedSwiglu),
}

impl Experts {
    /// Every token's weighted sum over its experts: `x [T, D] → [T, D]`. Experts without rows cost nothing.
    pub fn forward(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        match &self.inner {
            Inner::Cpu(experts) => cpu::grouped_swiglu(x, experts, routing),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.forward(x, routing),
        }
    }

    /// Bytes all experts' weights take.
    pub fn bytes(&self) -> usize {
        match &self.inner {
            Inner::Cpu(experts) => experts.iter().map(cpu::PackedSwiglu::bytes).sum(),
            #[cfg(feature = "cuda")]
            Inner::Cuda(experts) => experts.bytes(),
        }
    }
}

/// Takes experts one by one, so that loading holds one of them unpacked at a time.
pub struct ExpertsBuilder {
    inner: BuilderInner,
    backend: Backend,
}

enum BuilderInner {
    Cpu(Vec<cpu::PackedSwiglu>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::GroupedSwigluBuilder),
}

impl ExpertsBuilder {
    /// For `experts` experts of one shape.
    pub fn new(experts: usize, backend: &Backend) -> Self {
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            let inner = BuilderInner::Cuda(super::cuda::GroupedSwigluBuilder::new(experts));
            return Self { inner, backend: backend.clone() };
        }
        Self { inner: BuilderInner::Cpu(Vec::with_capacity(experts)), backend: backend.clone() }
    }

    /// The next expert: `gate` and `up` are `[F, D]`, `down` is `[D, F]`.
    pub fn push(&mut self, gate: &HostTensor, up: &HostTensor, down: &HostTensor) -> Result<()> {
        match &mut self.inner {
            BuilderInner::Cpu(experts) => {
                experts.push(cpu::PackedSwiglu::pack(gate, up, down, self.backend.dtype()));
                Ok(())
            }
            #[cfg(feature = "cuda")]
            BuilderInner::Cuda(builder) => builder.push(gate, up, down, &self.backend),
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
