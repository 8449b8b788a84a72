//! RMS norm and layer norm.

use super::{Backend, HostTensor, cpu};
use candle_core::{DType, Result, Tensor};

/// `(x − m) / sqrt(mean((x − m)²) + eps) ⊙ w + b` over groups of `w`'s width: whole rows, or single heads.
///
/// In a layer norm (Ba et al., arXiv 1607.06450) m is the mean of x; in an RMS norm (Zhang & Sennrich, arXiv
/// 1910.07467) m and b are 0.
#[derive(Clone, Debug)]
pub struct Norm {
    parameters: Parameters,
    eps: f32,
}

#[derive(Clone, Debug)]
enum Parameters {
    Cpu {
        weight: Vec<f32>,
        /// A layer norm's.
        bias: Option<Vec<f32>>,
    },
    #[cfg(feature = "cuda")]
    Cuda { weight: Tensor, bias: Option<Tensor> },
}

impl Norm {
    /// An RMS norm: `weight` is `[W]`; rows must be a multiple of W wide.
    pub fn rms(weight: &HostTensor, eps: f64, backend: &Backend) -> Result<Self> {
        Self::new(weight, None, eps, backend)
    }

    /// A layer norm: `weight` and `bias` are `[W]`; rows must be a multiple of W wide.
    pub fn layer(weight: &HostTensor, bias: &HostTensor, eps: f64, backend: &Backend) -> Result<Self> {
        Self::new(weight, Some(bias), eps, backend)
    }

    fn new(weight: &HostTensor, bias: Option<&HostTensor>, eps: f64, backend: &Backend) -> Result<Self> {
        let eps = eps as f32;
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            let on_device = |t: &HostTensor| t.to_tensor(backend.dtype(), &backend.device);
            let parameters = Parameters::Cuda { weight: on_device(weight)?, bias: bias.map(on_device).transpose()? };
            return Ok(Self { parameters, eps });
        }
        debug_assert!(backend.device.is_cpu());
        let parameters = Parameters::Cpu { weight: weight.to_f32(), bias: bias.map(HostTensor::to_f32) };
        Ok(Self { parameters, eps })
    }

    /// `x [T, n·W] → [T, n·W]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.parameters {
            Parameters::Cpu { weight, bias: None } => cpu::rms_norm(x, weight, self.eps),
            Parameters::Cpu { weight, bias: Some(bias) } => cpu::layer_norm(x, weight, bias, self.eps),
            #[cfg(feature = "cuda")]
            Parameters::Cuda { weight, bias: None } => super::cuda::rms_norm(x, weight, self.eps),
            #[cfg(feature = "cuda")]
            Parameters::Cuda { weight, bias: Some(bias) } => super::cuda::layer_norm(x, weight, bias, self.eps),
        }
    }

    /// [`Self::forward`] of `x [T, W]`, and what it multiplied each row with before its weight, `[T]`, where it is an RMS norm on
    /// the CPU: another one of the same epsilon multiplies with the same.
    pub fn forward_telling(&self, x: &Tensor) -> Result<(Tensor, Option<Vec<f32>>)> {
        let Some(weight) = self.as_rms_on_cpu() else { return Ok((self.forward(x)?, None)) };
        let (y, scale_t) = cpu::rms_norm_telling(x, weight, self.eps)?;
        Ok((y, Some(scale_t)))
    }

    /// The weight of an RMS norm on the CPU.
    pub(super) fn as_rms_on_cpu(&self) -> Option<&[f32]> {
        match &self.parameters {
            Parameters::Cpu { weight, bias: None } => Some(weight),
            _ => None,
        }
    }

    /// Bytes the parameters take, in the dtype they are kept in.
    pub fn bytes(&self) -> usize {
        match &self.parameters {
            Parameters::Cpu { weight, bias } => {
                (weight.len() + bias.as_ref().map_or(0, Vec::len)) * DType::F32.size_in_bytes()
            }
            #[cfg(feature = "cuda")]
            Parameters::Cuda { weight, bias } => {
                let elements = weight.elem_count() + bias.as_ref().map_or(0, Tensor::elem_count);
                elements * weight.dtype().size_in_bytes()
            }
        }
    }
}
