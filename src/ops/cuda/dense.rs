//! Projections through cuBLAS, and rows of them.

use candle_core::{Result, Tensor};

/// A weight `[O, I]`.
#[derive(Debug)]
pub(crate) struct Dense {
    weight: Tensor,
}

impl Dense {
    pub(crate) fn new(weight: Tensor) -> Self {
        Self { weight }
    }

    /// `x [T, I] → [T, O]`, both in the weight's dtype: gates kept in f32 widen their input and give f32 logits.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.weight.dtype())?.contiguous()?.matmul(&self.weight.t()?)
    }

    /// Rows `ids` of the weight: `[T] → [T, I]`.
    pub(crate) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        self.weight.index_select(&Tensor::new(ids, self.weight.device())?, 0)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }
}
