//! Paged keys and values, and attention over them.

use super::isa::multiversion;
use super::{SharedOut, for_each};
use crate::ops::kv::{KvShape, Segment, StepLayout};
use candle_core::DType;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

/// Keys and values: per layer `[blocks, kv_heads, block_size, hd]`, so that one head's keys in a block are contiguous.
#[derive(Debug)]
pub(crate) struct KvStore {
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
    layer_len: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    F32(Pair<f32>),
    Bf16(Pair<bf16>),
    F16(Pair<f16>),
}

#[derive(Debug)]
struct Pair<E> {
    k: Vec<E>,
    v: Vec<E>,
}

impl<E: Copy> Pair<E> {
    fn new(zeros: impl Fn() -> Vec<E>) -> Self {
        Self { k: zeros(), v: zeros() }
    }

    /// Copies the `len` elements from `from` on to `to`.
    fn copy(&mut self, from: usize, to: usize, len: usize) {
        self.k.copy_within(from..from + len, to);
        self.v.copy_within(from..from + len, to);
    }
}

trait Element: Copy + Sync + Sized {
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
    /// [`group_body`] compiled for this processor.
    fn group(query: &Query<'_>, k: &[Self], v: &[Self], q: &[f32], out: &mut [f32]);
}

impl Element for f32 {
    fn narrow(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    fn group(query: &Query<'_>, k: &[Self], v: &[Self], q: &[f32], out: &mut [f32]) {
        group_f32(query, k, v, q, out);
    }
}

impl Element for bf16 {
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn group(query: &Query<'_>, k: &[Self], v: &[Self], q: &[f32], out: &mut [f32]) {
        group_bf16(query, k, v, q, out);
    }
}

impl Element for f16 {
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn group(query: &Query<'_>, k: &[Self], v: &[Self], q: &[f32], out: &mut [f32]) {
        group_f16(query, k, v, q, out);
    }
}

impl KvStore {
    pub(crate) fn new(shape: &KvShape, dtype: DType) -> Self {
        let layer_len = shape.blocks * shape.block_size * shape.kv_heads * shape.head_dim;
        let len = shape.layers * layer_len;
        // As integers, zeros are asked of the system instead of written: a cache takes memory as it fills.
        let bits = || vec![0u16; len];
        let data = match dtype {
            DType::F32 => Data::F32(Pair::new(|| vec![0.0; len])),
            DType::F16 => Data::F16(Pair::new(|| bits().reinterpret_into())),
            _ => Data::Bf16(Pair::new(|| bits().reinterpret_into())),
        };
        let KvShape { block_size, kv_heads, head_dim, .. } = *shape;
        Self { block_size, kv_heads, head_dim, layer_len, data }
    }

    /// Writes `k` and `v`, `[T, kv_heads·hd]`, to the slots of their tokens.
    pub(crate) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], step: &StepLayout) {
        let (start, len) = (layer * self.layer_len, self.layer_len);
        let place = Place { block_size: self.block_size, kv_heads: self.kv_heads, head_dim: self.head_dim };
        match &mut self.data {
            Data::F32(p) => place.write(&mut p.k[start..start + len], &mut p.v[start..start + len], k, v, step),
            Data::Bf16(p) => place.write(&mut p.k[start..start + len], &mut p.v[start..start + len], k, v, step),
            Data::F16(p) => place.write(&mut p.k[start..start + len], &mut p.v[start..start + len], k, v, step),
        }
    }

    /// Copies a block of every layer over another.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) {
        let len = self.kv_heads * self.block_size * self.head_dim;
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

    /// Attention of `q [T, heads·hd]` over what the tokens see.
    pub(crate) fn attend(&self, layer: usize, q: &[f32], step: &StepLayout, window: Option<usize>) -> Vec<f32> {
        let (start, len) = (layer * self.layer_len, self.layer_len);
        let place = Place { block_size: self.block_size, kv_heads: self.kv_heads, head_dim: self.head_dim };
        match &self.data {
            Data::F32(p) => place.attend(&p.k[start..start + len], &p.v[start..start + len], q, step, window),
            Data::Bf16(p) => place.attend(&p.k[start..start + len], &p.v[start..start + len], q, step, window),
            Data::F16(p) => place.attend(&p.k[start..start + len], &p.v[start..start + len], q, step, window),
        }
    }
}

