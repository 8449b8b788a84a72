//! Softmax attention of a few query rows over one chunk of positions after the other.
//!
//! Every row goes through the same operations in the same order whatever rows are beside it: scores of a chunk,
//! their exponentials against the largest score yet, then the values in ascending positions. Chunks lie at
//! fixed positions. What a row does not see gets weight 0 in its sum, and its value is not touched at all.
//!
//! Keys and values are widened to f32 and multiplied with queries and weights as they are, or where they are bf16 and the
//! processor has tiles multiplied as they lie (`pairs`).

#[cfg(target_arch = "x86_64")]
mod pairs;

use super::isa::Isa;
use super::math::{self, LANES};
use super::pack::BLOCK;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
pub(super) use pairs::{STRIPS, Strips};

/// Positions of a chunk: its keys, or its values, stay in the first cache for all rows.
pub(super) const CHUNK: usize = 64;

/// Query rows that share keys and values, and the state of their softmax. To be used again and again.
#[derive(Default)]
pub(super) struct Rows {
    rows: usize,
    head_dim: usize,
    /// `head_dim` in whole lanes.
    width: usize,
    /// `[hd, rows]`
    queries: Vec<f32>,
    /// What scores are multiplied by to be exponents of two, if queries are not already.
    scale: Option<f32>,
    /// What each row sees.
    seen: Vec<Range<usize>>,
    /// What it sees of the chunk.
    here: Vec<Range<usize>>,
    /// Largest score yet.
    max: Vec<f32>,
    /// Sums of weights by lane.
    sums: Vec<[f32; LANES]>,
    /// Sums of weights times their exponents by lane, for the entropies; empty if nobody asks for them.
    moments: Vec<[f32; LANES]>,
    /// Scores of a chunk, then weights.
    weights: Vec<[f32; CHUNK]>,
    /// Weighted sums of values, `[rows, width]`.
    out: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    packed: pairs::Packed,
}

impl Rows {
    /// Takes up rows that see these positions. With `entropies`, [`Self::entropy`] may be asked for. With `pairs`, keys and
    /// values lie [in pairs](takes_pairs).
    pub(super) fn start(
        &mut self,
        head_dim: usize,
        seen: impl Iterator<Item = Range<usize>>,
        entropies: bool,
        pairs: bool,
    ) {
        self.seen.clear();
        self.seen.extend(seen);
        let (rows, width) = (self.seen.len(), head_dim.next_multiple_of(LANES));
        (self.rows, self.head_dim, self.width, self.scale) = (rows, head_dim, width, None);
        #[cfg(target_arch = "x86_64")]
        let room = if pairs {
            self.scale = Some(scale_of(head_dim));
            rows.max(self.packed.start(rows, head_dim))
        } else {
            rows
        };
        #[cfg(not(target_arch = "x86_64"))]
        let room = {
            assert!(!pairs, "there are no kernels for pairs here");
            rows
        };
        refill(&mut self.max, rows, f32::NEG_INFINITY);
        refill(&mut self.sums, rows, [0.0; LANES]);
        refill(&mut self.moments, if entropies { rows } else { 0 }, [0.0; LANES]);
        refill(&mut self.out, room * width, 0.0);
        // Of these, nothing is read before it is written.
        self.queries.resize(head_dim * rows, 0.0);
        self.here.resize(rows, 0..0);
        self.weights.resize(room, [0.0; CHUNK]);
    }

