//! AVX-512 kernels.

use super::{NR, Operands, Tile};
use crate::ops::cpu::pack::BLOCK;
use std::arch::x86_64::*;

/// Writes the first `columns` of two registers.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(out: *mut f32, columns: usize, sums: [__m512; 2]) {
    let mask = |n: usize| ((1u32 << n.min(16)) - 1) as __mmask16;
    // SAFETY: masked-out lanes are not written; the others are the caller's.
    unsafe {
        _mm512_mask_storeu_ps(out, mask(columns), sums[0]);
        _mm512_mask_storeu_ps(out.wrapping_add(16), mask(columns.saturating_sub(16)), sums[1]);
    }
}

/// Defines a kernel for weights of which a word holds one; `$load` widens 16 of them.
macro_rules! kernel {
    ($name:ident, $w:ty, $load:expr) => {
        #[target_feature(enable = "avx512f,f16c")]
        pub(super) unsafe fn $name<const M: usize, const P: usize>(of: &Operands<f32, $w>, tile: &Tile) {
            let mut sums = [[[_mm512_setzero_ps(); 2]; P]; M];
            // SAFETY: words lie within their panels, inputs within their rows, outputs are the caller's.
            unsafe {
                for i in 0..tile.inputs {
                    for p in 0..P {
                        let words = of.w.add(p * tile.panel_len + i * NR);
                        let w = [$load(words), $load(words.add(16))];
                        for m in 0..M {
                            let x = _mm512_set1_ps(*of.x.add(m * tile.x_row + i));
                            sums[m][p][0] = _mm512_fmadd_ps(x, w[0], sums[m][p][0]);
                            sums[m][p][1] = _mm512_fmadd_ps(x, w[1], sums[m][p][1]);
                        }
                    }
                }
                for m in 0..M {
                    for p in 0..P {
                        let out = of.out.add(m * tile.stride + p * NR);
                        store(out, of.columns.saturating_sub(p * NR), sums[m][p]);
                    }
                }
            }
        }
    };
}

kernel!(f32, f32, |words| _mm512_loadu_ps(words));
kernel!(f16, u16, |words: *const u16| _mm512_cvtph_ps(_mm256_loadu_si256(words.cast())));

/// The even numbers of pairs of bf16, widened.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops::cpu) fn even(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
}

/// The odd ones.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::ops::cpu) fn odd(pairs: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000_u32 as i32)))
}

/// Blocks of a panel that are fetched ahead: 2 KB each. Hardware loses the thread where panels end.
const AHEAD: usize = 3;

#[target_feature(enable = "avx512f")]
pub(super) unsafe fn bf16<const M: usize, const P: usize>(of: &Operands<u16, u32>, tile: &Tile) {
    const PAIRS: usize = BLOCK / 2;
    const WORDS: usize = PAIRS * NR;
    let zero = [[[_mm512_setzero_ps(); 2]; P]; M];
    let mut sums = zero;
    // SAFETY: words lie within their panels, inputs within their rows, outputs are the caller's.
    unsafe {
        let blocks = tile.panel_len / WORDS;
        for block in 0..blocks {
            let (mut evens, mut odds) = (zero, zero);
            let x = of.x.add(block * tile.x_block);
            let w = of.w.add(block * WORDS);
            let ahead = match block + AHEAD {
                ahead if ahead < blocks => of.w.wrapping_add(ahead * WORDS),
                ahead => of.next.wrapping_add((ahead - blocks) * WORDS),
            };
            for pair in 0..PAIRS {
                for p in 0..P {
                    let fetched = ahead.wrapping_add(p * tile.panel_len + pair * NR);
                    _mm_prefetch::<_MM_HINT_T0>(fetched.cast());
                    _mm_prefetch::<_MM_HINT_T0>(fetched.wrapping_add(16).cast());
                    let words = w.add(p * tile.panel_len + pair * NR);
                    let w = [_mm512_loadu_si512(words.cast()), _mm512_loadu_si512(words.add(16).cast())];
                    let (w_even, w_odd) = ([even(w[0]), even(w[1])], [odd(w[0]), odd(w[1])]);
                    for m in 0..M {
                        let x = x.add(m * tile.x_row + 2 * pair).cast::<i32>().read_unaligned();
                        let x = _mm512_set1_epi32(x);
                        let (x_even, x_odd) = (even(x), odd(x));
                        for half in 0..2 {
                            evens[m][p][half] = _mm512_fmadd_ps(x_even, w_even[half], evens[m][p][half]);
                            odds[m][p][half] = _mm512_fmadd_ps(x_odd, w_odd[half], odds[m][p][half]);
                        }
                    }
                }
            }
            for m in 0..M {
                for p in 0..P {
                    for half in 0..2 {
                        let part = _mm512_add_ps(evens[m][p][half], odds[m][p][half]);
                        sums[m][p][half] = _mm512_add_ps(sums[m][p][half], part);
                    }
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (p, sums) in sums.into_iter().enumerate() {
                let out = of.out.add(m * tile.stride + p * NR);
                store(out, of.columns.saturating_sub(p * NR), sums);
            }
        }
    }
}
