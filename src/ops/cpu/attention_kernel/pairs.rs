//! [`Rows`] over keys and values of bf16 that lie in pairs, as the tile unit (AMX) takes them in: of two neighbouring
//! dimensions for keys, of two neighbouring positions for values.
//!
//! Queries are rounded to bf16, and weights after their sum is taken. Scores sum every [`BLOCK`] of dimensions by itself,
//! outputs every [`LANES`] of positions, even and odd ones in a chain each: the order of the tile unit, which the vector
//! kernels keep, so that a row's bits are the same by either. Tiles take the positions that all their rows see; what lies
//! at the edges of what a row sees is left to vectors, which touch nothing else.

use super::x86::Avx512;
use super::{CHUNK, LANES, Rows};
use crate::ops::cpu::SharedOut;
use crate::ops::cpu::aligned::Aligned;
use crate::ops::cpu::gemm::amx::MixedTiles;
use crate::ops::cpu::kernel::avx512::{even, odd};
use crate::ops::cpu::pack::BLOCK;
use crate::ops::cpu::rows::{bf16_bits, round};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Runs of positions in a chunk whose keys, and whose values, lie together.
pub(in crate::ops::cpu) const STRIPS: usize = CHUNK / LANES;

/// Pairs of positions in a strip.
const PAIRS: usize = LANES / 2;

/// From this many rows on, tiles are quicker than vectors.
const ROWS_MIN: usize = 8;

/// Rows that the tiles of a call take.
const SQUARE: usize = 32;

/// Where the keys and values of a chunk are, strip by strip; of strips that no row sees, anywhere.
pub(in crate::ops::cpu) struct Strips {
    /// Of the first pair of dimensions; a word holds a position's.
    pub keys: [*const u32; STRIPS],
    /// Words from one pair of dimensions to the next.
    pub key_stride: usize,
    /// Of the first pair of positions; a word holds a column's. The next pair comes as many words after it as a head has
    /// dimensions.
    pub values: [*const u32; STRIPS],
}

/// What only tiles read, for whole squares of rows.
#[derive(Default)]
pub(super) struct Packed {
    /// `[hd / BLOCK, rows, BLOCK]`, bf16.
    queries: Aligned<u16>,
    /// `[rows, CHUNK]`, bf16.
    weights: Aligned<u16>,
    /// In whole squares, or 0 where vectors do all.
    rows: usize,
}

impl Packed {
    /// Makes room for what tiles will read; the rows that outputs and scores need room for.
    pub(super) fn start(&mut self, rows: usize, head_dim: usize) -> usize {
        self.rows = if rows >= ROWS_MIN { rows.next_multiple_of(SQUARE) } else { 0 };
        // Rows past the last one may hold anything: they give rows past the last one.
        for (buffer, width) in [(&mut self.queries, head_dim), (&mut self.weights, CHUNK)] {
            if buffer.len() < self.rows * width {
                *buffer = Aligned::zeroed(self.rows * width);
            }
        }
        self.rows
    }
}

/// A number of bf16.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    f32::from_bits(u32::from(bf16_bits(x)) << 16)
}

impl Rows {
    pub(super) fn set_rounded_query(&mut self, row: usize, query: &[f32]) {
        if self.packed.rows > 0 {
            round(query, SharedOut::new(&mut self.packed.queries), row * BLOCK, self.packed.rows * BLOCK);
        } else {
            for (to, x) in self.queries[row..].iter_mut().step_by(self.rows).zip(query) {
                *to = rounded(*x);
            }
        }
    }

