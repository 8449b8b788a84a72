//! Widening with AVX-512, and products with few rows that need not be widened before.

use super::{NR, PAIRS, Panel, SUPER};
use std::arch::x86_64::*;

/// Columns of a vector.
const LANES: usize = 16;
/// Bytes ahead of what is read that are fetched.
const AHEAD: usize = 4096;

/// Both vectors rounded to bf16, in pairs: the even input in the low half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs(even: __m512, odd: __m512) -> __m512i {
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: all are 64 bytes, any value of which is valid.
    unsafe {
        let order: __m512i = std::mem::transmute(order);
        _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)))
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[u8]) -> __m128i {
    let from = &from[..LANES];
    // SAFETY: there are 16 bytes.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn load_scales(from: &[u16]) -> __m512 {
    let from = &from[..LANES];
    // SAFETY: there are 16 numbers.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u32], words: __m512i) {
    let to = &mut to[..LANES];
    // SAFETY: there is room for 16 words.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(codes: &[u8]) {
    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
}

/// Both numbers of 16 columns whose codes have four bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_four(from: &[u8]) -> [__m512i; 2] {
    let both = _mm512_cvtepu8_epi32(load(from));
    [_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(both)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
pub(super) fn widen_q8_0(panel: Panel<'_>, out: &mut [u32]) {
    let mut pairs_of = panel.codes.chunks_exact(2 * NR);
    for (scales, out) in panel.scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
        let halves = [load_scales(scales), load_scales(&scales[LANES..])];
        for (out, codes) in out.chunks_exact_mut(NR).zip(&mut pairs_of) {
            fetch(codes);
            for (half, scale) in halves.into_iter().enumerate() {
                let even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(&codes[half * LANES..])));
                let odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(&codes[NR + half * LANES..])));
                let words = pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
                store(&mut out[half * LANES..], words);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
pub(super) fn widen_q4_0(panel: Panel<'_>, out: &mut [u32]) {
    let eight = _mm512_set1_epi32(8);
    let mut pairs_of = panel.codes.chunks_exact(NR);
    for (scales, out) in panel.scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
        let halves = [load_scales(scales), load_scales(&scales[LANES..])];
        for (out, codes) in out.chunks_exact_mut(NR).zip(&mut pairs_of) {
            fetch(codes);
            for (half, scale) in halves.into_iter().enumerate() {
                let [even, odd] = load_four(&codes[half * LANES..]);
                let even = _mm512_cvtepi32_ps(_mm512_sub_epi32(even, eight));
                let odd = _mm512_cvtepi32_ps(_mm512_sub_epi32(odd, eight));
                let words = pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
                store(&mut out[half * LANES..], words);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
pub(super) fn widen_q4_k(panel: Panel<'_>, out: &mut [u32]) {
    let mut pairs_of = panel.codes.chunks_exact(NR);
    let mut multiples_of = panel.multiples.chunks_exact(2 * NR);
    for (scales, out) in panel.scales.chunks_exact(2 * NR).zip(out.chunks_mut(SUPER * PAIRS * NR)) {
        for (out, multiples) in out.chunks_exact_mut(PAIRS * NR).zip(&mut multiples_of) {
            let steps = [scaled(multiples, scales), scaled(&multiples[LANES..], &scales[LANES..])];
            let offsets = [
                scaled(&multiples[2 * LANES..], &scales[2 * LANES..]),
                scaled(&multiples[3 * LANES..], &scales[3 * LANES..]),
            ];
            for (out, codes) in out.chunks_exact_mut(NR).zip(&mut pairs_of) {
                fetch(codes);
                for half in 0..2 {
                    let [even, odd] = load_four(&codes[half * LANES..]);
                    let even = _mm512_fmsub_ps(_mm512_cvtepi32_ps(even), steps[half], offsets[half]);
                    let odd = _mm512_fmsub_ps(_mm512_cvtepi32_ps(odd), steps[half], offsets[half]);
                    store(&mut out[half * LANES..], pairs(even, odd));
                }
            }
        }
    }
}

/// Multiples of f16 scales.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn scaled(multiples: &[u8], scales: &[u16]) -> __m512 {
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load(multiples))), load_scales(scales))
}

/// Few rows of activations, bf16, and where their products with a panel go.
pub(super) struct Product {
    pub x: *const u16,
    /// Elements between rows, and between blocks of a row.
    pub x_row: usize,
    pub x_block: usize,
    pub out: *mut f32,
    /// Elements between rows.
    pub stride: usize,
    /// Columns that are written.
    pub columns: usize,
}

/// What a number is after it was rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(x: __m512) -> __m512 {
    // SAFETY: both are 32 bytes, any value of which is valid.
    let bits: __m256i = unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