/// Where a head's rows lie in a layer.
#[derive(Clone, Copy)]
struct Place {
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Place {
    /// Offset of KV head `head` at `position` of a sequence.
    #[inline(always)]
    fn of(&self, segment: &Segment, position: usize, head: usize) -> usize {
        let block = segment.blocks[position / self.block_size].0 as usize;
        ((block * self.kv_heads + head) * self.block_size + position % self.block_size) * self.head_dim
    }

    fn write<E: Element>(&self, k_out: &mut [E], v_out: &mut [E], k: &[f32], v: &[f32], step: &StepLayout) {
        let hd = self.head_dim;
        for (t, (&position, &segment)) in step.positions().iter().zip(step.segment_t()).enumerate() {
            let segment = &step.segments()[segment as usize];
            for head in 0..self.kv_heads {
                let (from, to) = ((t * self.kv_heads + head) * hd, self.of(segment, position as usize, head));
                for i in 0..hd {
                    k_out[to + i] = E::narrow(k[from + i]);
                    v_out[to + i] = E::narrow(v[from + i]);
                }
            }
        }
    }

    fn attend<E: Element>(&self, k: &[E], v: &[E], q: &[f32], step: &StepLayout, window: Option<usize>) -> Vec<f32> {
        let tokens = step.tokens();
        let row = q.len() / tokens.max(1);
        let group = row / self.head_dim / self.kv_heads;
        let mut out = vec![0.0; q.len()];
        let shared = SharedOut::new(&mut out);
        let seen: usize = step.positions().iter().map(|&p| window.unwrap_or(usize::MAX).min(p as usize + 1)).sum();
        for_each(tokens * self.kv_heads, 4 * seen * row, |item| {
            let (t, head) = (item / self.kv_heads, item % self.kv_heads);
            let span = group * self.head_dim;
            let at = t * row + head * span;
            // SAFETY: items write the disjoint outputs of their token's query group.
            let out = unsafe { std::slice::from_raw_parts_mut(shared.from(at), span) };
            let position = step.positions()[t] as usize;
            let query = Query {
                place: self,
                segment: &step.segments()[step.segment_t()[t] as usize],
                first: window.map_or(0, |w| (position + 1).saturating_sub(w)),
                position,
                head,
            };
            E::group(&query, k, v, &q[at..at + span], out);
        });
        out
    }
}

/// One token's query heads that share a KV head.
struct Query<'a> {
    place: &'a Place,
    segment: &'a Segment,
    /// First position seen.
    first: usize,
    position: usize,
    head: usize,
}

multiversion!(fn group_f32(query: &Query<'_>, k: &[f32], v: &[f32], q: &[f32], out: &mut [f32]) = group_body);
multiversion!(fn group_bf16(query: &Query<'_>, k: &[bf16], v: &[bf16], q: &[f32], out: &mut [f32]) = group_body);
multiversion!(fn group_f16(query: &Query<'_>, k: &[f16], v: &[f16], q: &[f32], out: &mut [f32]) = group_body);

/// Scores, softmax and weighted sum for each query head of the group, `q` and `out` `[group, hd]`, in f32.
#[inline(always)]
fn group_body<E: Element>(query: &Query<'_>, k: &[E], v: &[E], q: &[f32], out: &mut [f32]) {
    let hd = query.place.head_dim;
    let (heads, seen) = (q.len() / hd, query.position + 1 - query.first);
    let scale = 1.0 / (hd as f32).sqrt();
    let mut scores = vec![0.0f32; heads * seen];
    let mut wide = vec![0.0f32; hd];
    for (i, position) in (query.first..=query.position).enumerate() {
        let at = query.place.of(query.segment, position, query.head);
        wide.iter_mut().zip(&k[at..at + hd]).for_each(|(w, k)| *w = k.widen());
        for h in 0..heads {
            scores[h * seen + i] = dot(&q[h * hd..(h + 1) * hd], &wide) * scale;
        }
    }
    for scores in scores.chunks_exact_mut(seen) {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = (*score - max).exp();
            sum += *score;
        }
        scores.iter_mut().for_each(|s| *s /= sum);
    }
    for (i, position) in (query.first..=query.position).enumerate() {
        let at = query.place.of(query.segment, position, query.head);
        wide.iter_mut().zip(&v[at..at + hd]).for_each(|(w, v)| *w = v.widen());
        for h in 0..heads {
            let p = scores[h * seen + i];
            out[h * hd..(h + 1) * hd].iter_mut().zip(&wide).for_each(|(o, v)| *o += p * v);
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a.zip(b) {
        for i in 0..16 {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}
