//! Projections and embeddings.

use super::{Backend, HostTensor, cpu};
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// `y = x·Wᵀ + b`, with W packed for the backend's kernel.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug)]
enum Weight {
    Cpu(cpu::PackedMatrix),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Dense),
}

impl Linear {
    /// W is `[O, I]`, b is `[O]`.
    pub fn new(weight: &HostTensor, bias: Option<&HostTensor>, backend: &Backend) -> Result<Self> {
        Self::with_packing(weight, bias, backend, &backend.dense_packing())
    }

    /// Like [`Self::new`] in f32 whatever the backend's dtype: for gates, whose choices must not hang on rounding.
    pub fn full_precision(weight: &HostTensor, backend: &Backend) -> Result<Self> {
        Self::with_packing(weight, None, backend, &backend.f32_packing())
    }

    fn with_packing(
        weight: &HostTensor,
        bias: Option<&HostTensor>,
        backend: &Backend,
        packing: &cpu::Packing,
    ) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            let dtype = packing.dtype;
            let bias = bias.map(|b| b.to_tensor(dtype, &backend.device)).transpose()?;
            let weight = Weight::Cuda(super::cuda::Dense::new(weight.to_tensor(dtype, &backend.device)?));
            return Ok(Self { weight, bias });
        }
        let bias = bias.map(|b| b.to_tensor(DType::F32, &backend.device)).transpose()?;
        Ok(Self { weight: Weight::Cpu(cpu::PackedMatrix::pack(weight, packing)), bias })
    }

    /// `x [T, I] → [T, O]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Cpu(w) => {
                let [y] = cpu::linears(x, [(w, self.bias.as_ref())])?;
                Ok(y)
            }
            #[cfg(feature = "cuda")]
            Weight::Cuda(w) => match &self.bias {
                Some(bias) => w.forward(x)?.broadcast_add(bias),
                None => w.forward(x),
            },
        }
    }

    /// What each of several projections makes of `x [T, I]`.
    pub fn forward_all<const N: usize>(of: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        #[cfg(feature = "cuda")]
        if of.iter().any(|linear| matches!(linear.weight, Weight::Cuda(_))) {
            let y: Vec<_> = of.iter().map(|linear| linear.forward(x)).collect::<Result<_>>()?;
            return Ok(y.try_into().expect("one of each projection"));
        }
        let packed = of.map(|linear| match &linear.weight {
            Weight::Cpu(w) => (w, linear.bias.as_ref()),
            #[cfg(feature = "cuda")]
            Weight::Cuda(_) => unreachable!("returned above"),
        });
        cpu::linears(x, packed)
    }

    /// Rows of W: `[rows, I]`. They must be there.
    pub fn rows(&self, rows: &[u32]) -> Result<Tensor> {
        match &self.weight {
            Weight::Cpu(w) => cpu::embed(rows, w),
            #[cfg(feature = "cuda")]
            Weight::Cuda(w) => w.rows(rows),
        }
    }

    /// Bytes the weight takes.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Cpu(w) => w.bytes(),
            #[cfg(feature = "cuda")]
            Weight::Cuda(w) => w.bytes(),
        }
    }
}

/// Embeddings of tokens, rows of a matrix that with tied embeddings is the LM head's, or of learned positions.
#[derive(Debug)]
pub struct Embedding {
    table: Arc<Linear>,
    rows: usize,
}

impl Embedding {
    /// The rows of `table`, which is `[rows, D]`.
    pub fn new(table: Arc<Linear>, rows: usize) -> Self {
        Self { table, rows }
    }

    /// Bytes the table takes.
    pub fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// `ids [T] → [T, D]`.
    ///
    /// # Errors
    /// An id without a row.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            candle_core::bail!("{id} was looked up in a table of {} embeddings", self.rows);
        }
        self.table.rows(ids)
    }
}
