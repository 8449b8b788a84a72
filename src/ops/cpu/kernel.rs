//! The matrix kernels: rows of activations times panels of packed weights.
//!
//! Every output is one chain of multiply-adds over the inputs, in order, whatever tile it is computed in: a
//! row's result does not depend on how many rows come with it.

use super::isa::Isa;
use super::pack::{Data, NR, PackedMatrix};
use super::{SharedOut, for_each};
use half::f16;
use std::ops::Range;

/// Rows of activations, `[M, I]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    x: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    /// `x` as rows of `width`.
    pub(super) fn new(x: &'a [f32], width: usize) -> Self {
        Self { x, width }
    }

    /// M.
    pub(super) fn len(&self) -> usize {
        self.x.len() / self.width
    }
}

/// Panels one work item takes.
const PANELS_PER_ITEM: usize = 4;

/// `y [M, O] = x [M, I] · wᵀ`.
pub(super) fn matmul(x: Rows<'_>, w: &PackedMatrix, y: &mut [f32]) {
    let (rows, outputs) = (x.len(), w.outputs());
    assert_eq!(y.len(), rows * outputs);
    let panels = outputs.div_ceil(NR);
    let out = SharedOut::new(y);
    for_each(panels.div_ceil(PANELS_PER_ITEM), 2 * rows * outputs * w.inputs(), |item| {
        let first = item * PANELS_PER_ITEM;
        let last = panels.min(first + PANELS_PER_ITEM);
        // SAFETY: items write disjoint columns of every row.
        unsafe { multiply(x, 0..rows, w, first..last, out.from(first * NR), outputs) };
    });
}

/// [`matmul`] with the kernels of `isa`, on this thread.
#[cfg(test)]
pub(super) fn matmul_on(isa: Isa, x: &[f32], w: &PackedMatrix, y: &mut [f32]) {
    let x = Rows::new(x, w.inputs());
    assert_eq!(y.len(), x.len() * w.outputs());
    // SAFETY: `y` holds all rows and columns and is borrowed here alone.
    unsafe { multiply_on(isa, x, 0..x.len(), w, 0..w.outputs().div_ceil(NR), y.as_mut_ptr(), w.outputs()) };
}

/// Rows `rows` of `x` times panels `panels` of `w`, to `out`, whose rows are `stride` apart; columns past the
/// matrix's outputs are not written.
///
/// # Safety
/// `out` must be valid for `rows.len()` rows of the panels' columns, and no one else may write them.
pub(super) unsafe fn multiply(
    x: Rows<'_>,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's word.
    unsafe { multiply_on(Isa::get(), x, rows, w, panels, out, stride) }
}

/// [`multiply`] with the kernels of `isa`, which this processor must have.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_on(
    isa: Isa,
    x: Rows<'_>,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    let columns = (panels.end * NR).min(w.outputs()) - panels.start * NR;
    let start = panels.start * w.panel_len();
    let tile = Tile { isa, rows: rows.len(), panels: panels.len(), panel_len: w.panel_len(), columns, stride };
    let Rows { x, width } = x;
    let x = x[rows.start * width..].as_ptr();
    // SAFETY: pointers are to the first row and panel of ranges within their buffers; `out` is the caller's word.
    unsafe {
        match w.data() {
            Data::F32(w) => dispatch_f32(x, width, w[start..].as_ptr(), &tile, out),
            Data::F16(w) => dispatch_f16(x, width, w[start..].as_ptr(), &tile, out),
            Data::Bf16(w) => dispatch_bf16(x, width, w[start..].as_ptr(), &tile, out),
        }
    }
}

/// What one call of a kernel covers.
struct Tile {
    isa: Isa,
    rows: usize,
    panels: usize,
    panel_len: usize,
    columns: usize,
    stride: usize,
}

