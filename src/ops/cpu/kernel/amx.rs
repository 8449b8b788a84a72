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
/// Words of a block of a panel.
const WORDS: usize = BLOCK / 2 * NR;

/// Panels that are read in turns: memory follows two streams better than one, and rows are in the first cache for the
/// second.
const STREAMS: usize = 2;

/// Blocks of a panel, of 2 KB each, that all squares are multiplied with before the next ones: they stay in the first cache
/// meanwhile, and so do these blocks of the rows and the results. With few squares memory is what limits, and what comes
/// from there is slowed by whatever else the first cache misses; with many, or a single panel, it is the results that are put
/// aside between.
fn depth(squares: usize, panels: usize) -> usize {
    if squares <= 3 && panels > 1 { 2 } else { 8 }
}

/// Blocks ahead of what is multiplied that are fetched.
const AHEAD: usize = 8;

#[repr(C, align(64))]
struct Results([[f32; NR]; SQUARE * SQUARES * STREAMS]);

/// # Safety
/// As [`super::multiply`]; whole squares of rows of `x` must be readable, of whatever content.
pub(super) unsafe fn multiply(x: *const u16, w: *const u32, tile: &Tile, out: *mut f32) {
    let tiles = Tiles::configure();
    let mut results = MaybeUninit::<Results>::uninit();
    let results: *mut f32 = results.as_mut_ptr().cast();
    for first in (0..tile.rows).step_by(SQUARE * SQUARES) {
        let rows = (tile.rows - first).min(SQUARE * SQUARES);
        for panel in (0..tile.panels).step_by(STREAMS) {
            let panels = STREAMS.min(tile.panels - panel);
            let next = match (panel + panels < tile.panels, first + rows < tile.rows) {
                (true, _) => w.wrapping_add((panel + panels) * tile.panel_len),
                (false, true) => w,
                (false, false) => tile.next,
            };
            // SAFETY: rows and panels within their buffers; results of `rows` rows are written before they are read.
            unsafe {
                let (x, w) = (x.add(first * tile.x_row), w.add(panel * tile.panel_len));
                multiply_panels(&tiles, (x, rows), (w, panels, next), tile, results);
                for stream in 0..panels {
                    let column = (panel + stream) * NR;
                    let columns = (tile.columns - column).min(NR);
                    for row in 0..rows {
                        let results = results.add((stream * SQUARE * SQUARES + row) * NR);
                        let out = out.add((first + row) * tile.stride + column);
                        if columns == NR {
                            // Of a length the compiler knows, without a call.
                            *out.cast::<[f32; NR]>() = *results.cast();
                        } else {
                            std::ptr::copy_nonoverlapping(results, out, columns);
                        }
                    }
                }
            }
        }
    }
}

/// Results of `rows` rows with `panels` panels from `w` on. At the end the beginnings of those from `next` on are fetched.
#[inline]
unsafe fn multiply_panels(
    tiles: &Tiles,
    (x, rows): (*const u16, usize),
    (w, panels, next): (*const u32, usize, *const u32),
    tile: &Tile,
    results: *mut f32,
) {
    let blocks = tile.panel_len / WORDS;
    let squares = rows.div_ceil(SQUARE);
    let depth_max = depth(squares, panels);
    for first in (0..blocks).step_by(depth_max) {
        let depth = depth_max.min(blocks - first);
        let ahead = first + AHEAD;
        let ahead =
            if ahead < blocks { w.wrapping_add(ahead * WORDS) } else { next.wrapping_add((ahead - blocks) * WORDS) };
        for stream in 0..panels {
            let start = stream * tile.panel_len;
            for square in 0..squares {
                // SAFETY: blocks of the panel, rows of `x`, and results are within their buffers; fetching is harmless
                // anywhere.
                unsafe {
                    let call = Call {
                        x: x.add(square * SQUARE * tile.x_row + first * tile.x_block),
                        x_block: tile.x_block * size_of::<u16>(),
                        w: w.add(start + first * WORDS),
                        depth,
                        results: results.add((stream * SQUARES + square) * SQUARE * NR),
                        accumulate: first > 0,
                        next: ahead.wrapping_add(start + square * depth * WORDS / squares),
                    };
                    let half = rows - square * SQUARE <= SQUARE / 2;
                    // Together at least the lines of a block.
                    match (half, squares) {
                        (true, 1) => call.half::<32>(tiles),
                        (true, 2) => call.half::<16>(tiles),
                        (true, 3) => call.half::<12>(tiles),
                        (true, 4..8) => call.half::<8>(tiles),
                        (true, _) => call.half::<4>(tiles),
                        (false, 1) => call.whole::<32>(tiles),
                        (false, 2) => call.whole::<16>(tiles),
                        (false, 3) => call.whole::<12>(tiles),
                        (false, 4..8) => call.whole::<8>(tiles),
                        (false, _) => call.whole::<4>(tiles),
                    }
                }
            }
        }
    }
}

