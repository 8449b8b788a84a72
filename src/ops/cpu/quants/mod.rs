//! Quantised weights: blocks of 32 inputs with a scale each, as in ggml's formats of the same names. A product widens one
//! panel after the other to bf16 and goes on as with weights of bf16: where memory is what limits, that is free.

mod fit;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::aligned::Aligned;
use super::cache::{PackCache, Packed};
use super::isa::{Isa, multiversion};
use super::pack::{BLOCK, NR};
use super::rows::bf16_bits;
use crate::ops::HostTensor;
use fit::Columns;
use half::f16;
use rayon::prelude::*;

/// What codes and scales mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// scale · code of eight bits; a scale is a 127th of its block's largest magnitude.
    Q8_0,
    /// scale · code of four bits; a scale is an eighth of its block's largest weight, whose code is −8.
    Q4_0,
    /// step · code of four bits − offset. A block's step and offset are whole multiples, up to 63, of two scales that
    /// [`SUPER`] blocks share.
    Q4K,
}

/// Pairs of inputs in a block.
const PAIRS: usize = BLOCK / 2;
/// Blocks that share scales in [`Format::Q4K`].
const SUPER: usize = 8;

impl Format {
    /// Bytes of the codes of a block of a panel.
    fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => BLOCK * NR,
            Self::Q4_0 | Self::Q4K => BLOCK * NR / 2,
        }
    }

    /// Scales of a panel of `blocks`.
    fn panel_scales(self, blocks: usize) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => blocks * NR,
            Self::Q4K => blocks.div_ceil(SUPER) * 2 * NR,
        }
    }

    /// Multiples of scales in a panel of `blocks`.
    fn panel_multiples(self, blocks: usize) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 0,
            Self::Q4K => blocks * 2 * NR,
        }
    }
}

/// Panels of quantised weights.
#[derive(Debug)]
pub(super) struct Quants {
    format: Format,
    /// Blocks of a panel.
    blocks: usize,
    /// `[panels, blocks, pairs of inputs]`, of eight bits `[2, NR]`: the even inputs of all outputs, then the odd ones; of
    /// four bits `[NR]`: the even input in the low half, in `Q4_0` eight too large.
    codes: Packed<u8>,
    /// f16: `[panels, blocks, NR]`, or of `Q4K` `[panels, blocks / SUPER, 2, NR]`: of steps, then of offsets.
    scales: Packed<u16>,
    /// Of `Q4K` `[panels, blocks, 2, NR]`: of steps, then of offsets.
    multiples: Packed<u8>,
}

/// A panel, or some of its blocks.
#[derive(Clone, Copy)]
struct Panel<'a> {
    codes: &'a [u8],
    scales: &'a [u16],
    multiples: &'a [u8],
}

impl Quants {
    /// Quantises matrices of one shape with their panels taking turns.
    pub(super) fn interleave(weights: &[&HostTensor], format: Format, cache: Option<&PackCache>) -> Self {
        let (rows, inputs) = weights[0].dims2();
        let (panels, blocks) = (rows.div_ceil(NR) * weights.len(), inputs.div_ceil(BLOCK));
        let (codes_len, scales_len) = (blocks * format.block_bytes(), format.panel_scales(blocks));
        let multiples_len = format.panel_multiples(blocks);
        let [codes, multiples] = [codes_len, multiples_len].map(|len| Packed::cached(cache, panels * len));
        let scales = Packed::cached(cache, panels * scales_len);
        if let (Some(codes), Some(scales), Some(multiples)) = (codes, scales, multiples) {
            return Self { format, blocks, codes, scales, multiples };
        }
        let mut codes = Aligned::zeroed(panels * codes_len);
        let mut scales = Aligned::zeroed(panels * scales_len);
        let mut multiples = Aligned::zeroed(panels * multiples_len);
        let of_panels =
            codes.par_chunks_exact_mut(codes_len.max(1)).zip(scales.par_chunks_exact_mut(scales_len.max(1)));
        // Panels without multiples have an empty part each.
        let parts: Vec<&mut [u8]> = match multiples_len {
            0 => (0..panels).map(|_| &mut [][..]).collect(),
            len => multiples.chunks_exact_mut(len).collect(),
        };
        of_panels.zip(parts).enumerate().for_each_init(
            || vec![0.0; blocks * BLOCK],
            |row, (p, ((codes, scales), multiples))| {
                let weight = weights[p % weights.len()];
                let first = p / weights.len() * NR;
                for column in 0..NR.min(rows - first) {
                    weight.read_f32((first + column) * inputs, &mut row[..inputs]);
                    Columns { column, codes, scales, multiples }.quantise(format, row);
                }
            },
        );
        let [codes, multiples] = [codes, multiples].map(|bytes| Packed::keep(bytes, cache));
        Self { format, blocks, codes, scales: Packed::keep(scales, cache), multiples }
    }

