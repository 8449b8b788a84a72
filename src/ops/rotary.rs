//! Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), half-split as Hugging Face lays it out.

use super::{Backend, StepLayout, cpu};
use candle_core::{Result, Tensor};

/// cos and sin of every position, in f32 whatever the dtype: in bf16 they are off by 1 at position 1000.
#[derive(Debug)]
pub struct Rotary {
    head_dim: usize,
    tables: Tables,
}

#[derive(Debug)]
enum Tables {
    Cpu {
        cos: Vec<f32>,
        sin: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    Cuda {
        cos: Tensor,
        sin: Tensor,
    },
}

impl Rotary {
    /// `inv_freq` has head_dim/2 entries; `scale` multiplies cos and sin (YaRN's attention factor, else 1).
    pub fn new(inv_freq: &[f32], scale: f32, positions: usize, backend: &Backend) -> Result<Self> {
        let mut cos = Vec::with_capacity(positions * inv_freq.len());
        let mut sin = Vec::with_capacity(positions * inv_freq.len());
        for position in 0..positions {
            for freq in inv_freq {
                let angle = position as f32 * freq;
                cos.push(angle.cos() * scale);
                sin.push(angle.sin() * scale);
            }
        }
        let head_dim = inv_freq.len() * 2;
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            let table = |t: Vec<f32>| Tensor::from_vec(t, (positions, inv_freq.len()), &backend.device);
            return Ok(Self { head_dim, tables: Tables::Cuda { cos: table(cos)?, sin: table(sin)? } });
        }
        debug_assert!(backend.device.is_cpu());
        Ok(Self { head_dim, tables: Tables::Cpu { cos, sin } })
    }

    /// Rotates every head of `x [T, heads·hd]` by its token's position.
    pub fn forward(&self, x: &Tensor, step: &StepLayout) -> Result<Tensor> {
        match &self.tables {
            Tables::Cpu { cos, sin } => cpu::rotate(x, step.positions(), self.head_dim, (cos, sin)),
            #[cfg(feature = "cuda")]
            Tables::Cuda { cos, sin } => super::cuda::rotate(x, step, self.head_dim, cos, sin),
        }
    }
}
