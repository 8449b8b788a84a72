//! Quantised weights: blocks of 32 inputs with a scale each, as in ggml's formats of the same names. A product widens one
//! panel after the other to bf16 and goes on as with weights of bf16: where memory is what limits, that is free.

use super::aligned::Aligned;
use super::isa::{Isa, multiversion};
use super::pack::{BLOCK, NR};
use super::rows::bf16_bits;
use crate::ops::HostTensor;
use half::f16;
use rayon::prelude::*;

/// How many bits a code has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    /// A scale is a 127th of its block's largest magnitude.
    Eight,
    /// A scale is an eighth of its block's largest weight, whose code is −8.
    Four,
}

/// Pairs of inputs in a block.
const PAIRS: usize = BLOCK / 2;

impl Bits {
    /// Bytes of a block of a panel.
    fn block_bytes(self) -> usize {
        match self {
            Self::Eight => BLOCK * NR,
            Self::Four => BLOCK * NR / 2,
        }
    }
}

/// Panels of quantised weights.
#[derive(Debug)]
pub(super) struct Quants {
    bits: Bits,
    /// Blocks of a panel.
    blocks: usize,
    /// `[panels, blocks, pairs of inputs]`, of eight bits `[2, NR]`: the even inputs of all outputs, then the odd ones; of
    /// four bits `[NR]`: the even input in the low half, eight too large.
    codes: Aligned<u8>,
    /// `[panels, blocks, NR]`, f16.
    scales: Aligned<u16>,
}

impl Quants {
    /// Quantises matrices of one shape with their panels taking turns.
    pub(super) fn interleave(weights: &[&HostTensor], bits: Bits) -> Self {
        let (rows, inputs) = weights[0].dims2();
        let (panels, blocks) = (rows.div_ceil(NR) * weights.len(), inputs.div_ceil(BLOCK));
        let mut codes = Aligned::zeroed(panels * blocks * bits.block_bytes());
        let mut scales = Aligned::zeroed(panels * blocks * NR);
        let all = codes.par_chunks_exact_mut((blocks * bits.block_bytes()).max(1));
        all.zip(scales.par_chunks_exact_mut((blocks * NR).max(1))).enumerate().for_each_init(
            || vec![0.0; blocks * BLOCK],
            |row, (p, (codes, scales))| {
                let weight = weights[p % weights.len()];
                let first = p / weights.len() * NR;
                for column in 0..NR.min(rows - first) {
                    weight.read_f32((first + column) * inputs, &mut row[..inputs]);
                    let places = codes.chunks_exact_mut(bits.block_bytes()).zip(scales.chunks_exact_mut(NR));
                    for (block, (codes, scales)) in row.chunks_exact(BLOCK).zip(places) {
                        scales[column] = quantise(bits, block, column, codes).to_bits();
                    }
                }
            },
        );
        Self { bits, blocks, codes, scales }
    }

