//! Paged keys and values, and attention over them.

use super::aligned::Aligned;
use super::attention_kernel::{CHUNK, Rows, takes_pairs};
#[cfg(target_arch = "x86_64")]
use super::attention_kernel::{STRIPS, Strips};
use super::isa::{Isa, multiversion};
use super::math::LANES;
use super::rows::{FLOPS_PER_COPY, bf16_bits};
use super::{SharedOut, for_each};
use crate::ops::kv::{KvShape, Segment, StepLayout};
use candle_core::DType;
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use std::cell::RefCell;
use std::ops::Range;

/// Keys and values: per layer, keys are `[blocks, kv_heads, hd, block_size]`, so that the scores of neighbouring
/// positions are computed side by side, and values `[blocks, kv_heads, block_size, hd]`. In pairs, they are
/// `[blocks, kv_heads, hd / 2, block_size, 2]` and `[blocks, kv_heads, block_size / 2, hd, 2]`.
#[derive(Debug)]
pub(crate) struct KvStore {
    place: Place,
    layer_len: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    F32(Pair<f32>),
    Bf16(Pair<u16>),
    F16(Pair<u16>),
}

/// Keys and values, those of 16 bits as these: zeros of integers are asked of the system instead of written, so that a
/// cache takes memory as it fills.
#[derive(Debug)]
struct Pair<W> {
    k: Aligned<W>,
    v: Aligned<W>,
}

impl<W: Copy + Default> Pair<W> {
    fn new(len: usize) -> Self {
        Self { k: Aligned::sparse(len), v: Aligned::sparse(len) }
    }

    /// Keys and values `at` there.
    fn part(&self, at: Range<usize>) -> [&[W]; 2] {
        [&self.k[at.clone()], &self.v[at]]
    }

    fn part_mut(&mut self, at: Range<usize>) -> [&mut [W]; 2] {
        [&mut self.k[at.clone()], &mut self.v[at]]
    }

    /// Copies the `len` elements from `from` on to `to`.
    fn copy(&mut self, from: usize, to: usize, len: usize) {
        self.k.copy_within(from..from + len, to);
        self.v.copy_within(from..from + len, to);
    }
}

