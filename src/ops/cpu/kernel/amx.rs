//! The kernel for tiles of bf16. Panels lie as the tile unit wants them: 16 pairs of inputs by 16 outputs are a tile
//! whose rows are a panel's row apart.

use super::{NR, Tile};
use crate::ops::cpu::gemm::amx::Tiles;
use crate::ops::cpu::pack::BLOCK;
use std::arch::asm;
use std::mem::MaybeUninit;

/// From this many rows on, tiles are quicker than vectors.
pub(super) const ROWS_MIN: usize = 5;

/// Rows of a tile of activations or results.
const ROWS: usize = 16;
/// Tiles of rows whose results are kept at a time: with rows of 2,048 inputs these take half of a second-level cache.
const TILES: usize = super::ROWS_MAX / ROWS;
/// Panels that are multiplied at a time, two tiles wide each: a tile of rows is loaded once for both, and memory follows
/// two streams better than one.
const PANELS: usize = super::TILED_PANELS;
/// Words of a block of a panel.
const WORDS: usize = BLOCK / 2 * NR;
/// Elements of a row of results.
const STRIDE: usize = PANELS * NR;

/// Blocks of panels, of 2 KB each, that all tiles of rows are multiplied with before the next ones: they stay in the first
/// cache meanwhile. With few tiles memory is what limits, and what comes from there is slowed by whatever else the first
/// cache misses; with many it is the results that are put aside between.
fn depth(tiles: usize) -> usize {
    if tiles <= 4 { 2 } else { 4 }
}

/// Blocks ahead of what is multiplied that are fetched.
const AHEAD: usize = 8;

#[repr(C, align(64))]
struct Results([[f32; STRIDE]; ROWS * TILES]);

/// With `spare` `out` has room for whole tiles of rows.
///
/// # Safety
/// As [`super::multiply`]; whole tiles of rows of `x` must be readable, of whatever content.
pub(super) unsafe fn multiply(x: *const u16, w: *const u32, tile: &Tile, out: *mut f32, spare: bool) {
    let tiles = Tiles::configure();
    let mut room = MaybeUninit::<Results>::uninit();
    let room: *mut f32 = room.as_mut_ptr().cast();
    for first in (0..tile.rows).step_by(ROWS * TILES) {
        let rows = (tile.rows - first).min(ROWS * TILES);
        for panel in (0..tile.panels).step_by(PANELS) {
            let panels = PANELS.min(tile.panels - panel);
            let columns = (tile.columns - panel * NR).min(STRIDE);
            let next = match (panel + panels < tile.panels, first + rows < tile.rows) {
                (true, _) => w.wrapping_add((panel + panels) * tile.panel_len),
                (false, true) => w,
                (false, false) => tile.next,
            };
            // SAFETY: rows and panels within their buffers; results of `rows` rows are written before they are read.
            unsafe {
                let out = out.add(first * tile.stride + panel * NR);
                let in_place = spare && (columns, tile.stride) == (STRIDE, STRIDE);
                let results = if in_place { out } else { room };
                let (x, w) = (x.add(first * tile.x_row), w.add(panel * tile.panel_len));
                multiply_panels(&tiles, (x, rows.div_ceil(ROWS)), (w, panels, next), tile, results);
                if in_place {
                    continue;
                }
                for row in 0..rows {
                    let (results, out) = (results.add(row * STRIDE), out.add(row * tile.stride));
                    if columns == STRIDE {
                        // Of a length the compiler knows, without a call.
                        *out.cast::<[f32; STRIDE]>() = *results.cast();
                    } else {
                        std::ptr::copy_nonoverlapping(results, out, columns);
                    }
                }
            }
        }
    }
}

/// Results of `rows` tiles of rows with `panels` panels from `w` on. At the end the beginnings of those from `next` on are
/// fetched.
#[inline]
unsafe fn multiply_panels(
    tiles: &Tiles,
    (x, rows): (*const u16, usize),
    (w, panels, next): (*const u32, usize, *const u32),
    tile: &Tile,
    results: *mut f32,
) {
    let blocks = tile.panel_len / WORDS;
    let depth_max = depth(rows);
    for first in (0..blocks).step_by(depth_max) {
        let depth = depth_max.min(blocks - first);
        let ahead = first + AHEAD;
        let ahead =
            if ahead < blocks { w.wrapping_add(ahead * WORDS) } else { next.wrapping_add((ahead - blocks) * WORDS) };
        let x_at = |row: usize, block: usize| x.wrapping_add(row * ROWS * tile.x_row + block * tile.x_block);
        for row in 0..rows {
            let (next_row, next_block) = if row + 1 < rows { (row + 1, first) } else { (0, (first + depth) % blocks) };
            // SAFETY: blocks of the panels, rows of `x`, and results are within their buffers; fetching is harmless
            // anywhere.
            unsafe {
                let call = Call {
                    x: x_at(row, first),
                    x_next: x_at(next_row, next_block),
                    x_block: tile.x_block * size_of::<u16>(),
                    w: w.add(first * WORDS),
                    // A last panel without a second is multiplied twice; what comes of it the second time is not read.
                    panel_len: if panels == PANELS { tile.panel_len } else { 0 },
                    depth,
                    results: results.add(row * ROWS * STRIDE),
                    results_next: results.add(next_row * ROWS * STRIDE),
                    accumulate: first > 0,
                    next: ahead.wrapping_add(row * depth * WORDS / rows),
                };
                match rows {
                    1 => call.multiply::<20>(tiles),
                    2 => call.multiply::<12>(tiles),
                    3 => call.multiply::<8>(tiles),
                    4 => call.multiply::<6>(tiles),
                    5..=8 => call.multiply::<3>(tiles),
                    9..=11 => call.multiply::<2>(tiles),
                    _ => call.multiply::<1>(tiles),
                }
            }
        }
    }
}

