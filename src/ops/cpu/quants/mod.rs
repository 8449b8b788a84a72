//! Quantised weights: blocks of 32 inputs with a scale each, as in ggml's formats of the same names. In a product with them
//! activations have eight bits too, and a scale for every block of a row. The products of a block then add up to a whole
//! number, exactly, in whatever order and by whatever instructions; block after block goes, times both scales, into a sum of
//! f32.

mod fit;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::aligned::Aligned;
use super::cache::{PackCache, Packed};
use super::isa::Isa;
use super::pack::{BLOCK, NR};
use super::rows::ByteBlock;
use crate::ops::HostTensor;
use fit::Columns;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

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

/// Inputs whose codes lie side by side, as tiles and dot products of bytes want them.
const GROUP: usize = 4;
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

    /// How much larger codes of four bits are than what they mean.
    fn excess(self) -> u8 {
        if self == Self::Q4_0 { 8 } else { 0 }
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
    /// `[panels, blocks, BLOCK / GROUP]`, of eight bits `[NR, GROUP]`; of four bits `[NR / 2, GROUP]`: of the first half of the
    /// columns in the low halves, in `Q4_0` eight too large.
    codes: Packed<u8>,
    /// f16: `[panels, blocks, NR]`, or of `Q4K` `[panels, blocks / SUPER, 2, NR]`: of steps, then of offsets.
    scales: Packed<u16>,
    /// Of `Q4K` `[panels, blocks, 2, NR]`: of steps, then of offsets.
    multiples: Packed<u8>,
}

/// A panel.
#[derive(Clone, Copy)]
struct Panel<'a> {
    format: Format,
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
            format: self.format,
            codes: &self.codes[panel * codes..(panel + 1) * codes],
            scales: &self.scales[panel * scales..(panel + 1) * scales],
            multiples: &self.multiples[panel * multiples..(panel + 1) * multiples],
        }
    }

    /// The product with `panels`, with the instructions of `isa`, which this processor must have.
    ///
    /// # Safety
    /// The pointers of `of` must be valid for its rows, and for whole tiles of them, of this matrix's blocks and columns.
    pub(super) unsafe fn multiply(&self, isa: Isa, panels: Range<usize>, of: &Product) {
        for (i, panel) in panels.enumerate() {
            let of = Product { out: of.out.wrapping_add(i * NR), columns: (of.columns - i * NR).min(NR), ..*of };
            let panel = self.panel(panel);
            // SAFETY: instructions as `isa` says; the rest is the caller's word.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                match isa {
                    Isa::Amx if of.rows >= x86::TILES_MIN => x86::multiply_tiles(panel, &of),
                    Isa::Amx => x86::multiply_vectors(panel, &of),
                    Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => x86::multiply_vectors(panel, &of),
                    Isa::Avx512 | Isa::Avx2 => x86::multiply_avx2(panel, &of),
                    Isa::Portable => of.multiply_by(panel, products),
                }
                #[cfg(not(target_arch = "x86_64"))]
                {
                    let _ = isa;
                    of.multiply_by(panel, products);
                }
            }
        }
    }

    /// Weights of output `o` as they are multiplied.
    pub(super) fn unpack_row(&self, o: usize, out: &mut [f32]) {
        let (panel, column) = (self.panel(o / NR), o % NR);
        for (i, value) in out.iter_mut().enumerate() {
            let block = i / BLOCK;
            let codes = &panel.codes[block * self.format.block_bytes()..][..self.format.block_bytes()];
            let (group, i) = (i % BLOCK / GROUP, i % GROUP);
            let eight = || f32::from(codes[(group * NR + column) * GROUP + i].cast_signed());
            let four = || {
                let codes = codes[(group * NR / 2 + column % (NR / 2)) * GROUP + i];
                f32::from(if column < NR / 2 { codes & 15 } else { codes >> 4 })
            };
            let [scale, offset] = panel.factors(block).map(|factors| factors[column]);
            *value = match self.format {
                Format::Q8_0 => eight() * scale,
                Format::Q4_0 => (four() - 8.0) * scale,
                Format::Q4K => four() * scale - offset,
            };
        }
    }
}

