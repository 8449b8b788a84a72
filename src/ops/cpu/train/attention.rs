//! Causal self-attention of whole sequences on a fused projection, with rotary embedding inside.
//!
//! Legend: B sequences of S tokens, T = B·S; H query heads and KV key-value heads of hd columns. A row of `qkv
//! [T, (H + 2·KV)·hd]` holds the query heads, then the keys', then the values'. Query head h reads key-value head
//! `h / (H/KV)`.
//!
//! A work item is a sequence and one of its key-value heads, so that the gradients of its keys and values are
//! summed by one thread. Blocks of query rows meet the keys they see, about half of S² scores in all. Backward
//! computes the probabilities again and needs nothing from forward.

use super::super::gemm::{Matrix, Precision, Product, Scratch, product_here};
use super::super::isa::multiversion;
use super::super::math::{self, LANES};
use super::super::{SharedOut, for_each};
use std::cell::RefCell;

/// Query rows of a block.
const BLOCK: usize = 64;

/// Shape of a fused projection.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// B
    pub batch: usize,
    /// S
    pub seq: usize,
    /// H, a multiple of KV.
    pub heads: usize,
    /// KV
    pub kv_heads: usize,
    /// hd; even with rotary embedding.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Columns of the projection.
    pub(crate) fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the result.
    pub(crate) fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// FLOPs of one product of scores' size, for all heads.
    fn flops(&self) -> usize {
        self.tokens() * self.seq * self.out_width()
    }
}

/// Cosines and sines of the rotary embedding, `[S, hd/2]` each. Column i is turned with column `i + hd/2`, as in
/// Hugging Face's Llama.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeTable<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

/// `softmax(q·kᵀ/√hd)·v` of every head, each position seeing itself and those before it: `[T, H·hd]`.
pub(crate) fn attention(
    qkv: &[f32],
    shape: AttentionShape,
    rope: Option<RopeTable<'_>>,
    precision: Precision,
) -> Vec<f32> {
    let mut out = vec![0.0; shape.tokens() * shape.out_width()];
    let shared = SharedOut::new(&mut out);
    let call = Call::new(qkv, shape, rope, precision);
    for_each(shape.batch * shape.kv_heads, 2 * shape.flops(), |item| {
        WORKSPACE.with_borrow_mut(|work| call.item(item).forward(work, shared));
    });
    out
}

/// The gradient of `qkv` from that of [`attention`]'s result, `d_out [T, H·hd]`.
pub(crate) fn attention_backward(
    qkv: &[f32],
    d_out: &[f32],
    shape: AttentionShape,
    rope: Option<RopeTable<'_>>,
    precision: Precision,
) -> Vec<f32> {
    assert_eq!(d_out.len(), shape.tokens() * shape.out_width());
    let mut d_qkv = vec![0.0; qkv.len()];
    let shared = SharedOut::new(&mut d_qkv);
    let call = Call::new(qkv, shape, rope, precision);
    for_each(shape.batch * shape.kv_heads, 5 * shape.flops(), |item| {
        WORKSPACE.with_borrow_mut(|work| call.item(item).backward(d_out, work, shared));
    });
    d_qkv
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Buffers of a work item, kept for the thread's next.
#[derive(Default)]
struct Workspace {
    gemm: Scratch,
    /// `[S, hd]`, turned.
    keys: Vec<f32>,
    /// `[BLOCK, hd]`, turned and scaled.
    queries: Vec<f32>,
    /// Scores of a block, then weights: `[BLOCK, Block::stride]`.
    weights: Vec<f32>,
    /// Gradients of the weights, then of the scores.
    d_scores: Vec<f32>,
    /// Sums of the rows' weights, `[BLOCK]`.
    sums: Vec<f32>,
    /// A block of the result, or of the queries' gradient: `[BLOCK, hd]`.
    block: Vec<f32>,
    /// `[S, hd]`
    d_keys: Vec<f32>,
    d_values: Vec<f32>,
}

impl Workspace {
    fn reserve(&mut self, shape: AttentionShape) {
        let stride = shape.seq.next_multiple_of(LANES);
        self.keys.resize(shape.seq * shape.head_dim, 0.0);
        self.queries.resize(BLOCK * shape.head_dim, 0.0);
        self.block.resize(BLOCK * shape.head_dim, 0.0);
        self.weights.resize(BLOCK * stride, 0.0);
        self.sums.resize(BLOCK, 0.0);
    }

    fn reserve_backward(&mut self, shape: AttentionShape) {
        self.reserve(shape);
        self.d_scores.resize(self.weights.len(), 0.0);
        for gradient in [&mut self.d_keys, &mut self.d_values] {
            gradient.clear();
            gradient.resize(shape.seq * shape.head_dim, 0.0);
        }
    }
}

/// Query rows and the keys they see.
#[derive(Clone, Copy)]
struct Block {
    /// Position of the first row.
    first: usize,
    rows: usize,
    /// Positions that some row sees.
    seen: usize,
    /// From one row of scores to the next: whole lanes.
    stride: usize,
}

impl Block {
    fn all(seq: usize) -> impl Iterator<Item = Self> {
        (0..seq).step_by(BLOCK).map(move |first| {
            let seen = seq.min(first + BLOCK);
            Self { first, rows: seen - first, seen, stride: seen.next_multiple_of(LANES) }
        })
    }
}

/// What all work items share.
struct Call<'a> {
    qkv: &'a [f32],
    shape: AttentionShape,
    rope: Option<RopeTable<'a>>,
    precision: Precision,
}