/// Some blocks of panels with a tile of rows.
struct Call {
    x: *const u16,
    /// Of the next call.
    x_next: *const u16,
    /// Bytes from block to block.
    x_block: usize,
    w: *const u32,
    /// Words from panel to panel.
    panel_len: usize,
    /// Blocks.
    depth: usize,
    results: *mut f32,
    /// Of the next call.
    results_next: *mut f32,
    accumulate: bool,
    /// What is to be fetched from memory, of the first panel.
    next: *const u32,
}

/// Fetches `{lines}` cache lines of a panel from memory, and for the next call those of four rows and one of results from
/// the second cache.
macro_rules! fetch {
    ($next:literal, $rows:literal) => {
        concat!(
            ".rept {lines}\nprefetcht1 [{",
            $next,
            "}]\nadd {",
            $next,
            "}, 64\n.endr\n",
            "prefetcht0 [{x_next} + 4 * 64 * ",
            $rows,
            "]\n",
            "prefetcht0 [{x_next} + 4 * 64 * ",
            $rows,
            " + 64]\n",
            "prefetcht0 [{x_next} + 4 * 64 * ",
            $rows,
            " + 128]\n",
            "prefetcht0 [{x_next} + 4 * 64 * ",
            $rows,
            " + 192]\n",
            "prefetchw [{results_next}]\nadd {results_next}, 64\n",
        )
    };
}

/// Bytes of a row of activations in a block, of half a row of a panel, and of a quarter of one of results.
const LINE: usize = BLOCK * size_of::<u16>();

impl Call {
    /// Two panels. Every block fetches four times `LINES` cache lines of the panels, in turns of each's and between what the
    /// tiles wait for. That is half as many again as a block of both has: memory is read fastest when some lines are asked for
    /// twice.
    ///
    /// # Safety
    /// The pointers must be valid for `depth` blocks of 16 rows and of both panels, and for 16 rows of results with each.
    #[inline(always)]
    unsafe fn multiply<const LINES: usize>(self, _: &Tiles) {
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
                "tileloadd tmm0, [{results} + {line} * 4]",
                "tileloadd tmm1, [{results} + {line} * 4 + 64]",
                "tileloadd tmm2, [{results} + {line} * 4 + 128]",
                "tileloadd tmm3, [{results} + {line} * 4 + 192]",
                "3:",
                "tileloadd tmm4, [{x} + {line}]",
                "tileloadd tmm5, [{w} + {line} * 2]",
                fetch!("next", 0),
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{w} + {line} * 2 + 64]",
                fetch!("next", 1),
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{w2} + {line} * 2]",
                fetch!("next2", 2),
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{w2} + {line} * 2 + 64]",
                fetch!("next2", 3),
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {w}, 2048",
                "add {w2}, 2048",
                "add {x}, {x_block}",
                "add {x_next}, {x_block}",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{results} + {line} * 4], tmm0",
                "tilestored [{results} + {line} * 4 + 64], tmm1",
                "tilestored [{results} + {line} * 4 + 128], tmm2",
                "tilestored [{results} + {line} * 4 + 192], tmm3",
                lines = const LINES,
                accumulate = in(reg) u32::from(self.accumulate),
                results = in(reg) self.results,
                line = in(reg) LINE,
                w = inout(reg) self.w => _,
                w2 = inout(reg) self.w.wrapping_add(self.panel_len) => _,
                x = inout(reg) self.x => _,
                x_next = inout(reg) self.x_next => _,
                results_next = inout(reg) self.results_next => _,
                x_block = in(reg) self.x_block,
                depth = inout(reg) self.depth => _,
                next = inout(reg) self.next => _,
                next2 = inout(reg) self.next.wrapping_add(self.panel_len) => _,
                options(nostack),
            );
        }
    }
}