    /// Takes in the chunk that [`Rows::see`] moved on to.
    ///
    /// # Safety
    /// Strips that a row sees something of must be there as a whole, and the processor must have tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    pub(super) unsafe fn attend_strips(&mut self, strips: &Strips) {
        let tiles = (self.packed.rows > 0).then(MixedTiles::configure);
        // SAFETY: the caller's word; whoever has tiles has room for whole squares.
        unsafe {
            match &tiles {
                Some(tiles) => self.score_by_tiles(strips, tiles),
                None => self.score_by_vectors(strips),
            }
            self.exponents::<Avx512>();
            self.round_weights();
            match &tiles {
                Some(tiles) => self.weigh_by_tiles(strips, tiles),
                None => self.weigh_by_vectors(strips),
            }
        }
    }

    /// The strips of which one of these rows sees something.
    #[inline]
    fn strips_of(&self, rows: Range<usize>) -> Range<usize> {
        let here = self.here[rows].iter().filter(|here| !here.is_empty());
        let (start, end) = here.fold((CHUNK, 0), |(lo, hi), here| (lo.min(here.start), hi.max(here.end)));
        start / LANES..end.div_ceil(LANES)
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn score_by_vectors(&mut self, strips: &Strips) {
        let mut first = 0;
        while first < self.rows {
            // SAFETY: the caller's word.
            first += unsafe {
                match self.rows - first {
                    4.. => self.score_rows_of_pairs::<4, 2>(first, strips),
                    2.. => self.score_rows_of_pairs::<2, 4>(first, strips),
                    _ => self.score_rows_of_pairs::<1, 4>(first, strips),
                }
            };
        }
    }

    /// Scores of `R` rows, for up to `P` strips at once; R.
    #[target_feature(enable = "avx512f")]
    unsafe fn score_rows_of_pairs<const R: usize, const P: usize>(&mut self, first: usize, strips: &Strips) -> usize {
        let mut seen = self.strips_of(first..first + R);
        while !seen.is_empty() {
            // SAFETY: the caller's word.
            unsafe {
                if seen.len() >= P {
                    self.score_strips_of_pairs::<R, P>(first, seen.start, strips);
                    seen.start += P;
                } else {
                    self.score_strips_of_pairs::<R, 1>(first, seen.start, strips);
                    seen.start += 1;
                }
            }
        }
        R
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn score_strips_of_pairs<const R: usize, const P: usize>(
        &mut self,
        first: usize,
        strip: usize,
        strips: &Strips,
    ) {
        let mut sums = [[_mm512_setzero_ps(); P]; R];
        for start in (0..self.head_dim).step_by(BLOCK) {
            let (mut evens, mut odds) = ([[_mm512_setzero_ps(); P]; R], [[_mm512_setzero_ps(); P]; R]);
            let queries = self.queries[start * self.rows..(start + BLOCK) * self.rows].chunks_exact(2 * self.rows);
            for (pair, queries) in (start / 2..).zip(queries) {
                let keys: [__m512i; P] = std::array::from_fn(|p| {
                    // SAFETY: the caller's word.
                    unsafe { _mm512_loadu_si512(strips.keys[strip + p].add(pair * strips.key_stride).cast()) }
                });
                for r in 0..R {
                    let (q_even, q_odd) = (queries[first + r], queries[self.rows + first + r]);
                    for p in 0..P {
                        evens[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(q_even), even(keys[p]), evens[r][p]);
                        odds[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(q_odd), odd(keys[p]), odds[r][p]);
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = _mm512_add_ps(sums[r][p], _mm512_add_ps(evens[r][p], odds[r][p]));
                }
            }
        }
        for (weights, sums) in self.weights[first..first + R].iter_mut().zip(sums) {
            let weights = &mut weights[strip * LANES..][..P * LANES];
            for (p, sums) in sums.into_iter().enumerate() {
                // SAFETY: the strip's scores are within the row.
                unsafe { _mm512_storeu_ps(weights[p * LANES..].as_mut_ptr(), sums) };
            }
        }
    }

    /// Rounds what rows see of their weights, and packs it for tiles.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    fn round_weights(&mut self) {
        for row in 0..self.rows {
            let here = &self.here[row];
            let seen = here.start / LANES * LANES..here.end.next_multiple_of(LANES).min(CHUNK);
            let weights = &mut self.weights[row];
            if self.packed.rows > 0 {
                let packed = SharedOut::new(&mut self.packed.weights);
                round(&weights[seen.clone()], packed, row * CHUNK + seen.start, BLOCK);
            }
            weights[seen].iter_mut().for_each(|weight| *weight = rounded(*weight));
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn weigh_by_vectors(&mut self, strips: &Strips) {
        let mut first = 0;
        while first < self.rows {
            let here = self.here[first].clone();
            let alike = self.here[first..].iter().take_while(|other| **other == here).count();
            // SAFETY: the caller's word.
            unsafe {
                match alike {
                    4.. => {
                        self.weigh_rows_of_pairs::<4>(first, here, strips);
                        first += 4;
                    }
                    2.. => {
                        self.weigh_rows_of_pairs::<2>(first, here, strips);
                        first += 2;
                    }
                    _ => {
                        self.weigh_rows_of_pairs::<1>(first, here, strips);
                        first += 1;
                    }
                }
            }
        }
    }

    /// Adds the values of positions `seen` to `R` rows.
    #[target_feature(enable = "avx512f")]
    unsafe fn weigh_rows_of_pairs<const R: usize>(&mut self, first: usize, seen: Range<usize>, strips: &Strips) {
        /// Registers of columns: heads have whole blocks of them.
        const P: usize = BLOCK / LANES;
        if seen.is_empty() {
            return;
        }
        let hd = self.head_dim;
        let weights: &[[f32; CHUNK]; R] = self.weights[first..first + R].try_into().expect("R rows");
        for column in (0..hd).step_by(BLOCK) {
            let mut sums = [[_mm512_setzero_ps(); P]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                let out = &self.out[(first + r) * hd + column..][..BLOCK];
                // SAFETY: the array has as many numbers.
                *sums = std::array::from_fn(|p| unsafe { _mm512_loadu_ps(out[p * LANES..].as_ptr()) });
            }
            for strip in seen.start / LANES..seen.end.div_ceil(LANES) {
                let (mut evens, mut odds) = ([[_mm512_setzero_ps(); P]; R], [[_mm512_setzero_ps(); P]; R]);
                let part = seen.start.max(strip * LANES)..seen.end.min((strip + 1) * LANES);
                for pair in part.start / 2..part.end.div_ceil(2) {
                    let at = (pair - strip * PAIRS) * hd + column;
                    let values: [__m512i; P] = std::array::from_fn(|p| {
                        // SAFETY: the caller's word.
                        unsafe { _mm512_loadu_si512(strips.values[strip].add(at + p * LANES).cast()) }
                    });
                    if part.contains(&(2 * pair)) {
                        for r in 0..R {
                            let weight = _mm512_set1_ps(weights[r][2 * pair]);
                            for p in 0..P {
                                evens[r][p] = _mm512_fmadd_ps(weight, even(values[p]), evens[r][p]);
                            }
                        }
                    }
                    if part.contains(&(2 * pair + 1)) {
                        for r in 0..R {
                            let weight = _mm512_set1_ps(weights[r][2 * pair + 1]);
                            for p in 0..P {
                                odds[r][p] = _mm512_fmadd_ps(weight, odd(values[p]), odds[r][p]);
                            }
                        }
                    }
                }
                for r in 0..R {
                    for p in 0..P {
                        sums[r][p] = _mm512_add_ps(sums[r][p], _mm512_add_ps(evens[r][p], odds[r][p]));
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let out = &mut self.out[(first + r) * hd + column..][..BLOCK];
                for (p, sums) in sums.into_iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_ps(out[p * LANES..].as_mut_ptr(), sums) };
                }
            }
        }
    }

    unsafe fn score_by_tiles(&mut self, strips: &Strips, tiles: &MixedTiles) {
        let packed = self.packed.rows;
        for first in (0..self.rows).step_by(SQUARE) {
            for strip in self.strips_of(first..self.rows.min(first + SQUARE)) {
                let scores = self.weights[first..first + SQUARE].as_mut_ptr();
                // SAFETY: there is room for whole squares of queries and scores; strips are the caller's word.
                unsafe {
                    score_square(
                        tiles,
                        self.packed.queries[first * BLOCK..].as_ptr(),
                        packed,
                        strips.keys[strip],
                        strips.key_stride,
                        self.head_dim / BLOCK,
                        scores.cast::<f32>().add(strip * LANES),
                    );
                }
            }
        }
    }

    unsafe fn weigh_by_tiles(&mut self, strips: &Strips, tiles: &MixedTiles) {
        let hd = self.head_dim;
        for first in (0..self.rows).step_by(LANES) {
            let rows = first..self.rows.min(first + LANES);
            let all =
                self.here[rows.clone()].iter().fold(0..CHUNK, |all, h| all.start.max(h.start)..all.end.min(h.end));
            // Strips that all rows see as a whole.
            let whole = all.start.div_ceil(LANES)..all.end / LANES;
            let whole = if whole.is_empty() { 0..0 } else { whole };
            for row in rows.clone() {
                let here = self.here[row].clone();
                let before = here.start..if whole.is_empty() { here.end } else { whole.start * LANES };
                // SAFETY: the caller's word.
                unsafe { self.weigh_rows_of_pairs::<1>(row, before, strips) };
            }
            if whole.is_empty() {
                continue;
            }
            for column in (0..hd).step_by(BLOCK) {
                let weights = self.packed.weights[first * CHUNK..(first + LANES) * CHUNK].as_ptr();
                let out = self.out[first * hd..(first + LANES) * hd].as_mut_ptr();
                // SAFETY: there is room for whole squares of weights and outputs; strips are the caller's word.
                unsafe {
                    let weights = weights.add(whole.start * LANES);
                    weigh_strips(tiles, weights, &strips.values[whole.clone()], column, hd, out.add(column));
                }
            }
            for row in rows {
                // SAFETY: the caller's word.
                unsafe { self.weigh_rows_of_pairs::<1>(row, whole.end * LANES..self.here[row].end, strips) };
            }
        }
    }
}

/// Scores of 32 rows with the keys of a strip, to `out`, whose rows are a chunk apart. Blocks of queries are
/// `query_rows` rows apart.
///
/// # Safety
/// The pointers must be valid for `blocks` blocks of 32 rows of queries and of the strip, and for 32 rows of scores.
#[inline]
unsafe fn score_square(
    _: &MixedTiles,
    queries: *const u16,
    query_rows: usize,
    keys: *const u32,
    key_stride: usize,
    blocks: usize,
    out: *mut f32,
) {
    // SAFETY: whoever has `MixedTiles` has configured them on this thread; the caller answers for the pointers. The
    // compiler itself never uses tile registers.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm3, [{keys} + {key_row}]",
            "tileloadd tmm2, [{queries} + {line}]",
            "tdpbf16ps tmm0, tmm2, tmm3",
            "tileloadd tmm2, [{queries} + {line} + 1024]",
            "tdpbf16ps tmm1, tmm2, tmm3",
            "add {keys}, {key_block}",
            "add {queries}, {query_block}",
            "dec {blocks}",
            "jnz 2b",
            "tilestored [{upper} + {line} * 4], tmm0",
            "tilestored [{lower} + {line} * 4], tmm1",
            keys = inout(reg) keys => _,
            key_row = in(reg) 4 * key_stride,
            key_block = in(reg) 4 * key_stride * (BLOCK / 2),
            queries = inout(reg) queries => _,
            query_block = in(reg) 2 * query_rows * BLOCK,
            line = in(reg) size_of::<[u16; BLOCK]>(),
            blocks = inout(reg) blocks => _,
            upper = in(reg) out,
            lower = in(reg) out.wrapping_add(16 * CHUNK),
            options(nostack),
        );
    }
}

/// Adds to [`BLOCK`] columns of 16 rows of outputs, `width` apart, what their weights, a chunk apart, make of columns
/// `column..` of as many strips of values.
///
/// # Safety
/// The pointers must be valid for 16 rows and for the strips.
#[inline]
unsafe fn weigh_strips(
    _: &MixedTiles,
    weights: *const u16,
    strips: &[*const u32],
    column: usize,
    width: usize,
    out: *mut f32,
) {
    assert!(!strips.is_empty(), "a loop of none is a very long one");
    // SAFETY: as above.
    unsafe {
        asm!(
            "tileloadd tmm0, [{out} + {row}]",
            "tileloadd tmm1, [{out} + {row} + 64]",
            "2:",
            "mov {values}, [{table}]",
            "add {values}, {column}",
            "tileloadd tmm4, [{weights} + {line} * 2]",
            "tileloadd tmm6, [{values} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm6, [{values} + {row} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "add {weights}, 32",
            "add {table}, 8",
            "dec {strips}",
            "jnz 2b",
            "tilestored [{out} + {row}], tmm0",
            "tilestored [{out} + {row} + 64], tmm1",
            out = in(reg) out,
            row = in(reg) 4 * width,
            values = out(reg) _,
            table = inout(reg) strips.as_ptr() => _,
            column = in(reg) 4 * column,
            weights = inout(reg) weights => _,
            line = in(reg) size_of::<[u16; BLOCK]>(),
            strips = inout(reg) strips.len() => _,
            options(nostack),
        );
    }
}
