//! Causal self-attention on fused projections.

use super::{Precision, gradient, output, slice, with2};
use crate::ops::cpu::train::attention as kernel;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};
use std::sync::Arc;

pub use kernel::AttentionShape;

/// Cosines and sines of every position, `[S, head_dim / 2]` each (Su et al., arXiv 2104.09864).
#[derive(Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// For `positions` positions and base `theta`.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64);
        let angles = (0..positions).flat_map(|p| (0..head_dim / 2).map(move |i| p as f64 * frequency(i)));
        let (sin, cos) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        Self { cos, sin }
    }

    fn view(&self) -> kernel::RopeTable<'_> {
        kernel::RopeTable { cos: &self.cos, sin: &self.sin }
    }
}

/// Every token's softmax attention over its sequence up to itself, scale `1/√head_dim`: rows of
/// `qkv [T, (heads + 2·kv_heads)·head_dim]` are queries, keys, values → `[T, heads·head_dim]`. With `rope`, queries and
/// keys are rotated by position, halves against each other.
///
/// # Errors
/// A failure of the device.
pub fn attention(
    qkv: &Tensor,
    shape: AttentionShape,
    rope: Option<&Arc<RopeTable>>,
    precision: Precision,
) -> Result<Tensor> {
    if !qkv.device().is_cpu() {
        return attention_composed(qkv, shape, rope, precision);
    }
    qkv.contiguous()?.apply_op1(Attention { shape, rope: rope.cloned(), precision })
}

pub(super) fn attention_composed(
    qkv: &Tensor,
    shape: AttentionShape,
    rope: Option<&Arc<RopeTable>>,
    precision: Precision,
) -> Result<Tensor> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let rounded = |x: &Tensor| match precision {
        Precision::F32 => Ok(x.clone()),
        Precision::Bf16 => x.to_dtype(DType::BF16),
    };
    // [B, heads, S, hd] out of columns `start..` of the projection.
    let part = |start: usize, count: usize| {
        let x = qkv.narrow(1, start * head_dim, count * head_dim)?;
        x.reshape((batch, seq, count, head_dim))?.transpose(1, 2)?.contiguous()
    };
    let (mut q, mut k, v) = (part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?);
    if let Some(rope) = rope {
        let table = |values: &[f32]| {
            let half = head_dim / 2;
            Tensor::from_slice(&values[..seq * half], (seq, half), qkv.device())
        };
        let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
        q = candle_nn::rotary_emb::rope_slow(&q, &cos, &sin)?;
        k = candle_nn::rotary_emb::rope_slow(&k, &cos, &sin)?;
    }
    // Every head of keys and values serves heads / kv_heads heads of queries.
    let shared = |x: Tensor| {
        let group = heads / kv_heads;
        let x = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, seq, head_dim))?;
        x.reshape((batch, heads, seq, head_dim))
    };
    let (k, v) = (shared(k)?, shared(v)?);
    let scores = rounded(&q)?.matmul(&rounded(&k)?.t()?.contiguous()?)?.to_dtype(DType::F32)?;
    let scores = (scores * (1.0 / (head_dim as f64).sqrt()))?;
    let mask: Vec<f32> =
        (0..seq).flat_map(|i| (0..seq).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
    let mask = Tensor::from_vec(mask, (seq, seq), qkv.device())?;
    let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    let out = rounded(&p)?.matmul(&rounded(&v)?)?.to_dtype(DType::F32)?;
    out.transpose(1, 2)?.reshape((batch * seq, heads * head_dim))
}

struct Attention {
    shape: AttentionShape,
    rope: Option<Arc<RopeTable>>,
    precision: Precision,
}

impl Attention {
    fn rope(&self) -> Option<kernel::RopeTable<'_>> {
        self.rope.as_deref().map(RopeTable::view)
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = kernel::attention(slice(storage, layout)?, self.shape, self.rope(), self.precision);
        output(out, (layout.dims()[0], self.shape.out_width()))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let d_out = d_out.contiguous()?;
        let d_qkv = with2(qkv, &d_out, |qkv, d_out| {
            kernel::attention_backward(qkv, d_out, self.shape, self.rope(), self.precision)
        })?;
        gradient(d_qkv, qkv)
    }
}
