//! The kernel for tiles of bf16. Panels lie as the tile unit wants them: 16 pairs of inputs by 16 outputs are a tile
//! whose rows are a panel's row apart.

use super::{NR, Tile};
use crate::ops::cpu::gemm::amx::Tiles;
use crate::ops::cpu::pack::BLOCK;
use std::arch::asm;
use std::mem::MaybeUninit;

/// From this many rows on, tiles are quicker than vectors.
pub(super) const ROWS_MIN: usize = 5;

/// Rows of a square of results, four tiles.
const SQUARE: usize = 32;
/// Squares whose results are kept at a time: with rows of 2,048 inputs these take half of a second-level cache.
const SQUARES: usize = 8;
/// Blocks of a panel that all squares are multiplied with before the next ones: at 2 KB each they stay in the first
/// cache.
const DEPTH: usize = 16;
/// Words of a block of a panel.
const WORDS: usize = BLOCK / 2 * NR;

#[repr(C, align(64))]
struct Results([[f32; NR]; SQUARE * SQUARES]);

/// # Safety
/// As [`super::multiply`]; whole squares of rows of `x` must be readable, of whatever content.
pub(super) unsafe fn multiply(x: *const u16, w: *const u32, tile: &Tile, out: *mut f32) {
    let tiles = Tiles::configure();
    let mut results = MaybeUninit::<Results>::uninit();
    let results: *mut f32 = results.as_mut_ptr().cast();
    for first in (0..tile.rows).step_by(SQUARE * SQUARES) {
        let rows = (tile.rows - first).min(SQUARE * SQUARES);
        for panel in 0..tile.panels {
            let columns = (tile.columns - panel * NR).min(NR);
            // SAFETY: rows and panels within their buffers; results of `rows` rows are written before they are read.
            unsafe {
                let (x, w) = (x.add(first * tile.x_stride), w.add(panel * tile.panel_len));
                multiply_panel(&tiles, (x, rows), w, tile, results);
                for row in 0..rows {
                    let out = out.add((first + row) * tile.stride + panel * NR);
                    std::ptr::copy_nonoverlapping(results.add(row * NR), out, columns);
                }
            }
        }
    }
}

/// Results of `rows` rows with one panel. Meanwhile the panel after it is fetched into the second-level cache.
#[inline]
unsafe fn multiply_panel(tiles: &Tiles, (x, rows): (*const u16, usize), w: *const u32, tile: &Tile, results: *mut f32) {
    let blocks = tile.panel_len / WORDS;
    let squares = rows.div_ceil(SQUARE);
    // A single square reads its rows once whatever the depth.
    let depth_max = if squares == 1 { blocks } else { DEPTH };
    for first in (0..blocks).step_by(depth_max) {
        let depth = depth_max.min(blocks - first);
        // SAFETY: blocks of the panel, rows of `x`, and results are within their buffers; fetching is harmless anywhere.
        unsafe {
            let w = w.add(first * WORDS);
            for square in 0..squares {
                let call = Call {
                    x: x.add(square * SQUARE * tile.x_stride + first * BLOCK),
                    x_stride: tile.x_stride * size_of::<u16>(),
                    w,
                    depth,
                    results: results.add(square * SQUARE * NR),
                    accumulate: first > 0,
                    next: w.wrapping_add(tile.panel_len + square * depth * WORDS / squares),
                };
                let half = rows - square * SQUARE <= SQUARE / 2;
                match (half, squares) {
                    (true, 1) => call.half::<32>(tiles),
                    (true, _) => call.half::<0>(tiles),
                    (false, 1) => call.whole::<32>(tiles),
                    (false, 2) => call.whole::<16>(tiles),
                    (false, 3 | 4) => call.whole::<8>(tiles),
                    (false, _) => call.whole::<4>(tiles),
                }
            }
        }
    }
}

/// Some blocks of a panel with the rows of a square.
struct Call {
    x: *const u16,
    /// Bytes.
    x_stride: usize,
    w: *const u32,
    /// Blocks.
    depth: usize,
    results: *mut f32,
    accumulate: bool,
    /// What is to be fetched.
    next: *const u32,
}

/// Fetches `{lines}` cache lines into the second-level cache.
macro_rules! fetch {
    () => {
        ".rept {lines} / 4
        prefetcht1 [{next}]
        prefetcht1 [{next} + 64]
        prefetcht1 [{next} + 128]
        prefetcht1 [{next} + 192]
        add {next}, 256
        .endr"
    };
}

/// Bytes between the rows of a panel, and of results.
const PANEL_ROW: usize = NR * 4;

impl Call {
    /// 32 rows. Every block fetches `LINES` cache lines.
    ///
    /// # Safety
    /// The pointers must be valid for `depth` blocks of 32 rows and of the panel, and for 32 rows of results.
    #[inline(always)]
    unsafe fn whole<const LINES: usize>(self, _: &Tiles) {
        let lower = self.results.wrapping_add(SQUARE / 2 * NR);
        // SAFETY: whoever has `Tiles` has configured eight tiles of 16 rows of 64 bytes on this thread; the caller
        // answers for the pointers. The compiler itself never uses tile registers.
        unsafe {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{upper} + {row}]",
                "tileloadd tmm1, [{upper} + {row} + 64]",
                "tileloadd tmm2, [{lower} + {row}]",
                "tileloadd tmm3, [{lower} + {row} + 64]",
                "3:",
                fetch!(),
                "tileloadd tmm6, [{w} + {row}]",
                "tileloadd tmm4, [{x} + {x_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x_lower} + {x_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {w}, 2048",
                "add {x}, 64",
                "add {x_lower}, 64",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{upper} + {row}], tmm0",
                "tilestored [{upper} + {row} + 64], tmm1",
                "tilestored [{lower} + {row}], tmm2",
                "tilestored [{lower} + {row} + 64], tmm3",
                lines = const LINES,
                accumulate = in(reg) u32::from(self.accumulate),
                upper = in(reg) self.results,
                lower = in(reg) lower,
                row = in(reg) PANEL_ROW,
                w = inout(reg) self.w => _,
                x = inout(reg) self.x => _,
                x_lower = inout(reg) self.x.wrapping_byte_add(SQUARE / 2 * self.x_stride) => _,
                x_stride = in(reg) self.x_stride,
                depth = inout(reg) self.depth => _,
                next = inout(reg) self.next => _,
                options(nostack),
            );
        }
    }

    /// Like [`Self::whole`] for 16 rows.
    ///
    /// # Safety
    /// As there, of 16 rows.
    #[inline(always)]
    unsafe fn half<const LINES: usize>(self, _: &Tiles) {
        // SAFETY: as there.
        unsafe {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{results} + {row}]",
                "tileloadd tmm1, [{results} + {row} + 64]",
                "3:",
                fetch!(),
                "tileloadd tmm6, [{w} + {row}]",
                "tileloadd tmm4, [{x} + {x_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {w}, 2048",
                "add {x}, 64",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{results} + {row}], tmm0",
                "tilestored [{results} + {row} + 64], tmm1",
                lines = const LINES,
                accumulate = in(reg) u32::from(self.accumulate),
                results = in(reg) self.results,
                row = in(reg) PANEL_ROW,
                w = inout(reg) self.w => _,
                x = inout(reg) self.x => _,
                x_stride = in(reg) self.x_stride,
                depth = inout(reg) self.depth => _,
                next = inout(reg) self.next => _,
                options(nostack),
            );
        }
    }
}