    /// Bytes of codes, scales and multiples.
    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len() + self.multiples.len()
    }

    fn panel(&self, panel: usize) -> Panel<'_> {
        let codes = self.blocks * self.format.block_bytes();
        let scales = self.format.panel_scales(self.blocks);
        let multiples = self.format.panel_multiples(self.blocks);
        Panel {
            codes: &self.codes[panel * codes..(panel + 1) * codes],
            scales: &self.scales[panel * scales..(panel + 1) * scales],
            multiples: &self.multiples[panel * multiples..(panel + 1) * multiples],
        }
    }

    /// Writes `panel` as bf16 to `out`, `[pairs of inputs, NR]`, with the instructions of `isa`, which this processor must
    /// have. All make the same of it.
    pub(super) fn widen(&self, isa: Isa, panel: usize, out: &mut [u32]) {
        assert_eq!(out.len(), self.blocks * PAIRS * NR);
        let panel = self.panel(panel);
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            // SAFETY: who has tiles has these instructions.
            unsafe {
                return match self.format {
                    Format::Q8_0 => x86::widen_q8_0(panel, out),
                    Format::Q4_0 => x86::widen_q4_0(panel, out),
                    Format::Q4K => x86::widen_q4_k(panel, out),
                };
            }
        }
        match self.format {
            Format::Q8_0 => widen_q8_0(panel, out),
            Format::Q4_0 => widen_q4_0(panel, out),
            Format::Q4K => widen_q4_k(panel, out),
        }
    }

    /// Products of few rows with `panel` as if it had been widened. False where there is no quicker way than that, and nothing
    /// was done.
    ///
    /// # Safety
    /// `x` must hold `rows` rows of whole blocks, `x_strides` elements from row to row and from block to block; `out` be valid
    /// for as many, `stride` elements apart, of `columns`.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn multiply(
        &self,
        isa: Isa,
        panel: usize,
        (x, rows, x_strides): (*const u16, usize, (usize, usize)),
        (out, stride, columns): (*mut f32, usize, usize),
    ) -> bool {
        if isa != Isa::Amx {
            return false;
        }
        let panel = self.panel(panel);
        let of = x86::Product { x, x_row: x_strides.0, x_block: x_strides.1, out, stride, columns };
        macro_rules! with_rows {
            ($multiply:ident) => {
                match rows {
                    1 => x86::$multiply::<1>(panel, &of),
                    2 => x86::$multiply::<2>(panel, &of),
                    3 => x86::$multiply::<3>(panel, &of),
                    4 => x86::$multiply::<4>(panel, &of),
                    _ => return false,
                }
            };
        }
        // SAFETY: who has tiles has these instructions; the rest is the caller's word.
        unsafe {
            match self.format {
                Format::Q8_0 => with_rows!(multiply_q8_0),
                Format::Q4_0 => with_rows!(multiply_q4_0),
                Format::Q4K => with_rows!(multiply_q4_k),
            }
        }
        true
    }

    /// Weights of output `o` as they are multiplied.
    pub(super) fn unpack_row(&self, o: usize, out: &mut [f32]) {
        let (panel, column) = (self.panel(o / NR), o % NR);
        for (i, value) in out.iter_mut().enumerate() {
            let block = i / BLOCK;
            let codes = &panel.codes[block * self.format.block_bytes()..][..self.format.block_bytes()];
            let (pair, odd) = (i % BLOCK / 2, i % 2);
            let four = |codes: &[u8]| f32::from(codes[pair * NR + column] >> (4 * odd) & 15);
            let scale = |at: usize| f16::from_bits(panel.scales[at * NR + column]).to_f32();
            let weight = match self.format {
                Format::Q8_0 => f32::from(codes[(2 * pair + odd) * NR + column].cast_signed()) * scale(block),
                Format::Q4_0 => (four(codes) - 8.0) * scale(block),
                Format::Q4K => {
                    let [step, offset] = [0, 1].map(|kind| {
                        let multiple = panel.multiples[(2 * block + kind) * NR + column];
                        scale(block / SUPER * 2 + kind) * f32::from(multiple)
                    });
                    four(codes) * step - offset
                }
            };
            *value = f32::from_bits(u32::from(bf16_bits(weight)) << 16);
        }
    }
}