impl<'a> Call<'a> {
    fn new(qkv: &'a [f32], shape: AttentionShape, rope: Option<RopeTable<'a>>, precision: Precision) -> Self {
        assert_eq!(qkv.len(), shape.tokens() * shape.qkv_width());
        assert_eq!(shape.heads % shape.kv_heads, 0);
        Self { qkv, shape, rope, precision }
    }

    fn item(&'a self, item: usize) -> Item<'a> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let kv = item % kv_heads;
        Item {
            call: self,
            token: item / kv_heads * self.shape.seq,
            heads: kv * (heads / kv_heads)..(kv + 1) * (heads / kv_heads),
            key_column: (heads + kv) * head_dim,
            value_column: (heads + kv_heads + kv) * head_dim,
        }
    }
}

/// A sequence and one of its key-value heads.
struct Item<'a> {
    call: &'a Call<'a>,
    /// First token of the sequence.
    token: usize,
    /// Query heads that read the key-value head.
    heads: std::ops::Range<usize>,
    key_column: usize,
    value_column: usize,
}

impl Item<'_> {
    fn forward(&self, work: &mut Workspace, out: SharedOut) {
        let Call { shape, precision, .. } = *self.call;
        let head_dim = shape.head_dim;
        work.reserve(shape);
        self.load_keys(work);
        for head in self.heads.clone() {
            for block in Block::all(shape.seq) {
                self.weigh(head, block, work);
                let weights = Matrix::new(&work.weights, block.rows, block.seen).strided(block.stride);
                let mut sum = Product::new(weights, self.values(block.seen), &mut work.block);
                product_here(&mut sum, precision, &mut work.gemm);
                for (row, sum) in work.block.chunks_exact_mut(head_dim).zip(&work.sums).take(block.rows) {
                    row.iter_mut().for_each(|x| *x /= sum);
                }
                self.store(&work.block, block.first..block.seen, head * head_dim, shape.out_width(), out);
            }
        }
    }

    fn backward(&self, d_out: &[f32], work: &mut Workspace, d_qkv: SharedOut) {
        let Call { shape, rope, .. } = *self.call;
        let width = shape.qkv_width();
        work.reserve_backward(shape);
        self.load_keys(work);
        for head in self.heads.clone() {
            for block in Block::all(shape.seq) {
                self.weigh(head, block, work);
                self.block_backward(head, block, d_out, work);
                let turn = Turn { rope, position: block.first, sign: -1.0, scale: self.scale() };
                let d_queries = &mut work.block[..block.rows * shape.head_dim];
                turn_rows(d_queries, shape.head_dim, turn);
                self.store(d_queries, block.first..block.seen, head * shape.head_dim, width, d_qkv);
            }
        }
        turn_rows(&mut work.d_keys, shape.head_dim, Turn { rope, position: 0, sign: -1.0, scale: 1.0 });
        self.store(&work.d_keys, 0..shape.seq, self.key_column, width, d_qkv);
        self.store(&work.d_values, 0..shape.seq, self.value_column, width, d_qkv);
    }

    /// Scores of a block's queries, then their exponentials against the row's largest, 0 for what the row does not
    /// see; and the sums of rows.
    fn weigh(&self, head: usize, block: Block, work: &mut Workspace) {
        let Call { shape, rope, precision, .. } = *self.call;
        let head_dim = shape.head_dim;
        let queries = &mut work.queries[..block.rows * head_dim];
        self.load(block.first..block.seen, head * head_dim, queries);
        turn_rows(queries, head_dim, Turn { rope, position: block.first, sign: 1.0, scale: self.scale() });
        let weights = &mut work.weights[..block.rows * block.stride];
        let keys = Matrix::new(&work.keys, block.seen, head_dim).t();
        let mut scores = Product::new(Matrix::new(queries, block.rows, head_dim), keys, weights).strided(block.stride);
        product_here(&mut scores, precision, &mut work.gemm);
        exponents(weights, block.first, block.stride, &mut work.sums);
    }

    /// Leaves the gradient of the block's queries, turned and scaled as they are, in `work.block`, and adds to those
    /// of keys and values. Expects what [`Self::weigh`] leaves.
    fn block_backward(&self, head: usize, block: Block, d_out: &[f32], work: &mut Workspace) {
        let Call { shape, precision, .. } = *self.call;
        let Block { rows, seen, stride, .. } = block;
        let head_dim = shape.head_dim;
        let from = (self.token + block.first) * shape.out_width() + head * head_dim;
        let len = (rows - 1) * shape.out_width() + head_dim;
        let d_out = Matrix::new(&d_out[from..from + len], rows, head_dim).strided(shape.out_width());
        let (weights, d_scores) = (&mut work.weights[..rows * stride], &mut work.d_scores[..rows * stride]);
        let queries = Matrix::new(&work.queries, rows, head_dim);
        let keys = Matrix::new(&work.keys, seen, head_dim);
        let gemm = &mut work.gemm;
        let mut multiply = |mut product: Product<'_>| product_here(&mut product, precision, gemm);

        multiply(Product::new(d_out, self.values(seen).t(), d_scores).strided(stride));
        softmax_backward(weights, d_scores, seen, stride, &work.sums);
        let weights = Matrix::new(weights, rows, seen).strided(stride);
        let d_scores = Matrix::new(d_scores, rows, seen).strided(stride);
        multiply(Product::new(d_scores, keys, &mut work.block));
        multiply(Product::new(d_scores.t(), queries, &mut work.d_keys).accumulate());
        multiply(Product::new(weights.t(), d_out, &mut work.d_values).accumulate());
    }

    fn scale(&self) -> f32 {
        1.0 / (self.call.shape.head_dim as f32).sqrt()
    }

    fn load_keys(&self, work: &mut Workspace) {
        let Call { shape, rope, .. } = *self.call;
        let keys = &mut work.keys[..shape.seq * shape.head_dim];
        self.load(0..shape.seq, self.key_column, keys);
        turn_rows(keys, shape.head_dim, Turn { rope, position: 0, sign: 1.0, scale: 1.0 });
    }

    /// The values of the first `seen` positions, where they lie.
    fn values(&self, seen: usize) -> Matrix<'_> {
        let Call { qkv, shape, .. } = *self.call;
        let from = self.token * shape.qkv_width() + self.value_column;
        let len = (seen - 1) * shape.qkv_width() + shape.head_dim;
        Matrix::new(&qkv[from..from + len], seen, shape.head_dim).strided(shape.qkv_width())
    }

    /// Copies the head from `column` on of `positions` to `to [positions, hd]`.
    fn load(&self, positions: std::ops::Range<usize>, column: usize, to: &mut [f32]) {
        let Call { qkv, shape, .. } = *self.call;
        for (position, to) in positions.zip(to.chunks_exact_mut(shape.head_dim)) {
            let from = (self.token + position) * shape.qkv_width() + column;
            to.copy_from_slice(&qkv[from..from + shape.head_dim]);
        }
    }

    /// Copies `from [positions, hd]` to the head from `column` on of rows that are `width` apart.
    fn store(&self, from: &[f32], positions: std::ops::Range<usize>, column: usize, width: usize, to: SharedOut) {
        let head_dim = self.call.shape.head_dim;
        for (position, from) in positions.zip(from.chunks_exact(head_dim)) {
            let at = (self.token + position) * width + column;
            // SAFETY: the buffer has a row of `width` for every token, and the head belongs to this item alone.
            unsafe { std::slice::from_raw_parts_mut(to.from(at), head_dim) }.copy_from_slice(from);
        }
    }
}

