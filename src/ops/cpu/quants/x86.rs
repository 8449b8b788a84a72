//! Widening with AVX-512.

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
                let [even, odd] = load_four(&codes[half * LANES..])
                    .map(|codes| _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, eight)), scale));
                store(&mut out[half * LANES..], pairs(even, odd));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
pub(super) fn widen_q4_k(panel: Panel<'_>, out: &mut [u32]) {
    let mut pairs_of = panel.codes.chunks_exact(NR);
    let mut multiples_of = panel.multiples.chunks_exact(2 * NR);
    for (scales, out) in panel.scales.chunks_exact(2 * NR).zip(out.chunks_mut(SUPER * PAIRS * NR)) {
        let scales: [__m512; 4] = std::array::from_fn(|i| load_scales(&scales[i * LANES..]));
        for (out, multiples) in out.chunks_exact_mut(PAIRS * NR).zip(&mut multiples_of) {
            // Steps of both halves of the columns, then offsets.
            let of_block: [__m512; 4] = std::array::from_fn(|i| {
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load(&multiples[i * LANES..]))), scales[i])
            });
            for (out, codes) in out.chunks_exact_mut(NR).zip(&mut pairs_of) {
                fetch(codes);
                for half in 0..2 {
                    let [even, odd] = load_four(&codes[half * LANES..])
                        .map(|codes| _mm512_fmsub_ps(_mm512_cvtepi32_ps(codes), of_block[half], of_block[2 + half]));
                    store(&mut out[half * LANES..], pairs(even, odd));
                }
            }
        }
    }
}
