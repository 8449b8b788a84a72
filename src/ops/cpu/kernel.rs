//! The matrix kernels: rows of activations times panels of packed weights.
//!
//! A row's result depends neither on how many rows come with it nor on the instruction set it is computed with. With
//! weights of f32 and f16 every output is one chain of multiply-adds over the inputs, in order. With weights of bf16
//! activations are rounded to bf16 too, and every [`BLOCK`] of inputs is summed by itself, even and odd inputs in a
//! chain each: the order of the tile unit (AMX), which the other kernels keep. Quantised weights have their own way, in
//! [`super::quants`].

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
mod plain;

use super::isa::Isa;
use super::pack::{Data, NR, PackedMatrix};
use super::quants::Product;
use super::rows::{Form, Rows};
use super::{ITEMS_PER_THREAD, SharedOut, for_each};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Panels one work item takes.
pub(super) const PANELS_PER_ITEM: usize = 4;

/// Panels that tiles take at a time.
const TILED_PANELS: usize = 2;

/// Rows at least that a work item takes where panels alone are too few: whole blocks of the kernels.
const ROWS_PER_ITEM_MIN: usize = 48;

/// Rows at most that are multiplied with panels after panels.
const ROWS_MAX: usize = 256;

/// As many of them as take half of a second-level cache if they are of bf16 and have `inputs` inputs.
pub(super) fn rows_max(inputs: usize) -> usize {
    const INPUTS: usize = (1 << 20) / 2;
    (INPUTS / inputs.max(1) / 16 * 16).clamp(64, ROWS_MAX)
}

/// `y [M, O] = x [M, I] · wᵀ` for each of several w of one width and form.
pub(super) fn matmuls<const N: usize>(x: Rows<'_>, w: [&PackedMatrix; N]) -> [Vec<f32>; N] {
    let (rows, inputs) = (x.len(), x.width());
    let outputs: usize = w.iter().map(|w| w.outputs()).sum();
    let groups_of = |w: &PackedMatrix| w.outputs().div_ceil(PANELS_PER_ITEM * NR);
    let groups: usize = w.iter().map(|w| groups_of(w)).sum();
    // Few outputs, a gate's, are cut by rows too.
    let parts = (ITEMS_PER_THREAD * rayon::current_num_threads()).div_ceil(groups.max(1));
    let each = rows.div_ceil(parts).max(1).next_multiple_of(ROWS_PER_ITEM_MIN).min(rows_max(inputs));
    let parts = rows.div_ceil(each);
    let flops = 2 * counted_rows(rows, x.form()) * inputs * outputs;
    let mut y = w.map(|w| Vec::with_capacity(rows * w.outputs()));
    let out = y.each_mut().map(SharedOut::unwritten);
    for_each(groups * parts, flops, |item| {
        // All panels with some rows, which stay in a cache, and then with the next ones.
        let (mut group, row) = (item % groups, item / groups * each);
        let x = x.slice(row..rows.min(row + each));
        for (w, out) in w.iter().zip(out) {
            if group < groups_of(w) {
                let first = group * PANELS_PER_ITEM;
                let panels = first..w.outputs().div_ceil(NR).min(first + PANELS_PER_ITEM);
                let at = row * w.outputs() + first * NR;
                // SAFETY: items write disjoint columns of some rows.
                return unsafe { multiply(x, w, panels, out.from(at), w.outputs(), None) };
            }
            group -= groups_of(w);
        }
    });
    for (y, w) in y.iter_mut().zip(w) {
        // SAFETY: the capacity is there, and items together have written all of it.
        unsafe { y.set_len(rows * w.outputs()) };
    }
    y
}

/// Products of all rows of `x` with panels `panels` of `w`, to `each`, some of a row's at a time: with the row's number and
/// their first panel. `next` is as for [`multiply`].
pub(super) fn products(
    x: Rows<'_>,
    w: &PackedMatrix,
    panels: Range<usize>,
    next: Option<(&PackedMatrix, usize)>,
    mut each: impl FnMut(usize, usize, &mut [f32]),
) {
    const PANELS: usize = 4;
    /// Kept in the first two caches between being written and being read.
    #[repr(C, align(64))]
    struct Products([f32; ROWS_MAX * PANELS * NR]);
    let mut room = MaybeUninit::<Products>::uninit();
    let room: *mut f32 = room.as_mut_ptr().cast();
    let isa = Isa::get();
    let panels_max = if tiled(isa, w, x.len()) { TILED_PANELS } else { PANELS };
    let rows_max = rows_max(w.inputs());
    for first in (0..x.len()).step_by(rows_max) {
        let rows = first..x.len().min(first + rows_max);
        for start in panels.clone().step_by(panels_max) {
            let panels_now = start..panels.end.min(start + panels_max);
            let next = match (panels_now.end < panels.end, rows.end < x.len()) {
                (true, _) => None,
                (false, true) => Some((w, panels.start)),
                (false, false) => next,
            };
            let stride = panels_now.len() * NR;
            let columns = (panels_now.end * NR).min(w.outputs()) - start * NR;
            let out = Out { start: room, stride, spare: true };
            // SAFETY: there is room for whole tiles of rows of this many panels, and what is read of it was written.
            unsafe {
                multiply_on(isa, x.slice(rows.clone()), w, panels_now, &out, next);
                for row in 0..rows.len() {
                    each(first + row, start, std::slice::from_raw_parts_mut(room.add(row * stride), columns));
                }
            }
        }
    }
}