multiversion!(fn widen_q8_0(panel: Panel<'_>, out: &mut [u32]) = widen_q8_0_body);
multiversion!(fn widen_q4_0(panel: Panel<'_>, out: &mut [u32]) = widen_q4_0_body);
multiversion!(fn widen_q4_k(panel: Panel<'_>, out: &mut [u32]) = widen_q4_k_body);

#[inline(always)]
fn widen_q8_0_body(panel: Panel<'_>, out: &mut [u32]) {
    let mut codes = panel.codes.chunks_exact(2 * NR);
    for (scales, out) in panel.scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
        let scales = wide(scales);
        widen_block(&mut codes, out, |codes, i| {
            [codes[i], codes[NR + i]].map(|code| f32::from(code.cast_signed()) * scales[i])
        });
    }
}

#[inline(always)]
fn widen_q4_0_body(panel: Panel<'_>, out: &mut [u32]) {
    let mut codes = panel.codes.chunks_exact(NR);
    for (scales, out) in panel.scales.chunks_exact(NR).zip(out.chunks_exact_mut(PAIRS * NR)) {
        let scales = wide(scales);
        widen_block(&mut codes, out, |codes, i| {
            [codes[i] & 15, codes[i] >> 4].map(|code| f32::from(code.cast_signed() - 8) * scales[i])
        });
    }
}

#[inline(always)]
fn widen_q4_k_body(panel: Panel<'_>, out: &mut [u32]) {
    let mut codes = panel.codes.chunks_exact(NR);
    let mut multiples = panel.multiples.chunks_exact(2 * NR);
    for (scales, out) in panel.scales.chunks_exact(2 * NR).zip(out.chunks_mut(SUPER * PAIRS * NR)) {
        let [steps, offsets] = [wide(&scales[..NR]), wide(&scales[NR..])];
        for (out, multiples) in out.chunks_exact_mut(PAIRS * NR).zip(&mut multiples) {
            let step: [f32; NR] = std::array::from_fn(|i| steps[i] * f32::from(multiples[i]));
            let offset: [f32; NR] = std::array::from_fn(|i| offsets[i] * f32::from(multiples[NR + i]));
            widen_block(&mut codes, out, |codes, i| {
                [codes[i] & 15, codes[i] >> 4].map(|code| f32::from(code) * step[i] - offset[i])
            });
        }
    }
}

#[inline(always)]
fn wide(scales: &[u16]) -> [f32; NR] {
    std::array::from_fn(|i| f16::from_bits(scales[i]).to_f32())
}

/// `pair` gives the weights of a column of a pair of inputs.
#[inline(always)]
fn widen_block<'a>(
    codes: &mut impl Iterator<Item = &'a [u8]>,
    out: &mut [u32],
    pair: impl Fn(&[u8], usize) -> [f32; 2],
) {
    for (out, codes) in out.chunks_exact_mut(NR).zip(codes) {
        for (i, out) in out.iter_mut().enumerate() {
            let [even, odd] = pair(codes, i).map(|weight| u32::from(bf16_bits(weight)));
            *out = even | odd << 16;
        }
    }
}
