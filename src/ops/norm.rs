//! RMS norm.

use super::{Backend, HostTensor, cpu};
use candle_core::{DType, Result, Tensor};

/// `x / sqrt(mean(x²) + eps) ⊙ w` over groups of `w`'s width: whole rows, or single heads.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Weight,
    eps: f32,
}

#[derive(Debug)]
enum Weight {
    Cpu(Vec<f32>),
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

impl RmsNorm {
    /// `weight` is `[W]`; rows must be a multiple of W wide.
    pub fn new(weight: &HostTensor, eps: f64, backend: &Backend) -> Result<Self> {
        let eps = eps as f32;
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            return Ok(Self { weight: Weight::Cuda(weight.to_tensor(backend.dtype(), &backend.device)?), eps });
        }
        debug_assert!(backend.device.is_cpu());
        Ok(Self { weight: Weight::Cpu(weight.to_f32()), eps })
    }

    /// `x [T, n·W] → [T, n·W]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Cpu(w) => {
                let mut y = cpu::host_f32(x)?;
                cpu::rms_norm(&mut y, w, self.eps);
                Tensor::from_vec(y, x.shape(), x.device())
            }
            #[cfg(feature = "cuda")]
            Weight::Cuda(w) => super::cuda::rms_norm(x, w, self.eps),
        }
    }

    /// Bytes the weight takes, in the dtype it is kept in.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Cpu(w) => w.len() * DType::F32.size_in_bytes(),
            #[cfg(feature = "cuda")]
            Weight::Cuda(w) => w.elem_count() * w.dtype().size_in_bytes(),
        }
    }
}