/// Calls `$kernel::<M, P>` for blocks of M rows and P panels until the tile is covered. Few rows take several
/// panels at once, many rows one: either way enough independent chains to hide the multiply-add's latency.
macro_rules! cover {
    ($kernel:ident, $x:ident, $width:ident, $w:ident, $tile:ident, $out:ident, [$(($m:literal, $p:literal)),*]) => {{
        let mut row = 0;
        while row < $tile.rows {
            let left = $tile.rows - row;
            $(if left >= $m {
                let mut panel = 0;
                while panel < $tile.panels {
                    let x = $x.add(row * $width);
                    let w = $w.add(panel * $tile.panel_len);
                    let out = $out.add(row * $tile.stride + panel * NR);
                    let columns = $tile.columns - panel * NR;
                    if $tile.panels - panel >= $p {
                        $kernel::<$m, $p>(x, $width, w, $tile.panel_len, columns.min($p * NR), out, $tile.stride);
                        panel += $p;
                    } else {
                        $kernel::<$m, 1>(x, $width, w, $tile.panel_len, columns.min(NR), out, $tile.stride);
                        panel += 1;
                    }
                }
                row += $m;
                continue;
            })*
        }
    }};
}

/// Defines a dispatcher over the instruction sets: `$avx512` for AVX-512, `$plain` compiled for the others.
macro_rules! dispatcher {
    ($name:ident, $w:ty, $avx512:ident, $plain:ident) => {
        unsafe fn $name(x: *const f32, width: usize, w: *const $w, tile: &Tile, out: *mut f32) {
            // SAFETY: the caller's word for the pointers, `Isa::get`'s for the instructions.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                {
                    use x86::$avx512;
                    #[target_feature(enable = "avx2,fma,f16c")]
                    unsafe fn avx2(x: *const f32, width: usize, w: *const $w, tile: &Tile, out: *mut f32) {
                        // SAFETY: as for the function around it.
                        unsafe { cover!($plain, x, width, w, tile, out, [(2, 1), (1, 2)]) }
                    }
                    match tile.isa {
                        Isa::Avx512 => {
                            cover!($avx512, x, width, w, tile, out, [(12, 1), (8, 1), (4, 2), (2, 4), (1, 4)]);
                            return;
                        }
                        Isa::Avx2 => return avx2(x, width, w, tile, out),
                        Isa::Portable => {}
                    }
                }
                cover!($plain, x, width, w, tile, out, [(2, 1), (1, 1)]);
            }
        }
    };
}

dispatcher!(dispatch_f32, f32, f32_avx512, f32_plain);
dispatcher!(dispatch_f16, u16, f16_avx512, f16_plain);
dispatcher!(dispatch_bf16, u32, bf16_avx512, bf16_plain);

/// Defines a kernel in plain Rust; a word holds `$inputs_per_word` weights, and `$widen` gives one of them.
macro_rules! plain_kernel {
    ($name:ident, $w:ty, $inputs_per_word:literal, $widen:expr) => {
        #[inline(always)]
        unsafe fn $name<const M: usize, const P: usize>(
            x: *const f32,
            width: usize,
            w: *const $w,
            panel_len: usize,
            columns: usize,
            out: *mut f32,
            stride: usize,
        ) {
            const PER: usize = $inputs_per_word;
            for p in 0..P {
                let mut acc = [[0.0f32; NR]; M];
                for step in 0..panel_len / NR {
                    // SAFETY: the word lies within the panel.
                    let words = unsafe { &*w.add(p * panel_len + step * NR).cast::<[$w; NR]>() };
                    for half in 0..PER {
                        let i = step * PER + half;
                        if i >= width {
                            break;
                        }
                        for (m, acc) in acc.iter_mut().enumerate() {
                            // SAFETY: input `i` of row `m` lies within the rows.
                            let x = unsafe { *x.add(m * width + i) };
                            for (acc, word) in acc.iter_mut().zip(words) {
                                *acc += x * $widen(*word, half);
                            }
                        }
                    }
                }
                for (m, acc) in acc.iter().enumerate() {
                    let n = columns.saturating_sub(p * NR).min(NR);
                    // SAFETY: `columns` columns of every row are the caller's to write.
                    unsafe { std::ptr::copy_nonoverlapping(acc.as_ptr(), out.add(m * stride + p * NR), n) };
                }
            }
        }
    };
}