    /// Floats from one staged value to the next.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn set_query(&mut self, row: usize, query: &[f32]) {
        #[cfg(target_arch = "x86_64")]
        if self.scale.is_some() {
            return self.set_rounded_query(row, query);
        }
        let scale = scale_of(self.head_dim);
        for (to, x) in self.queries[row..].iter_mut().step_by(self.rows).zip(query) {
            *to = x * scale;
        }
    }

    /// Moves on to the chunk from `start`.
    fn see(&mut self, start: usize) {
        for (here, seen) in self.here.iter_mut().zip(&self.seen) {
            *here = seen.start.clamp(start, start + CHUNK) - start..seen.end.clamp(start, start + CHUNK) - start;
        }
    }

    /// Moves on to the chunk from `start`, whose keys and values are of bf16 and lie in pairs.
    ///
    /// # Safety
    /// Strips that a row sees something of must be there as a whole; the rows were started with `pairs`.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn attend_pairs(&mut self, start: usize, strips: &Strips) {
        self.see(start);
        // SAFETY: the caller's word, and [`takes_pairs`]'s for the instructions.
        unsafe { self.attend_strips(strips) }
    }

    /// Moves on to the chunk from `start`, with its keys `[hd, CHUNK]`: scores and weights. Keys of positions that
    /// no row sees may be anything.
    pub(super) fn score(&mut self, isa: Isa, start: usize, keys: &[f32]) {
        assert_eq!(keys.len(), self.head_dim * CHUNK);
        self.see(start);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: who has an `Isa` other than the portable one found its instructions.
            Isa::Amx | Isa::Avx512 => unsafe { x86::score_avx512(self, keys) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::score_avx2(self, keys) },
            _ => score_portable(self, keys),
        }
    }

    /// Adds the chunk's values, `[CHUNK, width]`, by the weights of [`Self::score`]. Columns from `hd` on may be
    /// anything.
    pub(super) fn weigh(&mut self, isa: Isa, values: &[f32]) {
        assert_eq!(values.len(), self.width * CHUNK);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: who has an `Isa` other than the portable one found its instructions.
            Isa::Amx | Isa::Avx512 => unsafe { x86::weigh_avx512(self, values) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::weigh_avx2(self, values) },
            _ => weigh_portable(self, values),
        }
    }

    /// The result of a row, `[hd]`.
    pub(super) fn finish(&self, row: usize, out: &mut [f32]) {
        let sum = math::add_lanes(&self.sums[row]);
        out.iter_mut().zip(&self.out[row * self.width..]).for_each(|(o, x)| *o = x / sum);
    }

    /// Entropy of what a row's softmax gave, in nats: with weights wᵢ = 2^eᵢ of sum Z, ln Z − ln 2 · Σ wᵢ·eᵢ / Z.
    pub(super) fn entropy(&self, row: usize) -> f32 {
        let [sum, moment] = [&self.sums, &self.moments].map(|lanes_of| math::add_lanes(&lanes_of[row]));
        // Never negative, and nothing cancels: the largest weight is 1, so that Z is at least that, and no exponent is
        // above 0.
        sum.ln() - std::f32::consts::LN_2 * moment / sum
    }

    /// Scores of rows `first..first + R` for the strips of the chunk that one of them sees, `P` at once.
    #[inline(always)]
    fn score_rows<S: Simd, const R: usize, const P: usize>(&mut self, simd: S, first: usize, keys: &[f32]) {
        let here = self.here[first..first + R].iter().filter(|here| !here.is_empty());
        let strips = here.fold((CHUNK, 0), |(lo, hi), here| (lo.min(here.start), hi.max(here.end)));
        let (mut strip, end) = (strips.0 / LANES, strips.1.div_ceil(LANES));
        while strip < end {
            if strip + P <= end {
                self.score_strips::<S, R, P>(simd, first, strip, keys);
                strip += P;
            } else {
                self.score_strips::<S, R, 1>(simd, first, strip, keys);
                strip += 1;
            }
        }
    }

    #[inline(always)]
    fn score_strips<S: Simd, const R: usize, const P: usize>(
        &mut self,
        simd: S,
        first: usize,
        strip: usize,
        keys: &[f32],
    ) {
        let at = strip * LANES;
        let mut sums = [[simd.splat(0.0); P]; R];
        for (query, keys) in self.queries.chunks_exact(self.rows).zip(keys.chunks_exact(CHUNK)) {
            let query: &[f32; R] = query[first..first + R].try_into().expect("R rows");
            let keys: [S::V; P] = load(simd, &keys[at..at + P * LANES]);
            for r in 0..R {
                let query = simd.splat(query[r]);
                for p in 0..P {
                    sums[r][p] = simd.mul_add(query, keys[p], sums[r][p]);
                }
            }
        }
        for (weights, sums) in self.weights[first..first + R].iter_mut().zip(&sums) {
            store(simd, sums, &mut weights[at..at + P * LANES]);
        }
    }

    /// Turns all rows' scores into weights.
    #[inline(always)]
    fn exponents<S: Simd>(&mut self) {
        for row in 0..self.rows {
            if self.moments.is_empty() {
                self.exponents_of::<S, false>(row);
            } else {
                self.exponents_of::<S, true>(row);
            }
        }
    }

    /// Turns a row's scores into weights, and scales what it has summed if one is larger than all before.
    #[inline(always)]
    fn exponents_of<S: Simd, const ENTROPY: bool>(&mut self, row: usize) {
        let here = self.here[row].clone();
        if here.is_empty() {
            return;
        }
        let (start, end) = (here.start / LANES * LANES, here.end.next_multiple_of(LANES));
        let weights = &mut self.weights[row];
        weights[start..here.start].fill(f32::NEG_INFINITY);
        weights[here.end..end].fill(f32::NEG_INFINITY);
        let (strips, _) = weights[start..end].as_chunks_mut::<LANES>();
        let before = self.max[row];
        let mut lanes = [before; LANES];
        if let Some(scale) = self.scale {
            strips.iter_mut().flatten().for_each(|score| *score *= scale);
        }
        for strip in strips.iter() {
            for i in 0..LANES {
                lanes[i] = larger(strip[i], lanes[i]);
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = larger(lanes[i + half], lanes[i]);
            }
        }
        let max = lanes[0];
        self.max[row] = max;
        // While all scores are -∞, so are their differences, instead of NaN.
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut sums = self.sums[row];
        let mut moments = if ENTROPY { self.moments[row] } else { [0.0; LANES] };
        if max != before {
            let scale = exp2(S::FUSED, before - base);
            if ENTROPY {
                // All exponents so far move by as much as the largest score did.
                let shift = larger(before - base, EXPONENT_MIN);
                for i in 0..LANES {
                    moments[i] = mul_add(S::FUSED, shift, sums[i], moments[i]) * scale;
                }
            }
            sums.iter_mut().for_each(|s| *s *= scale);
            self.out[row * self.width..(row + 1) * self.width].iter_mut().for_each(|o| *o *= scale);
        }
        for strip in strips {
            for i in 0..LANES {
                let exponent = strip[i] - base;
                strip[i] = exp2(S::FUSED, exponent);
                sums[i] += strip[i];
                if ENTROPY {
                    moments[i] = mul_add(S::FUSED, strip[i], larger(exponent, EXPONENT_MIN), moments[i]);
                }
            }
        }
        self.sums[row] = sums;
        if ENTROPY {
            self.moments[row] = moments;
        }
    }

    /// Adds values to rows `first..first + R`: together where all see them, the rest one row at a time. For every
    /// row that is all it sees in ascending order.
    #[inline(always)]
    fn weigh_rows<S: Simd, const R: usize, const P: usize>(&mut self, simd: S, first: usize, values: &[f32]) {
        let here = &self.here[first..first + R];
        let all = here.iter().fold(0..CHUNK, |all, here| all.start.max(here.start)..all.end.min(here.end));
        if R == 1 || all.is_empty() {
            for row in first..first + R {
                self.weigh_columns::<S, 1, P>(simd, row, self.here[row].clone(), values);
            }
            return;
        }
        for row in first..first + R {
            self.weigh_columns::<S, 1, P>(simd, row, self.here[row].start..all.start, values);
        }
        self.weigh_columns::<S, R, P>(simd, first, all.clone(), values);
        for row in first..first + R {
            self.weigh_columns::<S, 1, P>(simd, row, all.end..self.here[row].end, values);
        }
    }

    #[inline(always)]
    fn weigh_columns<S: Simd, const R: usize, const P: usize>(
        &mut self,
        simd: S,
        first: usize,
        positions: Range<usize>,
        values: &[f32],
    ) {
        if positions.is_empty() {
            return;
        }
        let mut column = 0;
        while column < self.width {
            if column + P * LANES <= self.width {
                self.weigh_block::<S, R, P>(simd, first, column, positions.clone(), values);
                column += P * LANES;
            } else {
                self.weigh_block::<S, R, 1>(simd, first, column, positions.clone(), values);
                column += LANES;
            }
        }
    }

    #[inline(always)]
    fn weigh_block<S: Simd, const R: usize, const P: usize>(
        &mut self,
        simd: S,
        first: usize,
        column: usize,
        positions: Range<usize>,
        values: &[f32],
    ) {
        let width = self.width;
        let weights: &[[f32; CHUNK]; R] = self.weights[first..first + R].try_into().expect("R rows");
        let mut sums = [[simd.splat(0.0); P]; R];
        let out = &mut self.out[first * width..(first + R) * width];
        for (sums, out) in sums.iter_mut().zip(out.chunks_exact(width)) {
            *sums = load(simd, &out[column..column + P * LANES]);
        }
        assert!(positions.end <= CHUNK);
        for (position, value) in positions.clone().zip(values[positions.start * width..].chunks_exact(width)) {
            let value: [S::V; P] = load(simd, &value[column..column + P * LANES]);
            for r in 0..R {
                let weight = simd.splat(weights[r][position]);
                for p in 0..P {
                    sums[r][p] = simd.mul_add(weight, value[p], sums[r][p]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out.chunks_exact_mut(width)) {
            store(simd, sums, &mut out[column..column + P * LANES]);
        }
    }
}

/// Whether keys and values of bf16 are to lie in pairs, in blocks of `block_size` positions. Vectors alone would be slower on
/// prompts than with what is widened once for many rows.
pub(super) fn takes_pairs(isa: Isa, head_dim: usize, block_size: usize) -> bool {
    isa == Isa::Amx && head_dim.is_multiple_of(BLOCK) && block_size.is_multiple_of(LANES)
}

/// By what products of queries and keys are exponents of two.
fn scale_of(head_dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

fn refill<T: Clone>(values: &mut Vec<T>, len: usize, value: T) {
    values.clear();
    values.resize(len, value);
}

#[inline(always)]
fn load<S: Simd, const P: usize>(simd: S, from: &[f32]) -> [S::V; P] {
    let (from, _) = from.as_chunks::<LANES>();
    std::array::from_fn(|p| simd.load(&from[p]))
}

#[inline(always)]
fn store<S: Simd, const P: usize>(simd: S, from: &[S::V; P], to: &mut [f32]) {
    let (to, _) = to.as_chunks_mut::<LANES>();
    for p in 0..P {
        simd.store(from[p], &mut to[p]);
    }
}

/// Vectors of an instruction set; who has a value of the type has the instructions.
trait Simd: Copy {
    /// Whether [`Self::mul_add`] rounds once.
    const FUSED: bool;
    type V: Copy;
    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, x: Self::V, to: &mut [f32; LANES]);
    /// `a·b + c`
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

#[derive(Clone, Copy)]
struct Portable;

impl Simd for Portable {
    const FUSED: bool = false;
    type V = [f32; LANES];
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }
    #[inline(always)]
    fn store(self, x: Self::V, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

/// `a·b + c`, rounded once where the instruction set has that.
#[inline(always)]
fn mul_add(fused: bool, a: f32, b: f32, c: f32) -> f32 {
    if fused { a.mul_add(b, c) } else { a * b + c }
}

/// The larger of two numbers; `b`, which must be a number, if `a` is none.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Below this, [`exp2`] is 0: a product with it may take this for the exponent, where 0 · -∞ would be NaN.
const EXPONENT_MIN: f32 = -126.0;

/// 2ˣ for x ≤ 0, 0 below the normal numbers.
#[inline(always)]
pub(super) fn exp2(fused: bool, x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to whole numbers, which are then the low bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x + ROUND;
    let rest = x - (rounded - ROUND);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    let mut y = POLY[0];
    for c in &POLY[1..] {
        y = mul_add(fused, y, rest, *c);
    }
    if x < EXPONENT_MIN { 0.0 } else { y * power }
}

/// Of 2ˣ in ±½, highest power first: through 1 at 0 and the Chebyshev nodes; relative error 10⁻⁸.
const POLY: [f32; 7] =
    [1.545_316_4e-4, 1.339_086_3e-3, 9.618_083e-3, 5.550_357e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];

/// Calls `$body::<_, R, P>` for blocks of R rows until all are covered. Few rows take more lanes at once: either way
/// enough independent chains to hide the multiply-add's latency.
macro_rules! cover {
    ($rows:ident.$body:ident($simd:expr, $data:ident), [$(($r:literal, $p:literal)),*]) => {{
        let mut first = 0;
        while first < $rows.rows {
            let left = $rows.rows - first;
            $(if left >= $r {
                $rows.$body::<_, $r, $p>($simd, first, $data);
                first += $r;
                continue;
            })*
        }
    }};
}

fn score_portable(rows: &mut Rows, keys: &[f32]) {
    cover!(rows.score_rows(Portable, keys), [(2, 1), (1, 1)]);
    rows.exponents::<Portable>();
}

fn weigh_portable(rows: &mut Rows, values: &[f32]) {
    cover!(rows.weigh_rows(Portable, values), [(2, 1), (1, 1)]);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Rows, Simd};
    use std::arch::x86_64::*;

    /// Made only where AVX-512F is.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    // SAFETY, of every block: the value says that the instructions are there, the array that its memory is.
    impl Simd for Avx512 {
        const FUSED: bool = true;
        type V = __m512;
        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> Self::V {
            // SAFETY: as above.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: Self::V, to: &mut [f32; LANES]) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
    }

    /// Made only where AVX2 and FMA are.
    #[derive(Clone, Copy)]
    struct Avx2(());

    // SAFETY, of every block: the value says that the instructions are there, the array that its memory is.
    impl Simd for Avx2 {
        const FUSED: bool = true;
        type V = [__m256; 2];
        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: as above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> Self::V {
            // SAFETY: as above.
            unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())] }
        }
        #[inline(always)]
        fn store(self, x: Self::V, to: &mut [f32; LANES]) {
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(to[8..].as_mut_ptr(), x[1]);
            }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: as above.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    pub(super) fn score_avx512(rows: &mut Rows, keys: &[f32]) {
        let simd = Avx512(());
        cover!(rows.score_rows(simd, keys), [(12, 2), (8, 2), (4, 4), (3, 4), (2, 4), (1, 4)]);
        rows.exponents::<Avx512>();
    }

    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    pub(super) fn weigh_avx512(rows: &mut Rows, values: &[f32]) {
        let simd = Avx512(());
        cover!(rows.weigh_rows(simd, values), [(12, 2), (8, 2), (4, 4), (3, 4), (2, 4), (1, 4)]);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn score_avx2(rows: &mut Rows, keys: &[f32]) {
        let simd = Avx2(());
        cover!(rows.score_rows(simd, keys), [(6, 1), (3, 2), (2, 2), (1, 4)]);
        rows.exponents::<Avx2>();
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn weigh_avx2(rows: &mut Rows, values: &[f32]) {
        let simd = Avx2(());
        cover!(rows.weigh_rows(simd, values), [(6, 1), (3, 2), (2, 2), (1, 4)]);
    }
}