/// Defines the product of M rows with a panel, in the order of sums of all kernels for bf16. `$scales` are a block's, and
/// `$weights` those of a pair of inputs of half the columns: even and odd.
macro_rules! product {
    ($name:ident, $pair_bytes:expr, $scales:expr, $weights:expr) => {
        /// # Safety
        /// The pointers of `of` must be valid for M rows.
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
        pub(super) unsafe fn $name<const M: usize>(panel: Panel<'_>, of: &Product) {
            let zero = [[_mm512_setzero_ps(); 2]; M];
            let mut sums = zero;
            for (block, codes) in panel.codes.chunks_exact(PAIRS * $pair_bytes).enumerate() {
                let scales = $scales(&panel, block);
                let (mut evens, mut odds) = (zero, zero);
                for (pair, codes) in codes.chunks_exact($pair_bytes).enumerate() {
                    fetch(codes);
                    let weights = [$weights(codes, 0, &scales), $weights(codes, 1, &scales)];
                    for m in 0..M {
                        // SAFETY: blocks of activations are whole.
                        let x = unsafe {
                            of.x.add(block * of.x_block + m * of.x_row + 2 * pair).cast::<i32>().read_unaligned()
                        };
                        let x = _mm512_set1_epi32(x);
                        let x_even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
                        let mask = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
                        let x_odd = _mm512_castsi512_ps(_mm512_and_si512(x, mask));
                        for half in 0..2 {
                            evens[m][half] = _mm512_fmadd_ps(x_even, weights[half][0], evens[m][half]);
                            odds[m][half] = _mm512_fmadd_ps(x_odd, weights[half][1], odds[m][half]);
                        }
                    }
                }
                for m in 0..M {
                    for half in 0..2 {
                        let part = _mm512_add_ps(evens[m][half], odds[m][half]);
                        sums[m][half] = _mm512_add_ps(sums[m][half], part);
                    }
                }
            }
            for (m, sums) in sums.into_iter().enumerate() {
                for (half, sums) in sums.into_iter().enumerate() {
                    let columns = of.columns.saturating_sub(half * LANES).min(LANES);
                    let mask = ((1u32 << columns) - 1) as __mmask16;
                    // SAFETY: what is masked out is not written; the rest is the caller's.
                    unsafe { _mm512_mask_storeu_ps(of.out.wrapping_add(m * of.stride + half * LANES), mask, sums) };
                }
            }
        }
    };
}

// Written out: through the closures of `map` and `from_fn`, which are compiled without these instructions, every vector would
// go through memory.
product!(
    multiply_q8_0,
    2 * NR,
    |panel: &Panel<'_>, block: usize| {
        let scales = &panel.scales[block * NR..];
        [load_scales(scales), load_scales(&scales[LANES..])]
    },
    |codes: &[u8], half: usize, scales: &[__m512; 2]| {
        let even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(&codes[half * LANES..])));
        let odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(&codes[NR + half * LANES..])));
        [rounded(_mm512_mul_ps(even, scales[half])), rounded(_mm512_mul_ps(odd, scales[half]))]
    }
);

product!(
    multiply_q4_0,
    NR,
    |panel: &Panel<'_>, block: usize| {
        let scales = &panel.scales[block * NR..];
        [load_scales(scales), load_scales(&scales[LANES..])]
    },
    |codes: &[u8], half: usize, scales: &[__m512; 2]| {
        let eight = _mm512_set1_epi32(8);
        let [even, odd] = load_four(&codes[half * LANES..]);
        let even = _mm512_cvtepi32_ps(_mm512_sub_epi32(even, eight));
        let odd = _mm512_cvtepi32_ps(_mm512_sub_epi32(odd, eight));
        [rounded(_mm512_mul_ps(even, scales[half])), rounded(_mm512_mul_ps(odd, scales[half]))]
    }
);

product!(
    multiply_q4_k,
    NR,
    |panel: &Panel<'_>, block: usize| {
        let scales = &panel.scales[block / SUPER * 2 * NR..];
        let multiples = &panel.multiples[block * 2 * NR..];
        [
            scaled(multiples, scales),
            scaled(&multiples[LANES..], &scales[LANES..]),
            scaled(&multiples[2 * LANES..], &scales[2 * LANES..]),
            scaled(&multiples[3 * LANES..], &scales[3 * LANES..]),
        ]
    },
    |codes: &[u8], half: usize, scales: &[__m512; 4]| {
        let [even, odd] = load_four(&codes[half * LANES..]);
        let (even, odd) = (_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(odd));
        let (step, offset) = (scales[half], scales[2 + half]);
        [rounded(_mm512_fmsub_ps(even, step, offset)), rounded(_mm512_fmsub_ps(odd, step, offset))]
    }
);