/// Some blocks of a panel with the rows of a square.
struct Call {
    x: *const u16,
    /// Bytes from block to block.
    x_block: usize,
    w: *const u32,
    /// Blocks.
    depth: usize,
    results: *mut f32,
    accumulate: bool,
    /// What is to be fetched.
    next: *const u32,
}

/// Fetches a quarter of `{lines}` cache lines: all at once they would be in the way of what the tiles wait for.
macro_rules! fetch {
    () => {
        ".rept {lines} / 4
        prefetcht1 [{next}]
        add {next}, 64
        .endr"
    };
}

/// Bytes of a row of activations in a block, and of half a row of a panel or of results.
const LINE: usize = BLOCK * size_of::<u16>();
/// Bytes of 16 such rows of activations.
const UPPER: usize = 16 * LINE;

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
                "tileloadd tmm0, [{upper} + {line} * 2]",
                "tileloadd tmm1, [{upper} + {line} * 2 + 64]",
                "tileloadd tmm2, [{lower} + {line} * 2]",
                "tileloadd tmm3, [{lower} + {line} * 2 + 64]",
                "3:",
                "tileloadd tmm6, [{w} + {line} * 2]",
                fetch!(),
                "tileloadd tmm4, [{x} + {line}]",
                fetch!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {line} * 2 + 64]",
                fetch!(),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x} + {line} + {upper_rows}]",
                fetch!(),
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {w}, 2048",
                "add {x}, {x_block}",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{upper} + {line} * 2], tmm0",
                "tilestored [{upper} + {line} * 2 + 64], tmm1",
                "tilestored [{lower} + {line} * 2], tmm2",
                "tilestored [{lower} + {line} * 2 + 64], tmm3",
                lines = const LINES,
                accumulate = in(reg) u32::from(self.accumulate),
                upper = in(reg) self.results,
                lower = in(reg) lower,
                line = in(reg) LINE,
                w = inout(reg) self.w => _,
                x = inout(reg) self.x => _,
                x_block = in(reg) self.x_block,
                upper_rows = const UPPER,
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
                "tileloadd tmm0, [{results} + {line} * 2]",
                "tileloadd tmm1, [{results} + {line} * 2 + 64]",
                "3:",
                fetch!(),
                "tileloadd tmm6, [{w} + {line} * 2]",
                fetch!(),
                "tileloadd tmm4, [{x} + {line}]",
                fetch!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {line} * 2 + 64]",
                fetch!(),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {w}, 2048",
                "add {x}, {x_block}",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{results} + {line} * 2], tmm0",
                "tilestored [{results} + {line} * 2 + 64], tmm1",
                lines = const LINES,
                accumulate = in(reg) u32::from(self.accumulate),
                results = in(reg) self.results,
                line = in(reg) LINE,
                w = inout(reg) self.w => _,
                x = inout(reg) self.x => _,
                x_block = in(reg) self.x_block,
                depth = inout(reg) self.depth => _,
                next = inout(reg) self.next => _,
                options(nostack),
            );
        }
    }
}