/// Rows of activations, and where their products go.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub x: *const ByteBlock,
    /// From a block of a row to the row's next one.
    pub x_block: usize,
    pub rows: usize,
    pub out: *mut f32,
    /// Elements between rows of products.
    pub stride: usize,
    /// Columns that are written.
    pub columns: usize,
}

/// A block's codes with their signs, `[BLOCK / GROUP, NR, GROUP]`.
type Signed = [i8; BLOCK * NR];

impl<'a> Panel<'a> {
    /// Codes of every block.
    fn blocks(&self) -> std::slice::ChunksExact<'a, u8> {
        self.codes.chunks_exact(self.format.block_bytes())
    }

    /// What sums of a block's codes count for, and what is taken off for those of activations.
    #[inline(always)]
    fn factors(&self, block: usize) -> [[f32; NR]; 2] {
        let scale = |at: usize| -> [f32; NR] {
            std::array::from_fn(|column| f16::from_bits(self.scales[at * NR + column]).to_f32())
        };
        if self.format != Format::Q4K {
            return [scale(block), [0.0; NR]];
        }
        [0, 1].map(|kind| {
            let (scales, multiples) = (scale(block / SUPER * 2 + kind), &self.multiples[(2 * block + kind) * NR..]);
            std::array::from_fn(|column| scales[column] * f32::from(multiples[column]))
        })
    }

    /// A block's codes of eight bits, or those of four taken apart into `room`.
    #[inline(always)]
    fn signed<'b>(&self, codes: &'b [u8], room: &'b mut Signed) -> &'b Signed {
        const HALF: usize = NR / 2 * GROUP;
        if self.format == Format::Q8_0 {
            // SAFETY: bytes are as good with a sign; a block has as many.
            return unsafe { &*std::ptr::from_ref(&codes[..BLOCK * NR]).cast() };
        }
        let less = self.format.excess();
        for (codes, out) in codes.as_chunks::<HALF>().0.iter().zip(room.as_chunks_mut::<{ 2 * HALF }>().0) {
            for i in 0..HALF {
                out[i] = (codes[i] & 15).wrapping_sub(less).cast_signed();
                out[HALF + i] = (codes[i] >> 4).wrapping_sub(less).cast_signed();
            }
        }
        room
    }
}

/// Rows whose sums are kept at a time.
const ROWS: usize = 8;

impl Product {
    /// `products` gives the sums of a block of codes times one of a row.
    ///
    /// # Safety
    /// As [`Quants::multiply`].
    #[inline(always)]
    unsafe fn multiply_by(&self, panel: Panel<'_>, products: impl Fn(&Signed, &[i8; BLOCK]) -> [i32; NR]) {
        for first in (0..self.rows).step_by(ROWS) {
            let rows = first..self.rows.min(first + ROWS);
            let mut sums = [[0.0f32; NR]; ROWS];
            for (block, codes) in panel.blocks().enumerate() {
                let mut room = [0; BLOCK * NR];
                let codes = panel.signed(codes, &mut room);
                let [scales, offsets] = panel.factors(block);
                for (row, sums) in rows.clone().zip(&mut sums) {
                    // SAFETY: the caller's word.
                    let x = unsafe { &*self.x.add(block * self.x_block + row) };
                    let products = products(codes, &x.codes);
                    for (column, sum) in sums.iter_mut().enumerate() {
                        *sum = (products[column] as f32).mul_add(scales[column] * x.scale, *sum);
                    }
                    if panel.format == Format::Q4K {
                        for (sum, offset) in sums.iter_mut().zip(&offsets) {
                            *sum = (-offset).mul_add(x.scaled_sum, *sum);
                        }
                    }
                }
            }
            for (row, sums) in rows.zip(&sums) {
                // SAFETY: the caller's word.
                unsafe {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), self.out.add(row * self.stride), self.columns);
                }
            }
        }
    }
}

fn products(codes: &Signed, x: &[i8; BLOCK]) -> [i32; NR] {
    let mut sums = [0; NR];
    for (codes, x) in codes.as_chunks::<{ NR * GROUP }>().0.iter().zip(x.as_chunks::<GROUP>().0) {
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<GROUP>().0) {
            *sum += codes.iter().zip(x).map(|(code, x)| i32::from(*code) * i32::from(*x)).sum::<i32>();
        }
    }
    sums
}
