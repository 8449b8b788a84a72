//! Factors rounded to bf16 in the order in which tiles are loaded.
//!
//! The unit is a panel's step: two tiles of 1 KB beside each other, which hold 32 positions of 32 rows of the left
//! factor or 32 columns of the right one, with zeros where the factor ends. A tile of the left factor has a line for each
//! of 16 rows, with 32 positions; one of the right factor a line for each of 16 pairs of positions, with 16 columns.

use super::matrix::Matrix;
use std::arch::x86_64::*;

/// Lines of a panel's step.
pub(super) const PANEL: usize = 32;
/// Rows, or columns, of a panel, and positions of a step.
pub(super) const SIDE: usize = 32;
/// Lines of a tile; also the pairs of positions in a line, and f32 in a vector.
const LINES: usize = 16;

/// A line of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u16; 32]);

impl Line {
    pub(super) const ZERO: Self = Self([0; 32]);
}

/// Two tiles.
pub(super) type Step = [Line; PANEL];

/// A factor of a product.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    matrix: Matrix<'a>,
    left: bool,
}

impl<'a> Factor<'a> {
    pub(super) fn left(matrix: Matrix<'a>) -> Self {
        Self { matrix, left: true }
    }

    pub(super) fn right(matrix: Matrix<'a>) -> Self {
        Self { matrix, left: false }
    }

    /// Panels of the whole factor.
    pub(super) fn panels(&self) -> usize {
        let side = if self.left { self.matrix.rows() } else { self.matrix.cols() };
        side.div_ceil(SIDE)
    }

    /// Writes `depth` steps from step `first_step` on of each panel from `first_panel` on, panel after panel.
    ///
    /// # Safety
    /// The processor must have AVX-512 F, BW and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pack(&self, first_panel: usize, first_step: usize, depth: usize, to: &mut [Step]) {
        let (matrix, transposed) = (&self.matrix, self.matrix.is_transposed());
        // Positions lie along the lines of a plain left factor and a transposed right one.
        if self.left != transposed {
            for (panel, to) in to.chunks_exact_mut(depth).enumerate() {
                let row = (first_panel + panel) * SIDE;
                for (step, to) in to.iter_mut().enumerate() {
                    let position = (first_step + step) * SIDE;
                    store(to, along(matrix, row, position), along(matrix, row + LINES, position), transposed);
                }
            }
        } else {
            // Steps outside, so that a long matrix is read once from top to bottom.
            let panels = to.len() / depth;
            for step in 0..depth {
                let position = (first_step + step) * SIDE;
                for panel in 0..panels {
                    let col = (first_panel + panel) * SIDE;
                    let tiles = (across(matrix, position, col), across(matrix, position, col + LINES));
                    store(&mut to[panel * depth + step], tiles.0, tiles.1, transposed);
                }
            }
        }
    }
}

type Tile = [__m512i; LINES];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn store(to: &mut Step, first: Tile, second: Tile, transposed: bool) {
    for (tile, to) in [first, second].into_iter().zip(to.chunks_exact_mut(LINES)) {
        let tile = if transposed { transpose(tile) } else { tile };
        for (line, to) in tile.into_iter().zip(to) {
            // SAFETY: a line is one vector.
            unsafe { _mm512_store_si512(std::ptr::from_mut(to).cast(), line) };
        }
    }
}

/// 32 elements from `position` on of each of 16 lines from `row` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn along(matrix: &Matrix<'_>, row: usize, position: usize) -> Tile {
    let (lines, len) = matrix.lines();
    // A loop, as closures are compiled apart where features of the processor are switched on.
    let mut tile = [_mm512_setzero_si512(); LINES];
    for (i, to) in tile.iter_mut().enumerate().take(lines.saturating_sub(row)) {
        let from = &matrix.line(row + i)[position.min(len)..];
        *to = round(load(from), load(&from[LINES.min(from.len())..]));
    }
    tile
}

/// 16 elements from `col` on of each of 32 lines from `position` on, those of two lines interleaved.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn across(matrix: &Matrix<'_>, position: usize, col: usize) -> Tile {
    let (lines, len) = matrix.lines();
    // The element at column i of the first line, then that of the second.
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: both are 64 bytes of integers.
    let order: __m512i = unsafe { std::mem::transmute(order) };
    let mut tile = [_mm512_setzero_si512(); LINES];
    for (pair, to) in tile.iter_mut().enumerate() {
        let line = position + 2 * pair;
        let mut both = [_mm512_setzero_ps(); 2];
        for (i, to) in both.iter_mut().enumerate().take(lines.saturating_sub(line)) {
            *to = load(&matrix.line(line + i)[col.min(len)..]);
        }
        *to = _mm512_permutexvar_epi16(order, round(both[0], both[1]));
    }
    tile
}

/// The first 16 elements, zeros where there are fewer.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32]) -> __m512 {
    let mask = ((1_u32 << from.len().min(LINES)) - 1) as __mmask16;
    // SAFETY: what the mask leaves out is not read.
    unsafe { _mm512_maskz_loadu_ps(mask, from.as_ptr()) }
}

/// Both vectors rounded to bf16, the first one in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 64 bytes, any value of which is valid.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
}

/// The transposed matrix of 16 x 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: Tile) -> Tile {
    // Each stage doubles the side of the blocks that are in place: pairs, twice that, then quarters of a vector.
    let mut y = x;
    for i in (0..16).step_by(2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    let mut x = y;
    for i in (0..16).step_by(4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    // Now quarter q of x[4 g + i] is column 4 q + i of rows 4 g to 4 g + 3.
    for i in 0..4 {
        let (low, high) = (x[i], x[4 + i]);
        let (low2, high2) = (x[8 + i], x[12 + i]);
        let even = (_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0x88>(low2, high2));
        let odd = (_mm512_shuffle_i32x4::<0xdd>(low, high), _mm512_shuffle_i32x4::<0xdd>(low2, high2));
        y[i] = _mm512_shuffle_i32x4::<0x88>(even.0, even.1);
        y[4 + i] = _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1);
        y[8 + i] = _mm512_shuffle_i32x4::<0xdd>(even.0, even.1);
        y[12 + i] = _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1);
    }
    y
}