    /// Bytes of codes and scales.
    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len()
    }

    /// Writes `panel` as bf16 to `out`, `[pairs of inputs, NR]`, with the instructions of `isa`, which this processor must
    /// have. All make the same of it.
    pub(super) fn widen(&self, isa: Isa, panel: usize, out: &mut [u32]) {
        let len = self.blocks * self.bits.block_bytes();
        let codes = &self.codes[panel * len..(panel + 1) * len];
        let scales = &self.scales[panel * self.blocks * NR..(panel + 1) * self.blocks * NR];
        assert_eq!(out.len(), self.blocks * PAIRS * NR);
        match self.bits {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: who has tiles has these instructions.
            Bits::Eight if isa == Isa::Amx => unsafe { x86::widen_eight(codes, scales, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Bits::Four if isa == Isa::Amx => unsafe { x86::widen_four(codes, scales, out) },
            Bits::Eight => widen_eight(codes, scales, out),
            Bits::Four => widen_four(codes, scales, out),
        }
    }

    /// Weights of output `o` as they are multiplied.
    pub(super) fn unpack_row(&self, o: usize, out: &mut [f32]) {
        let (panel, column) = (o / NR, o % NR);
        for (i, value) in out.iter_mut().enumerate() {
            let block = panel * self.blocks + i / BLOCK;
            let codes = &self.codes[block * self.bits.block_bytes()..][..self.bits.block_bytes()];
            let (pair, odd) = (i % BLOCK / 2, i % 2);
            let code = match self.bits {
                Bits::Eight => i32::from(codes[(2 * pair + odd) * NR + column].cast_signed()),
                Bits::Four => i32::from(codes[pair * NR + column] >> (4 * odd) & 15) - 8,
            };
            let scale = f16::from_bits(self.scales[block * NR + column]).to_f32();
            *value = f32::from_bits(u32::from(bf16_bits(code as f32 * scale)) << 16);
        }
    }
}

/// Writes the codes of a block of one output, and returns their scale.
fn quantise(bits: Bits, block: &[f32], column: usize, codes: &mut [u8]) -> f16 {
    let largest = block.iter().fold(0.0f32, |largest, x| if x.abs() > largest.abs() { *x } else { largest });
    let scale = f16::from_f32(match bits {
        Bits::Eight => largest.abs() / 127.0,
        Bits::Four => largest / -8.0,
    });
    let (wide, most) = (scale.to_f32(), if bits == Bits::Eight { 127.0 } else { 7.0 });
    let code = |x: f32| if wide == 0.0 { 0 } else { (x / wide).round().clamp(-most - 1.0, most) as i8 };
    for (pair, x) in block.chunks_exact(2).enumerate() {
        match bits {
            Bits::Eight => {
                codes[2 * pair * NR + column] = code(x[0]).cast_unsigned();
                codes[(2 * pair + 1) * NR + column] = code(x[1]).cast_unsigned();
            }
            Bits::Four => codes[pair * NR + column] = (code(x[0]) + 8) as u8 | ((code(x[1]) + 8) as u8) << 4,
        }
    }
    scale
}

multiversion!(fn widen_eight(codes: &[u8], scales: &[u16], out: &mut [u32]) = widen_eight_body);
multiversion!(fn widen_four(codes: &[u8], scales: &[u16], out: &mut [u32]) = widen_four_body);

#[inline(always)]
fn widen_eight_body(codes: &[u8], scales: &[u16], out: &mut [u32]) {
    widen_blocks(codes.chunks_exact(2 * NR), scales, out, |codes, i| {
        [codes[i], codes[NR + i]].map(|code| f32::from(code.cast_signed()))
    });
}

#[inline(always)]
fn widen_four_body(codes: &[u8], scales: &[u16], out: &mut [u32]) {
    widen_blocks(codes.chunks_exact(NR), scales, out, |codes, i| {
        [codes[i] & 15, codes[i] >> 4].map(|code| f32::from(code.cast_signed() - 8))
    });
}

/// `pair` gives the numbers of a column of a pair of inputs.
#[inline(always)]
fn widen_blocks<'a>(
    mut codes: impl Iterator<Item = &'a [u8]>,
    scales: &[u16],
    out: &mut [u32],
    pair: impl Fn(&[u8], usize) -> [f32; 2],
) {
    for (scales, out) in scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
        let scales: [f32; NR] = std::array::from_fn(|i| f16::from_bits(scales[i]).to_f32());
        for (out, codes) in out.chunks_exact_mut(NR).zip(&mut codes) {
            for (i, out) in out.iter_mut().enumerate() {
                let [even, odd] = pair(codes, i).map(|code| u32::from(bf16_bits(code * scales[i])));
                *out = even | odd << 16;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{NR, PAIRS};
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

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,f16c")]
    pub(super) fn widen_eight(codes: &[u8], scales: &[u16], out: &mut [u32]) {
        let mut pairs_of = codes.chunks_exact(2 * NR);
        for (scales, out) in scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
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
    pub(super) fn widen_four(codes: &[u8], scales: &[u16], out: &mut [u32]) {
        let (low, eight) = (_mm512_set1_epi32(15), _mm512_set1_epi32(8));
        let mut pairs_of = codes.chunks_exact(NR);
        for (scales, out) in scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
            let halves = [load_scales(scales), load_scales(&scales[LANES..])];
            for (out, codes) in out.chunks_exact_mut(NR).zip(&mut pairs_of) {
                fetch(codes);
                for (half, scale) in halves.into_iter().enumerate() {
                    let both = _mm512_cvtepu8_epi32(load(&codes[half * LANES..]));
                    let even = _mm512_sub_epi32(_mm512_and_si512(both, low), eight);
                    let odd = _mm512_sub_epi32(_mm512_srli_epi32::<4>(both), eight);
                    let (even, odd) = (_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(odd));
                    let words = pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
                    store(&mut out[half * LANES..], words);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;
    use proptest::prelude::*;

    /// Largest error of a weight, as a share of its block's largest magnitude: half a step, the rounding of the scale to
    /// 11 bits and of the product to 8.
    fn bound(bits: Bits) -> f32 {
        match bits {
            Bits::Eight => 0.5 / 127.0 + 1.0 / 256.0,
            // The code 8 is cut to 7.
            Bits::Four => 1.0 / 8.0 + 1.0 / 256.0,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn weights_come_back_within_half_a_step_and_alike_with_every_instruction_set(
            outputs in 1usize..70, inputs in 1usize..100, matrices in 1usize..3, seed in 0u64..1000,
        ) {
            let values: Vec<_> = (0..matrices as u64).map(|m| numbers(seed + m, outputs * inputs)).collect();
            let hosts: Vec<_> = values.iter().map(|v| HostTensor::from_f32(&[outputs, inputs], v)).collect();
            for bits in [Bits::Eight, Bits::Four] {
                let quants = Quants::interleave(&hosts.iter().collect::<Vec<_>>(), bits);
                let mut row = vec![0.0; inputs];
                for (m, values) in values.iter().enumerate() {
                    for o in 0..outputs {
                        quants.unpack_row((o / NR * matrices + m) * NR + o % NR, &mut row);
                        let want = &values[o * inputs..(o + 1) * inputs];
                        for (want, found) in want.chunks(BLOCK).zip(row.chunks(BLOCK)) {
                            let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                            for (want, found) in want.iter().zip(found) {
                                prop_assert!((want - found).abs() <= bound(bits) * largest, "{} is not {}", found, want);
                            }
                        }
                    }
                }
                for panel in 0..outputs.div_ceil(NR) * matrices {
                    let len = inputs.div_ceil(BLOCK) * PAIRS * NR;
                    let widened = Isa::available().into_iter().map(|isa| {
                        let mut out = vec![u32::MAX; len];
                        quants.widen(isa, panel, &mut out);
                        out
                    });
                    let widened: Vec<_> = widened.collect();
                    prop_assert!(widened.iter().all(|w| *w == widened[0]));
                    quants.unpack_row(panel * NR, &mut row);
                    for (i, x) in row.iter().enumerate() {
                        let bits = widened[0][i / 2 * NR] >> (16 * (i % 2)) & 0xFFFF;
                        prop_assert_eq!(f32::from_bits(bits << 16).to_bits(), x.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_of_zeros_stays_one() {
        for bits in [Bits::Eight, Bits::Four] {
            let quants = Quants::interleave(&[&HostTensor::from_f32(&[2, 40], &[0.0; 80])], bits);
            let mut row = [1.0; 40];
            quants.unpack_row(1, &mut row);
            assert_eq!(row, [0.0; 40]);
        }
    }
}