plain_kernel!(f32_plain, f32, 1, |word: f32, _| word);
plain_kernel!(f16_plain, u16, 1, |word: u16, _| f16::from_bits(word).to_f32());
plain_kernel!(bf16_plain, u32, 2, |word: u32, half: usize| f32::from_bits(if half == 0 {
    word << 16
} else {
    word & 0xFFFF_0000
}));

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! AVX-512 kernels. All take: activations and their width in words, panels and their length, columns to
    //! write, output and its row stride.

    use super::NR;
    use std::arch::x86_64::*;

    /// Writes the first `columns` of two registers.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(out: *mut f32, columns: usize, acc: [__m512; 2]) {
        let mask = |n: usize| ((1u32 << n.min(16)) - 1) as __mmask16;
        // SAFETY: masked-out lanes are not written; the others are the caller's.
        unsafe {
            _mm512_mask_storeu_ps(out, mask(columns), acc[0]);
            _mm512_mask_storeu_ps(out.wrapping_add(16), mask(columns.saturating_sub(16)), acc[1]);
        }
    }

    /// Defines a kernel; `$load` turns the words at a place of a panel into registers, `$step` folds them in.
    macro_rules! kernel {
        ($name:ident, $w:ty, |$acc:ident, $row:ident, $at:ident, $words:ident, $width:ident| $step:block) => {
            #[target_feature(enable = "avx512f")]
            pub(super) unsafe fn $name<const M: usize, const P: usize>(
                x: *const f32,
                $width: usize,
                w: *const $w,
                panel_len: usize,
                columns: usize,
                out: *mut f32,
                stride: usize,
            ) {
                let mut sums = [[[_mm512_setzero_ps(); 2]; P]; M];
                // SAFETY: words lie within their panels, inputs within their rows, outputs are the caller's.
                unsafe {
                    for $at in 0..panel_len / NR {
                        for p in 0..P {
                            let $words = w.add(p * panel_len + $at * NR);
                            for m in 0..M {
                                let $acc = &mut sums[m][p];
                                let $row = x.add(m * $width);
                                $step
                            }
                        }
                    }
                    for m in 0..M {
                        for p in 0..P {
                            store(out.add(m * stride + p * NR), columns.saturating_sub(p * NR), sums[m][p]);
                        }
                    }
                }
            }
        };
    }

    kernel!(f32_avx512, f32, |acc, row, at, words, width| {
        let x = _mm512_set1_ps(*row.add(at));
        acc[0] = _mm512_fmadd_ps(x, _mm512_loadu_ps(words), acc[0]);
        acc[1] = _mm512_fmadd_ps(x, _mm512_loadu_ps(words.add(16)), acc[1]);
    });

    kernel!(f16_avx512, u16, |acc, row, at, words, width| {
        let x = _mm512_set1_ps(*row.add(at));
        acc[0] = _mm512_fmadd_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256(words.cast())), acc[0]);
        acc[1] = _mm512_fmadd_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256(words.add(16).cast())), acc[1]);
    });

    kernel!(bf16_avx512, u32, |acc, row, at, words, width| {
        let low = |w: __m512i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
        let high = |w: __m512i| _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xFFFF_0000u32 as i32)));
        let (even, odd) = (_mm512_loadu_si512(words.cast()), _mm512_loadu_si512(words.add(16).cast()));
        let x = _mm512_set1_ps(*row.add(2 * at));
        acc[0] = _mm512_fmadd_ps(x, low(even), acc[0]);
        acc[1] = _mm512_fmadd_ps(x, low(odd), acc[1]);
        if 2 * at + 1 < width {
            let x = _mm512_set1_ps(*row.add(2 * at + 1));
            acc[0] = _mm512_fmadd_ps(x, high(even), acc[0]);
            acc[1] = _mm512_fmadd_ps(x, high(odd), acc[1]);
        }
    });
}
