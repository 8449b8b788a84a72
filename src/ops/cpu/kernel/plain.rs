//! Kernels in plain Rust, compiled for AVX2 or for whatever the target has.

use super::{NR, Operands, Tile};
use crate::ops::cpu::pack::BLOCK;
use half::f16 as Half;

/// Columns at a time: half a panel, so that the sums of two rows stay in 16 registers.
const COLUMNS: usize = 16;

/// Writes the sums of a row from column `first` of a block on.
#[inline(always)]
unsafe fn store<X, W>(to: &Operands<X, W>, tile: &Tile, row: usize, first: usize, sums: &[f32; COLUMNS]) {
    let n = to.columns.saturating_sub(first).min(COLUMNS);
    // SAFETY: the first `columns` columns of every row are the caller's to write.
    unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), to.out.add(row * tile.stride + first), n) };
}

/// Defines a kernel for weights of which a word holds one.
macro_rules! kernel {
    ($name:ident, $w:ty, $widen:expr) => {
        #[inline(always)]
        pub(super) unsafe fn $name<const M: usize, const P: usize>(of: &Operands<f32, $w>, tile: &Tile) {
            for first in (0..P * NR).step_by(COLUMNS) {
                let mut sums = [[0.0f32; COLUMNS]; M];
                // SAFETY: the panel begins within the weights.
                let w = unsafe { of.w.add(first / NR * tile.panel_len + first % NR) };
                for i in 0..tile.inputs {
                    // SAFETY: the words lie within the panel.
                    let words = unsafe { &*w.add(i * NR).cast::<[$w; COLUMNS]>() };
                    for (m, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: input `i` of row `m` lies within the rows.
                        let x = unsafe { *of.x.add(m * tile.x_row + i) };
                        for (sum, word) in sums.iter_mut().zip(words) {
                            *sum += x * $widen(*word);
                        }
                    }
                }
                for (m, sums) in sums.iter().enumerate() {
                    // SAFETY: the caller's word.
                    unsafe { store(of, tile, m, first, sums) };
                }
            }
        }
    };
}

kernel!(f32, f32, |word: f32| word);
kernel!(f16, u16, |word: u16| Half::from_bits(word).to_f32());

/// Products of bf16 numbers are exact in f32, so that rounding them before they are added changes nothing.
#[inline(always)]
pub(super) unsafe fn bf16<const M: usize, const P: usize>(of: &Operands<u16, u32>, tile: &Tile) {
    const PAIRS: usize = BLOCK / 2;
    let widen = |bits: u32| f32::from_bits(bits);
    for first in (0..P * NR).step_by(COLUMNS) {
        let mut sums = [[0.0f32; COLUMNS]; M];
        // SAFETY: the panel begins within the weights.
        let w = unsafe { of.w.add(first / NR * tile.panel_len + first % NR) };
        for block in 0..tile.panel_len / (PAIRS * NR) {
            let mut parts = [[[0.0f32; COLUMNS]; 2]; M];
            for pair in 0..PAIRS {
                // SAFETY: the words lie within the panel.
                let words = unsafe { &*w.add((block * PAIRS + pair) * NR).cast::<[u32; COLUMNS]>() };
                for (m, [even, odd]) in parts.iter_mut().enumerate() {
                    // SAFETY: rows go on to a whole block.
                    let x = unsafe { of.x.add(block * tile.x_block + m * tile.x_row + 2 * pair) };
                    // SAFETY: as above.
                    let x = unsafe { [widen(u32::from(*x) << 16), widen(u32::from(*x.add(1)) << 16)] };
                    for i in 0..COLUMNS {
                        even[i] += x[0] * widen(words[i] << 16);
                        odd[i] += x[1] * widen(words[i] & 0xFFFF_0000);
                    }
                }
            }
            for (sums, [even, odd]) in sums.iter_mut().zip(&parts) {
                for i in 0..COLUMNS {
                    sums[i] += even[i] + odd[i];
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe { store(of, tile, m, first, sums) };
        }
    }
}