/// As how many rows `rows` count where it is weighed whether threads are worth it: tiles take 16 as quickly as one.
pub(super) fn counted_rows(rows: usize, form: Form) -> usize {
    if form != Form::F32 && Isa::get() == Isa::Amx { rows.div_ceil(16) } else { rows }
}

/// [`matmul`] with the kernels of `isa`, on this thread.
#[cfg(test)]
pub(super) fn matmul_on(isa: Isa, x: &[f32], w: &PackedMatrix, y: &mut [f32]) {
    let (rows, outputs) = (x.len() / w.inputs(), w.outputs());
    assert_eq!(y.len(), rows * outputs);
    // SAFETY: `y` holds all rows and columns and is borrowed here alone.
    super::in_form_of(w, x, |x| unsafe {
        let out = Out { start: y.as_mut_ptr(), stride: outputs, spare: false };
        multiply_on(isa, x, w, 0..outputs.div_ceil(NR), &out, None);
    });
}

/// All rows of `x` times panels `panels` of `w`, to `out`, whose rows are `stride` apart; columns past the
/// matrix's outputs are not written. At the end the beginning of what is multiplied after it is fetched: of panel `next`
/// of a matrix, or else of the panels that follow.
///
/// # Safety
/// `out` must be valid for `x.len()` rows of the panels' columns, and no one else may write them.
pub(super) unsafe fn multiply(
    x: Rows<'_>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: *mut f32,
    stride: usize,
    next: Option<(&PackedMatrix, usize)>,
) {
    // SAFETY: the caller's word.
    unsafe { multiply_on(Isa::get(), x, w, panels, &Out { start: out, stride, spare: false }, next) }
}

/// Where products go.
struct Out {
    start: *mut f32,
    /// Elements from row to row.
    stride: usize,
    /// Whether there is room for rows up to a multiple of 16, whatever is written to those that are too many.
    spare: bool,
}

/// Whether tiles are quickest for `rows` rows with `w`.
fn tiled(isa: Isa, w: &PackedMatrix, rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    let from = amx::ROWS_MIN;
    #[cfg(not(target_arch = "x86_64"))]
    let from = usize::MAX;
    isa == Isa::Amx && Form::of(w) == Form::Bf16 && rows >= from
}

/// [`multiply`] with the kernels of `isa`, which this processor must have.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_on(
    isa: Isa,
    x: Rows<'_>,
    w: &PackedMatrix,
    panels: Range<usize>,
    &Out { start: out, stride, spare }: &Out,
    next: Option<(&PackedMatrix, usize)>,
) {
    assert_eq!(x.width(), w.inputs());
    let columns = (panels.end * NR).min(w.outputs()) - panels.start * NR;
    if let Data::Quantised(w) = w.data() {
        let (rows, (x, x_block)) = (x.len(), x.bytes());
        // SAFETY: the caller's word.
        return unsafe { w.multiply(isa, panels, &Product { x, x_block, rows, out, stride, columns }) };
    }
    let (panel_len, start) = (w.panel_len(), panels.start * w.panel_len());
    let next = match next.map(|(next, panel)| (next.data(), panel * next.panel_len())) {
        Some((Data::Bf16(w), start)) => w[start..].as_ptr(),
        _ => match w.data() {
            // After the last panel comes nothing: what is fetched then is in the cache.
            Data::Bf16(w) => match &w[panels.end * panel_len..] {
                [] => w[start..].as_ptr(),
                next => next.as_ptr(),
            },
            _ => std::ptr::null(),
        },
    };
    #[cfg(target_arch = "x86_64")]
    let tiled = tiled(isa, w, x.len());
    let tile = Tile {
        isa,
        rows: x.len(),
        x_row: x.row_stride(),
        x_block: x.block_stride(),
        inputs: w.inputs(),
        panels: panels.len(),
        panel_len,
        columns,
        stride,
        next,
    };
    // SAFETY: pointers are to the first row and panel of ranges within their buffers; `out` is the caller's word.
    unsafe {
        match w.data() {
            Data::F32(w) => dispatch_f32(x.f32(), w[start..].as_ptr(), &tile, out),
            Data::F16(w) => dispatch_f16(x.f32(), w[start..].as_ptr(), &tile, out),
            #[cfg(target_arch = "x86_64")]
            Data::Bf16(w) if tiled => {
                amx::multiply(x.bf16(), w[start..].as_ptr(), &tile, out, spare);
            }
            Data::Bf16(w) => dispatch_bf16(x.bf16(), w[start..].as_ptr(), &tile, out),
            Data::Quantised(_) => unreachable!("returned above"),
        }
    }
}