/// How rows are turned: by their position, `sign` −1 for back, and then scaled.
#[derive(Clone, Copy)]
struct Turn<'a> {
    rope: Option<RopeTable<'a>>,
    /// Of the first row.
    position: usize,
    sign: f32,
    scale: f32,
}

multiversion!(fn turn_rows(rows: &mut [f32], head_dim: usize, turn: Turn<'_>) = turn_rows_body);

#[inline(always)]
fn turn_rows_body(rows: &mut [f32], head_dim: usize, turn: Turn<'_>) {
    let Turn { rope, position, sign, scale } = turn;
    let Some(rope) = rope else {
        if scale != 1.0 {
            rows.iter_mut().for_each(|x| *x *= scale);
        }
        return;
    };
    let half = head_dim / 2;
    for (row, position) in rows.chunks_exact_mut(head_dim).zip(position..) {
        let at = position * half;
        let table = rope.cos[at..at + half].iter().zip(&rope.sin[at..at + half]);
        let (low, high) = row.split_at_mut(half);
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(table) {
            let (cos, sin) = (cos * scale, sin * (scale * sign));
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

multiversion!(fn exponents(scores: &mut [f32], first: usize, stride: usize, sums: &mut [f32]) = exponents_body);

/// Row i sees `first + i + 1` scores.
#[inline(always)]
fn exponents_body(scores: &mut [f32], first: usize, stride: usize, sums: &mut [f32]) {
    for (i, (row, sum)) in scores.chunks_exact_mut(stride).zip(sums).enumerate() {
        let seen = first + i + 1;
        // Whole lanes, filled up with what becomes 0.
        let (row, unseen) = row.split_at_mut(seen.next_multiple_of(LANES));
        unseen.fill(0.0);
        row[seen..].fill(f32::NEG_INFINITY);
        let max = math::max(row);
        row.iter_mut().for_each(|x| *x = math::exp(*x - max));
        *sum = math::sum_by(row, row, |x, _| x);
    }
}

multiversion!(
    fn softmax_backward(weights: &mut [f32], d_scores: &mut [f32], seen: usize, stride: usize, sums: &[f32]) =
        softmax_backward_body
);

/// Divides weights by their sums, and turns the gradients of these probabilities into those of the scores.
#[inline(always)]
fn softmax_backward_body(weights: &mut [f32], d_scores: &mut [f32], seen: usize, stride: usize, sums: &[f32]) {
    for ((p, d), sum) in weights.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride)).zip(sums) {
        // Nobody wrote the gradients there.
        d[seen..].fill(0.0);
        let share = 1.0 / sum;
        p.iter_mut().for_each(|p| *p *= share);
        let mean = math::dot(p, d);
        d.iter_mut().zip(p).for_each(|(d, p)| *d = *p * (*d - mean));
    }
}

#[cfg(test)]
mod tests;
