//! The paged KV cache and attention over it.

use super::{Backend, cpu};
use crate::types::BlockId;
use candle_core::{DType, Result, Tensor};

/// Sizes of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one block, keys and values of all layers, in `dtype`.
    pub fn block_bytes(&self, dtype: DType) -> usize {
        2 * self.layers * self.block_size * self.kv_heads * self.head_dim * dtype.size_in_bytes()
    }
}

/// Keys and values of every layer, in blocks that sequences hold by number.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Cpu(cpu::KvStore),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::KvStore),
}

impl KvCache {
    /// Allocates `shape` in the backend's dtype.
    pub fn new(shape: KvShape, backend: &Backend) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if backend.device.is_cuda() {
            return Ok(Self { shape, inner: Inner::Cuda(super::cuda::KvStore::new(shape, backend)?) });
        }
        Ok(Self { shape, inner: Inner::Cpu(cpu::KvStore::new(&shape, backend.dtype())) })
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Copies keys and values of all layers from block to block, one pair after the other: (from, to).
    ///
    /// # Errors
    /// A block that there is not, or one copied to itself.
    pub fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<()> {
        for (from, to) in copies {
            if from == to || from.0.max(to.0) as usize >= self.shape.blocks {
                candle_core::bail!("KV block {} cannot be copied to {} of {}", from.0, to.0, self.shape.blocks);
            }
            match &mut self.inner {
                Inner::Cpu(store) => store.copy_block(from.0 as usize, to.0 as usize),
                #[cfg(feature = "cuda")]
                Inner::Cuda(store) => store.copy_block(from.0 as usize, to.0 as usize)?,
            }
        }
        Ok(())
    }
}

/// The tokens of one sequence in a step: consecutive positions, consecutive rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Position of the first token in its sequence.
    pub start: usize,
    pub len: usize,
    /// Blocks of the sequence, enough for `start + len` positions.
    pub blocks: Vec<BlockId>,
}

/// Where every token of a step stands: positions, KV slots, and whose keys it sees.
#[derive(Debug)]
pub struct StepLayout {
    segments: Vec<Segment>,
    position_t: Vec<u32>,
    #[cfg(feature = "cuda")]
    pub(super) cuda: Option<super::cuda::StepTables>,
}

impl StepLayout {
    /// Lays out `segments`, in order, over the rows of the step.
    pub fn new(segments: Vec<Segment>, kv: &KvCache, backend: &Backend) -> Result<Self> {
        let mut position_t = Vec::new();
        for segment in &segments {
            if segment.blocks.len() * kv.shape.block_size < segment.start + segment.len {
                candle_core::bail!(
                    "a segment of {} positions has {} KV blocks",
                    segment.start + segment.len,
                    segment.blocks.len()
                );
            }
            if let Some(block) = segment.blocks.iter().find(|b| b.0 as usize >= kv.shape.blocks) {
                candle_core::bail!("KV block {} was given, but there are {}", block.0, kv.shape.blocks);
            }
            position_t.extend((segment.start..segment.start + segment.len).map(|p| p as u32));
        }
        debug_assert!(backend.device.is_cpu() || cfg!(feature = "cuda"));
        #[cfg(feature = "cuda")]
        let cuda = backend
            .device
            .is_cuda()
            .then(|| super::cuda::StepTables::new(&segments, &position_t, kv.shape.block_size, backend))
            .transpose()?;
        Ok(Self {
            segments,
            position_t,
            #[cfg(feature = "cuda")]
            cuda,
        })
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.position_t.len()
    }

    /// Position of every token in its sequence, `[T]`.
    pub fn positions(&self) -> &[u32] {
        &self.position_t
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// Writes this step's keys and values into `layer` of the cache, then lets every query see its sequence up to
/// itself, at most `window` keys back (the own one included).
///
/// `q [T, heads·hd]`, `k` and `v [T, kv_heads·hd]` → `[T, heads·hd]`; scores are scaled by 1/√hd. `entropy_t`, where
/// given, becomes `[T]`: the entropy in nats of the weights that a token gives to the positions it sees, the mean over
/// its query heads. Asking changes no bit of the result.
///
/// # Errors
/// Tensors of a wrong kind, a failure of the device, or entropies asked of CUDA, which computes none.
pub fn attention(
    [q, k, v]: [&Tensor; 3],
    layer: usize,
    window: Option<usize>,
    kv: &mut KvCache,
    step: &StepLayout,
    entropy_t: Option<&mut Vec<f32>>,
) -> Result<Tensor> {
    match &mut kv.inner {
        Inner::Cpu(store) => {
            cpu::with_f32(k, |k| cpu::with_f32(v, |v| store.write(layer, k, v, step)))??;
            let out = cpu::with_f32(q, |q| store.attend(layer, q, step, window, entropy_t))?;
            Tensor::from_vec(out, q.shape(), q.device())
        }
        #[cfg(feature = "cuda")]
        Inner::Cuda(store) => {
            if entropy_t.is_some() {
                candle_core::bail!(
                    "attention entropy is computed on the CPU alone; on CUDA choose a router that does not read it"
                );
            }
            store.attention(q, k, v, layer, window, step)
        }
    }
}