/// What one call of a kernel covers.
struct Tile {
    isa: Isa,
    rows: usize,
    /// Elements between rows of activations.
    x_row: usize,
    /// Elements between blocks of inputs of the same row.
    x_block: usize,
    inputs: usize,
    panels: usize,
    /// Words of a panel.
    panel_len: usize,
    columns: usize,
    /// Elements between rows of results.
    stride: usize,
    /// What of bf16 is multiplied after the last panel, to be fetched and not to be read.
    next: *const u32,
}

/// What a kernel multiplies: pointers to a first row, a first panel and a first result; columns to write.
struct Operands<X, W> {
    x: *const X,
    w: *const W,
    out: *mut f32,
    columns: usize,
    /// The panels after these.
    next: *const W,
}

/// Calls `$kernel::<M, P>` for blocks of M rows and P panels until the tile is covered. Few rows take several
/// panels at once, many rows one: either way enough independent chains to hide the multiply-add's latency. Several panels
/// are also read faster than one.
macro_rules! cover {
    ($module:ident::$kernel:ident, $x:ident, $w:ident, $tile:ident, $out:ident, [$(($m:literal, $p:literal)),*]) => {{
        let mut row = 0;
        while row < $tile.rows {
            let left = $tile.rows - row;
            $(if left >= $m {
                let mut panel = 0;
                while panel < $tile.panels {
                    let columns = $tile.columns - panel * NR;
                    let operands = |panels: usize| Operands {
                        x: $x.add(row * $tile.x_row),
                        w: $w.add(panel * $tile.panel_len),
                        out: $out.add(row * $tile.stride + panel * NR),
                        columns: columns.min(panels * NR),
                        next: match (panel + panels < $tile.panels, left > $m) {
                            (true, _) => $w.add((panel + panels) * $tile.panel_len),
                            (false, true) => $w,
                            (false, false) => $tile.next.cast(),
                        },
                    };
                    if $tile.panels - panel >= $p {
                        $module::$kernel::<$m, $p>(&operands($p), $tile);
                        panel += $p;
                    } else {
                        $module::$kernel::<$m, 1>(&operands(1), $tile);
                        panel += 1;
                    }
                }
                row += $m;
                continue;
            })*
        }
    }};
}

/// Defines a dispatcher over the instruction sets, with the blocks AVX-512 takes.
macro_rules! dispatcher {
    ($name:ident, $x:ty, $w:ty, $kernel:ident, $blocks:tt) => {
        unsafe fn $name(x: *const $x, w: *const $w, tile: &Tile, out: *mut f32) {
            // SAFETY: the caller's word for the pointers, `Isa::get`'s for the instructions.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = "avx2,fma,f16c")]
                    unsafe fn avx2(x: *const $x, w: *const $w, tile: &Tile, out: *mut f32) {
                        // SAFETY: as for the function around it.
                        unsafe { cover!(plain::$kernel, x, w, tile, out, [(2, 1), (1, 1)]) }
                    }
                    match tile.isa {
                        Isa::Amx | Isa::Avx512 => {
                            cover!(avx512::$kernel, x, w, tile, out, $blocks);
                            return;
                        }
                        Isa::Avx2 => return avx2(x, w, tile, out),
                        Isa::Portable => {}
                    }
                }
                cover!(plain::$kernel, x, w, tile, out, [(2, 1), (1, 1)]);
            }
        }
    };
}

dispatcher!(dispatch_f32, f32, f32, f32, [(12, 1), (8, 1), (4, 2), (2, 4), (1, 4)]);
dispatcher!(dispatch_f16, f32, u16, f16, [(12, 1), (8, 1), (4, 2), (2, 4), (1, 4)]);
dispatcher!(dispatch_bf16, u16, u32, bf16, [(6, 1), (4, 2), (2, 2), (1, 4)]);

#[cfg(test)]
mod tests;