trait Element: Copy + Send + Sync + Sized {
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
    /// [`narrow_body`] compiled for this processor.
    fn narrow_all(x: &[f32], to: &mut [Self]);
    /// [`widen_body`] compiled for this processor.
    fn widen_runs(runs: &Runs<'_, Self>, to: &mut [f32]);
}

impl Element for f32 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    fn narrow_all(x: &[f32], to: &mut [Self]) {
        narrow_f32(x, to);
    }
    fn widen_runs(runs: &Runs<'_, Self>, to: &mut [f32]) {
        widen_f32(runs, to);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_bits(bf16_bits(x))
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn narrow_all(x: &[f32], to: &mut [Self]) {
        narrow_bf16(x, to);
    }
    fn widen_runs(runs: &Runs<'_, Self>, to: &mut [f32]) {
        widen_bf16(runs, to);
    }
}

impl Element for f16 {
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
    /// As [`f16::to_f32`], which asks for the processor at every number and so is not vectorised.
    #[inline(always)]
    fn widen(self) -> f32 {
        const SMALLEST: u32 = 113 << 23;
        let bits = u32::from(self.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
        let subnormal = f32::from_bits(magnitude + SMALLEST) - f32::from_bits(SMALLEST);
        let magnitude = match magnitude >> 23 {
            0 => subnormal.to_bits(),
            31 => magnitude + (224 << 23),
            _ => magnitude + (112 << 23),
        };
        f32::from_bits(sign | magnitude)
    }
    fn narrow_all(x: &[f32], to: &mut [Self]) {
        narrow_f16(x, to);
    }
    fn widen_runs(runs: &Runs<'_, Self>, to: &mut [f32]) {
        widen_f16(runs, to);
    }
}

/// `count` runs of `len` elements, one every `stride`.
struct Runs<'a, E> {
    from: &'a [E],
    stride: usize,
    to_stride: usize,
    len: usize,
    count: usize,
}

multiversion!(fn narrow_f32(x: &[f32], to: &mut [f32]) = narrow_body);
multiversion!(fn narrow_bf16(x: &[f32], to: &mut [bf16]) = narrow_body);
multiversion!(fn narrow_f16(x: &[f32], to: &mut [f16]) = narrow_body);

#[inline(always)]
fn narrow_body<E: Element>(x: &[f32], to: &mut [E]) {
    x.iter().zip(to).for_each(|(x, to)| *to = E::narrow(*x));
}

multiversion!(fn widen_f32(runs: &Runs<'_, f32>, to: &mut [f32]) = widen_body);
multiversion!(fn widen_bf16(runs: &Runs<'_, bf16>, to: &mut [f32]) = widen_body);
multiversion!(fn widen_f16(runs: &Runs<'_, f16>, to: &mut [f32]) = widen_body);

/// Widens `runs` to runs one every `to_stride`.
#[inline(always)]
fn widen_body<E: Element>(runs: &Runs<'_, E>, to: &mut [f32]) {
    for run in 0..runs.count {
        let (from, from_rest) = runs.from[run * runs.stride..][..runs.len].as_chunks::<16>();
        let (to, to_rest) = to[run * runs.to_stride..][..runs.len].as_chunks_mut::<16>();
        for (to, from) in to.iter_mut().zip(from) {
            for i in 0..16 {
                to[i] = from[i].widen();
            }
        }
        for (to, from) in to_rest.iter_mut().zip(from_rest) {
            *to = from.widen();
        }
    }
}

impl KvStore {
    pub(crate) fn new(shape: &KvShape, dtype: DType) -> Self {
        Self::new_for(Isa::get(), shape, dtype)
    }

    /// For the kernels of `isa`, and none other.
    pub(super) fn new_for(isa: Isa, shape: &KvShape, dtype: DType) -> Self {
        let layer_len = shape.blocks * shape.block_size * shape.kv_heads * shape.head_dim;
        let len = shape.layers * layer_len;
        let data = match dtype {
            DType::F32 => Data::F32(Pair::new(len)),
            DType::F16 => Data::F16(Pair::new(len)),
            _ => Data::Bf16(Pair::new(len)),
        };
        let KvShape { block_size, kv_heads, head_dim, .. } = *shape;
        let pairs = matches!(data, Data::Bf16(_)) && takes_pairs(isa, head_dim, block_size);
        Self { place: Place { block_size, kv_heads, head_dim, pairs }, layer_len, data }
    }

    /// Writes `k` and `v`, `[T, kv_heads·hd]`, to the slots of their tokens.
    pub(crate) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], step: &StepLayout) {
        let (at, place) = (layer * self.layer_len..(layer + 1) * self.layer_len, self.place);
        match &mut self.data {
            Data::F32(p) => place.write(p.part_mut(at), k, v, step),
            Data::Bf16(p) => place.write(p.part_mut(at).map(|x| x.reinterpret_cast_mut::<bf16>()), k, v, step),
            Data::F16(p) => place.write(p.part_mut(at).map(|x| x.reinterpret_cast_mut::<f16>()), k, v, step),
        }
    }

    /// Copies a block of every layer over another.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) {
        let len = self.place.kv_heads * self.place.block_len();
        let layers = match &self.data {
            Data::F32(p) => p.k.len(),
            Data::Bf16(p) => p.k.len(),
            Data::F16(p) => p.k.len(),
        } / self.layer_len;
        for start in (0..layers).map(|layer| layer * self.layer_len) {
            let (from, to) = (start + from * len, start + to * len);
            match &mut self.data {
                Data::F32(p) => p.copy(from, to, len),
                Data::Bf16(p) => p.copy(from, to, len),
                Data::F16(p) => p.copy(from, to, len),
            }
        }
    }

    /// Attention of `q [T, heads·hd]` over what the tokens see; `entropy_t` as in [`crate::ops::attention`].
    pub(crate) fn attend(
        &self,
        layer: usize,
        q: &[f32],
        step: &StepLayout,
        window: Option<usize>,
        entropy_t: Option<&mut Vec<f32>>,
    ) -> Vec<f32> {
        self.attend_on(Isa::get(), layer, q, step, window, entropy_t)
    }

    /// [`Self::attend`] with the kernels of `isa`, which this processor must have.
    pub(super) fn attend_on(
        &self,
        isa: Isa,
        layer: usize,
        q: &[f32],
        step: &StepLayout,
        window: Option<usize>,
        entropy_t: Option<&mut Vec<f32>>,
    ) -> Vec<f32> {
        let (at, place) = (layer * self.layer_len..(layer + 1) * self.layer_len, self.place);
        let heads = q.len() / step.tokens().max(1) / place.head_dim;
        let mut out = vec![0.0; q.len()];
        let mut entropy_th = entropy_t.as_ref().map(|_| vec![0.0; step.tokens() * heads]);
        let call = Call { isa, place, q, step, window, group: heads / place.kv_heads };
        let results =
            Results { out: SharedOut::new(&mut out), entropy_th: entropy_th.as_deref_mut().map(SharedOut::new) };
        match &self.data {
            Data::F32(p) => call.attend(p.part(at), results),
            #[cfg(target_arch = "x86_64")]
            Data::Bf16(p) if place.pairs => call.attend_pairs(p.part(at), results),
            Data::Bf16(p) => call.attend(p.part(at).map(|x| x.reinterpret_cast::<bf16>()), results),
            Data::F16(p) => call.attend(p.part(at).map(|x| x.reinterpret_cast::<f16>()), results),
        }
        if let (Some(entropy_t), Some(entropy_th)) = (entropy_t, entropy_th) {
            entropy_t.clear();
            entropy_t.extend((0..step.tokens()).map(|t| mean(&entropy_th[t * heads..(t + 1) * heads])));
        }
        out
    }
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len() as f32
}

/// Dimensions of a head that are narrowed at a time.
const DIMS: usize = 64;

/// Where a head's rows lie in a layer.
#[derive(Clone, Copy, Debug)]
struct Place {
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Whether neighbouring dimensions of keys and positions of values lie in pairs.
    pairs: bool,
}

impl Place {
    /// Offset of what KV head `head` has in the block of `position`.
    fn block(&self, segment: &Segment, position: usize, head: usize) -> usize {
        let block = segment.blocks[position / self.block_size].0 as usize;
        (block * self.kv_heads + head) * self.block_len()
    }

    /// Elements that a head has in a block.
    fn block_len(&self) -> usize {
        self.block_size * self.head_dim
    }

    fn write<E: Element>(&self, [k_out, v_out]: [&mut [E]; 2], k: &[f32], v: &[f32], step: &StepLayout) {
        let (hd, row) = (self.head_dim, self.kv_heads * self.head_dim);
        // Blocks that are written, each with the first of its tokens.
        let mut parts = Vec::new();
        let mut t = 0;
        for segment in step.segments() {
            for part in self.by_block(segment.start..segment.start + segment.len) {
                let len = part.len();
                parts.push((segment, part, t));
                t += len;
            }
        }
        let mut written: Vec<_> = parts.iter().map(|(segment, part, _)| self.block(segment, part.start, 0)).collect();
        written.sort_unstable();
        assert!(
            written.windows(2).all(|pair| pair[0] < pair[1]),
            "a block of the KV cache is written for two sequences"
        );
        let (k_out, v_out) = (SharedOut::new(k_out), SharedOut::new(v_out));
        for_each(parts.len(), 2 * t * row * FLOPS_PER_COPY, |item| {
            let (segment, part, t) = &parts[item];
            for head in 0..self.kv_heads {
                let block = self.block(segment, part.start, head);
                // SAFETY: items have different blocks.
                let [k_out, v_out] = [k_out, v_out]
                    .map(|out| unsafe { std::slice::from_raw_parts_mut(out.from(block), self.block_len()) });
                for (i, slot) in (part.start % self.block_size..).take(part.len()).enumerate() {
                    let at = (t + i) * row + head * hd;
                    for start in (0..hd).step_by(DIMS) {
                        let dims = start..hd.min(start + DIMS);
                        let mut narrowed = [[E::narrow(0.0); DIMS]; 2];
                        let [k, v] = [k, v].map(|x| &x[at + dims.start..at + dims.end]);
                        E::narrow_all(k, &mut narrowed[0]);
                        E::narrow_all(v, &mut narrowed[1]);
                        let [k, v] = narrowed.each_ref().map(|x| &x[..dims.len()]);
                        if self.pairs {
                            let to = &mut k_out.as_chunks_mut::<2>().0[start / 2 * self.block_size + slot..];
                            let to = to.iter_mut().step_by(self.block_size);
                            to.zip(k.as_chunks::<2>().0).for_each(|(to, k)| *to = *k);
                            let to = v_out[slot / 2 * 2 * hd..].as_chunks_mut::<2>().0[dims].iter_mut();
                            to.zip(v).for_each(|(to, v)| to[slot % 2] = *v);
                        } else {
                            let to = k_out[start * self.block_size + slot..].iter_mut().step_by(self.block_size);
                            to.zip(k).for_each(|(to, k)| *to = *k);
                            v_out[slot * hd..][dims].copy_from_slice(v);
                        }
                    }
                }
            }
        });
    }

    /// Cuts `positions` at the edges of blocks.
    fn by_block(&self, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let size = self.block_size;
        (positions.start / size..positions.end.div_ceil(size))
            .map(move |block| positions.start.max(block * size)..positions.end.min((block + 1) * size))
    }

    /// Widens the keys at `positions`, all in one chunk, to `[hd, CHUNK]`, and with them what else their blocks hold of
    /// the chunk: whole runs are quicker.
    fn keys<E: Element>(&self, k: &[E], segment: &Segment, head: usize, positions: Range<usize>, to: &mut [f32]) {
        let start = positions.start / CHUNK * CHUNK;
        let blocks =
            positions.start / self.block_size * self.block_size..positions.end.next_multiple_of(self.block_size);
        for part in self.by_block(blocks.start.max(start)..blocks.end.min(start + CHUNK)) {
            let from = &k[self.block(segment, part.start, head) + part.start % self.block_size..];
            let runs = Runs { from, stride: self.block_size, to_stride: CHUNK, len: part.len(), count: self.head_dim };
            E::widen_runs(&runs, &mut to[part.start - start..]);
        }
    }

    /// Where the strips of the chunk are that hold `positions`.
    #[cfg(target_arch = "x86_64")]
    fn strips(&self, [k, v]: [&[u16]; 2], segment: &Segment, head: usize, positions: Range<usize>) -> Strips {
        let nowhere = [std::ptr::null(); STRIPS];
        let mut strips = Strips { keys: nowhere, key_stride: self.block_size, values: nowhere };
        for start in (positions.start / LANES * LANES..positions.end).step_by(LANES) {
            let (block, slot) = (self.block(segment, start, head), start % self.block_size);
            let strip = start % CHUNK / LANES;
            strips.keys[strip] = k[block..][..self.block_len()][2 * slot..].as_ptr().cast();
            strips.values[strip] = v[block..][..self.block_len()][slot * self.head_dim..].as_ptr().cast();
        }
        strips
    }

    /// Widens the values at `positions`, all in one chunk, to `[CHUNK, width]`.
    fn values<E: Element>(
        &self,
        v: &[E],
        segment: &Segment,
        head: usize,
        positions: Range<usize>,
        width: usize,
        to: &mut [f32],
    ) {
        let hd = self.head_dim;
        let start = positions.start / CHUNK * CHUNK;
        for part in self.by_block(positions) {
            let from = &v[self.block(segment, part.start, head) + part.start % self.block_size * hd..];
            let runs = Runs { from, stride: hd, to_stride: width, len: hd, count: part.len() };
            E::widen_runs(&runs, &mut to[(part.start - start) * width..]);
        }
    }
}

/// Query rows of a tile: enough to share the widening of keys and values, few enough to stay in cache.
const TILE_ROWS: usize = 96;

/// Consecutive tokens of a segment, whose queries are worked on together.
struct Tile<'a> {
    segment: &'a Segment,
    /// Row of the first token in the step.
    t: usize,
    /// Its position.
    position: usize,
    len: usize,
}

/// One call of [`KvStore::attend`].
struct Call<'a> {
    isa: Isa,
    place: Place,
    q: &'a [f32],
    step: &'a StepLayout,
    window: Option<usize>,
    /// Query heads per KV head.
    group: usize,
}

/// What a thread works on a tile in.
#[derive(Default)]
struct Scratch {
    softmax: Rows,
    /// Keys, then values, of a chunk.
    wide: Vec<f32>,
}

thread_local! {
    /// Kept from tile to tile: a token that is decoded has as many of them as KV heads, in every layer.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What the work items of a call write.
#[derive(Clone, Copy)]
struct Results {
    /// `[T, heads·hd]`
    out: SharedOut,
    /// Entropy of every head's weights, `[T, heads]`, where it is asked for.
    entropy_th: Option<SharedOut>,
}

/// Takes in a chunk for the rows of a tile.
trait Chunk: Fn(&Tile<'_>, usize, Range<usize>, &mut Scratch) + Sync + Send {}

impl<F: Fn(&Tile<'_>, usize, Range<usize>, &mut Scratch) + Sync + Send> Chunk for F {}

impl Call<'_> {
    fn attend<E: Element>(&self, [k, v]: [&[E]; 2], results: Results) {
        let place = self.place;
        self.attend_by(results, |tile, head, positions, Scratch { softmax, wide }| {
            wide.resize(CHUNK * softmax.width(), 0.0);
            place.keys(k, tile.segment, head, positions.clone(), wide);
            softmax.score(self.isa, positions.start / CHUNK * CHUNK, &wide[..CHUNK * place.head_dim]);
            place.values(v, tile.segment, head, positions, softmax.width(), wide);
            softmax.weigh(self.isa, wide);
        });
    }

    #[cfg(target_arch = "x86_64")]
    fn attend_pairs(&self, layer: [&[u16]; 2], results: Results) {
        self.attend_by(results, |tile, head, positions, Scratch { softmax, .. }| {
            let strips = self.place.strips(layer, tile.segment, head, positions.clone());
            // SAFETY: rows see nothing of the chunk but these positions.
            unsafe { softmax.attend_pairs(positions.start / CHUNK * CHUNK, &strips) };
        });
    }

    /// Has `chunk` take in what the tiles see, with a KV head and positions of one chunk.
    fn attend_by(&self, results: Results, chunk: impl Chunk) {
        let (tiles, kv_heads) = (self.tiles(), self.place.kv_heads);
        let row = self.group * kv_heads * self.place.head_dim;
        let seen: usize = self.step.positions().iter().map(|&p| self.seen(p as usize).len()).sum();
        for_each(tiles.len() * kv_heads, 4 * seen * row, |item| {
            SCRATCH.with_borrow_mut(|scratch| {
                self.attend_tile(&tiles[item / kv_heads], item % kv_heads, results, scratch, &chunk);
            });
        });
    }

    fn tiles(&self) -> Vec<Tile<'_>> {
        let size = (TILE_ROWS / self.group.max(1)).max(1);
        let mut tiles = Vec::new();
        let mut t = 0;
        for segment in self.step.segments() {
            for offset in (0..segment.len).step_by(size) {
                let len = size.min(segment.len - offset);
                tiles.push(Tile { segment, t: t + offset, position: segment.start + offset, len });
            }
            t += segment.len;
        }
        tiles
    }

    /// The positions that the token at `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
    }

    /// Writes the outputs of the query heads that share KV head `head`.
    fn attend_tile(&self, tile: &Tile<'_>, head: usize, results: Results, scratch: &mut Scratch, chunk: &impl Chunk) {
        let Self { place, group, .. } = *self;
        let hd = place.head_dim;
        let query = |row: usize| ((tile.t + row / group) * place.kv_heads + head) * group + row % group;
        let rows = tile.len * group;
        let seen = (0..rows).map(|row| self.seen(tile.position + row / group));
        scratch.softmax.start(hd, seen, results.entropy_th.is_some(), place.pairs);
        for row in 0..rows {
            scratch.softmax.set_query(row, &self.q[query(row) * hd..(query(row) + 1) * hd]);
        }
        let (first, end) = (self.seen(tile.position).start, tile.position + tile.len);
        for start in (first / CHUNK * CHUNK..end).step_by(CHUNK) {
            chunk(tile, head, first.max(start)..end.min(start + CHUNK), scratch);
        }
        let softmax = &scratch.softmax;
        for row in 0..rows {
            // SAFETY: items write the disjoint outputs of their tokens' query groups.
            softmax.finish(row, unsafe { std::slice::from_raw_parts_mut(results.out.from(query(row) * hd), hd) });
            if let Some(entropy_th) = results.entropy_th {
                // SAFETY: as above, with one element per query.
                unsafe { *entropy_th.from(query(row)) = softmax.entropy(row) };
            }
        }
    }
}
