//! Paged keys and values, and attention over them.

use super::launch::{Element, Held, Kernel, cuda, for_dtype, launch, packed, tensor};
use crate::ops::{Backend, KvShape, Segment, StepLayout};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, Tensor};

/// As in `kernels/ops.cu`.
const THREADS: u32 = 128;
/// Positions that one block of threads attends to; as in `kernels/ops.cu`.
const SPLIT: usize = 512;
/// As in `kernels/ops.cu`.
const HEAD_DIM_MAX: usize = 256;
/// Bound on the partial results of splits; more tokens take more launches.
const PARTS_BYTES_MAX: usize = 64 << 20;

/// A step's tables on the device, uploaded at once.
#[derive(Debug)]
pub(crate) struct StepTables {
    tokens: usize,
    /// The longest sequence's length after the step.
    positions: usize,
    /// The least number of blocks that a cache with all of the step's blocks has.
    cache_blocks: usize,
    /// Per token: position, slot (block · block_size + offset), start of its sequence's blocks in what follows; then
    /// the blocks of all sequences.
    words: CudaSlice<u32>,
}

impl StepTables {
    /// For `segments`, whose tokens stand at `position_t`.
    pub(crate) fn new(segments: &[Segment], position_t: &[u32], block_size: usize, backend: &Backend) -> Result<Self> {
        let tokens = position_t.len();
        let mut words = Vec::with_capacity(3 * tokens + segments.iter().map(|s| s.blocks.len()).sum::<usize>());
        words.extend_from_slice(position_t);
        let segment_t = || segments.iter().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i, s.len));
        words.extend(position_t.iter().zip(segment_t()).map(|(&position, segment)| {
            let position = position as usize;
            let block = segments[segment].blocks[position / block_size].0;
            block * block_size as u32 + (position % block_size) as u32
        }));
        let starts: Vec<u32> = segments
            .iter()
            .scan(0, |next, s| {
                let start = *next;
                *next += s.blocks.len() as u32;
                Some(start)
            })
            .collect();
        words.extend(segment_t().map(|s| starts[s]));
        words.extend(segments.iter().flat_map(|s| s.blocks.iter().map(|b| b.0)));
        let positions = position_t.iter().max().map_or(0, |&p| p as usize + 1);
        let cache_blocks = segments.iter().flat_map(|s| &s.blocks).max().map_or(0, |b| b.0 as usize + 1);
        Ok(Self { tokens, positions, cache_blocks, words: cuda(backend.device())?.clone_htod(&words)? })
    }

    /// `[T]`
    pub(super) fn position_t(&self) -> CudaView<'_, u32> {
        self.words.slice(..self.tokens)
    }

    fn slot_t(&self) -> CudaView<'_, u32> {
        self.words.slice(self.tokens..2 * self.tokens)
    }

    fn table_t(&self) -> CudaView<'_, u32> {
        self.words.slice(2 * self.tokens..3 * self.tokens)
    }

    fn blocks(&self) -> CudaView<'_, u32> {
        self.words.slice(3 * self.tokens..)
    }
}

/// The tables of a step that was laid out for CUDA.
pub(super) fn tables(step: &StepLayout) -> Result<&StepTables> {
    match &step.cuda {
        Some(tables) => Ok(tables),
        None => candle_core::bail!("a step laid out for the CPU was given to a CUDA kernel"),
    }
}

/// Keys and values of every layer as bytes of `dtype`; see `kernels/ops.cu` for their order.
#[derive(Debug)]
pub(crate) struct KvStore {
    shape: KvShape,
    dtype: DType,
    device: CudaDevice,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    k: CudaSlice<u8>,
    v: CudaSlice<u8>,
}

/// The kernels' `Attention`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Attention {
    first_token: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    window: u32,
    splits: u32,
    scale: f32,
}

// SAFETY: plain words in C's layout, as the kernels declare them.
unsafe impl DeviceRepr for Attention {}

impl KvStore {
    /// All zeros.
    pub(crate) fn new(shape: KvShape, backend: &Backend) -> Result<Self> {
        let rows = shape.blocks * shape.kv_heads * shape.block_size;
        if !shape.head_dim.is_multiple_of(2) || shape.head_dim > HEAD_DIM_MAX || rows > u32::MAX as usize {
            candle_core::bail!(
                "the CUDA KV cache holds heads of an even width up to {HEAD_DIM_MAX} and less than 2^32 rows in a \
                 layer, not {shape:?}"
            );
        }
        let device = cuda(backend.device())?.clone();
        let bytes = rows * shape.head_dim * backend.dtype().size_in_bytes();
        let layers = (0..shape.layers)
            .map(|_| Ok(Layer { k: device.alloc_zeros(bytes)?, v: device.alloc_zeros(bytes)? }))
            .collect::<Result<_>>()?;
        Ok(Self { shape, dtype: backend.dtype(), device, layers })
    }

    /// Copies a block of every layer over another; `from` and `to` differ and are within the cache.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) -> Result<()> {
        let KvShape { kv_heads, head_dim, block_size, .. } = self.shape;
        let len = kv_heads * head_dim * block_size * self.dtype.size_in_bytes();
        let device = &self.device;
        let copy = |data: &mut CudaSlice<u8>| -> Result<()> {
            let (mut low, mut high) = data.split_at_mut(from.max(to) * len);
            let low = low.slice_mut(from.min(to) * len..(from.min(to) + 1) * len);
            let high = high.slice_mut(..len);
            let (source, mut target) = if from < to { (low, high) } else { (high, low) };
            device.memcpy_dtod(&source, &mut target)
        };
        self.layers.iter_mut().try_for_each(|layer| copy(&mut layer.k).and_then(|()| copy(&mut layer.v)))
    }

    /// Writes the step's `k` and `v`, `[T, kv_heads·hd]`, then attends: `q [T, heads·hd] → [T, heads·hd]`, in the
    /// cache's dtype.
    pub(crate) fn attention(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        layer: usize,
        window: Option<usize>,
        step: &StepLayout,
    ) -> Result<Tensor> {
        let tables = tables(step)?;
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let kv_shape = (tables.tokens, kv_heads * head_dim);
        let q_width = q.dims2()?.1;
        if k.dims2()? != kv_shape
            || v.dims2()? != kv_shape
            || q.dim(0)? != tables.tokens
            || !q_width.is_multiple_of(kv_shape.1)
        {
            candle_core::bail!(
                "q {:?}, k {:?} and v {:?} do not fit {} tokens of {kv_heads} KV heads of {head_dim}",
                q.shape(),
                k.shape(),
                v.shape(),
                tables.tokens
            );
        }
        if tables.cache_blocks > self.shape.blocks {
            candle_core::bail!(
                "a KV cache of {} blocks was asked for block {}",
                self.shape.blocks,
                tables.cache_blocks - 1
            );
        }
        let (q, k, v) = (packed(q, self.dtype)?, packed(k, self.dtype)?, packed(v, self.dtype)?);
        for_dtype!(self.dtype, write(self, &k, &v, layer, tables))?;
        for_dtype!(self.dtype, attend(self, &q, layer, window, tables))
    }
}

fn write<E: Element>(store: &mut KvStore, k: &Tensor, v: &Tensor, layer: usize, tables: &StepTables) -> Result<()> {
    let KvShape { kv_heads, head_dim, block_size, .. } = store.shape;
    let (kv_heads, head_dim, block_size) = (kv_heads as u32, head_dim as u32, block_size as u32);
    let (k, v) = (Held::new(k), Held::new(v));
    let slot_t = tables.slot_t();
    let layer = &mut store.layers[layer];
    let kernel = Kernel::new::<E>("kv_write", &store.device)?;
    let mut args = kernel.args();
    args.arg(k.elements::<E>()?).arg(v.elements::<E>()?).arg(&mut layer.k).arg(&mut layer.v);
    args.arg(&slot_t).arg(&kv_heads).arg(&head_dim).arg(&block_size);
    // SAFETY: kv_write(k, v, k_cache, v_cache, slots, unsigned, unsigned, unsigned); k, v and `slot_t` have a row for
    // every block, and the caches, aligned by their allocation, hold elements E in `shape.blocks` blocks.
    unsafe { launch(&mut args, (tables.tokens, 1, 1), THREADS) }
}

fn attend<E: Element>(
    store: &KvStore,
    q: &Tensor,
    layer: usize,
    window: Option<usize>,
    tables: &StepTables,
) -> Result<Tensor> {
    let KvShape { kv_heads, head_dim, block_size, .. } = store.shape;
    let (device, layer) = (&store.device, &store.layers[layer]);
    let heads = q.dims2()?.1 / head_dim;
    let splits = tables.positions.div_ceil(SPLIT);
    // Query heads that share the loads of a KV head.
    let together = (heads / kv_heads).next_power_of_two().min(8);
    let grid_y = kv_heads * (heads / kv_heads).div_ceil(together);

    let rows_per_token = if splits > 1 { heads * splits } else { 0 };
    let part_bytes = rows_per_token * (head_dim + 2) * size_of::<f32>();
    let tokens_max = PARTS_BYTES_MAX.checked_div(part_bytes).unwrap_or(tables.tokens).min(tables.tokens).max(1);
    let part_rows = (tokens_max * rows_per_token).max(1);
    // SAFETY: `attend` writes what `merge_splits` reads.
    let (mut part, mut stats) =
        unsafe { (device.alloc::<f32>(part_rows * head_dim)?, device.alloc::<f32>(part_rows * 2)?) };
    // SAFETY: the kernels write every element.
    let mut out = unsafe { device.alloc::<E>(q.elem_count())? };

    let q_held = Held::new(q);
    let (position_t, table_t, blocks) = (tables.position_t(), tables.table_t(), tables.blocks());
    let attend = Kernel::new::<E>(&format!("attend_g{together}"), device)?;
    let merge = Kernel::new::<E>("merge_splits", device)?;
    for first_token in (0..tables.tokens).step_by(tokens_max) {
        let tokens = tokens_max.min(tables.tokens - first_token);
        let sizes = Attention {
            first_token: first_token as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            window: window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX)),
            splits: splits as u32,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let mut args = attend.args();
        args.arg(q_held.elements::<E>()?).arg(&layer.k).arg(&layer.v).arg(&mut out).arg(&mut part).arg(&mut stats);
        args.arg(&position_t).arg(&table_t).arg(&blocks).arg(&sizes);
        // SAFETY: attend(q, k_cache, v_cache, out, part, stats, positions, tables, blocks, Attention); the caches hold
        // elements E; `part` and `stats`, the latter as pairs, have a row for every token of the launch, head and split.
        unsafe { launch(&mut args, (tokens, grid_y, splits), THREADS)? };
        if splits > 1 {
            let mut args = merge.args();
            args.arg(&part).arg(&stats).arg(&mut out).arg(&sizes);
            // SAFETY: merge_splits(part, stats, out, Attention), with a block for every token of the launch and head.
            unsafe { launch(&mut args, (tokens, heads, 1), THREADS)? };
        }
    }
    Ok(tensor(out, q.shape(), device))
}
