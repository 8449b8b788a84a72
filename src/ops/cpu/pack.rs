//! Weights in the order the kernels read them.
//!
//! A `[O, I]` matrix is cut into panels of [`NR`] outputs. Within a panel, input after input holds its NR
//! weights side by side (bf16: two inputs to a word, as the tile unit wants them, padded to whole [`BLOCK`]s), so that a
//! kernel streams a panel front to back. The last panel is padded with zeros.

use super::aligned::Aligned;
use super::cache::{PackCache, Packed, Word};
use super::quants::{Format, Quants};
use super::rows::bf16_bits;
use crate::ops::HostTensor;
use crate::types::WeightFormat;
use candle_core::DType;
use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

/// Outputs per panel: two AVX-512 registers.
pub(super) const NR: usize = 32;

/// Inputs of a bf16 product whose sum is taken by itself: those of a tile.
pub(super) const BLOCK: usize = 32;

/// A packed weight matrix.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    data: Data,
}

/// What a matrix is packed as.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    /// BF16, F16 or F32; where that narrows, to nearest even.
    pub dtype: DType,
    /// Instead of it, if it isn't plain.
    pub format: WeightFormat,
    /// Where packed weights are kept.
    pub cache: Option<Arc<PackCache>>,
}

impl From<DType> for Packing {
    fn from(dtype: DType) -> Self {
        Self { dtype, format: WeightFormat::Plain, cache: None }
    }
}

#[derive(Debug)]
pub(super) enum Data {
    /// `[panels, I, NR]`
    F32(Packed<f32>),
    /// `[panels, pairs of inputs, NR]`, two bf16 a word: the even input in the low half.
    Bf16(Packed<u32>),
    /// `[panels, I, NR]`
    F16(Packed<u16>),
    Quantised(Quants),
}

impl PackedMatrix {
    /// Packs a `[O, I]` matrix.
    pub(crate) fn pack(weight: &HostTensor, packing: &Packing) -> Self {
        Self::interleave(&[weight], packing)
    }

    /// Packs several matrices of one shape with their panels taking turns: panel 0 of each, panel 1 of each, …
    pub(super) fn interleave(weights: &[&HostTensor], packing: &Packing) -> Self {
        let (rows, inputs) = weights[0].dims2();
        let panels = rows.div_ceil(NR) * weights.len();
        // Interleaved panels are addressed as panels, so their padding counts.
        let outputs = if weights.len() == 1 { rows } else { panels * NR };
        let cache = packing.cache.as_deref();
        let quants = |format| Data::Quantised(Quants::interleave(weights, format, cache));
        let data = match (packing.format, packing.dtype) {
            (WeightFormat::Q8_0, _) => quants(Format::Q8_0),
            (WeightFormat::Q4_0, _) => quants(Format::Q4_0),
            (WeightFormat::Q4K, _) => quants(Format::Q4K),
            (_, DType::F32) => {
                Data::F32(fill((panels, inputs * NR), weights, cache, |x, at, out: &mut f32| *out = x[at]))
            }
            (_, DType::F16) => Data::F16(fill((panels, inputs * NR), weights, cache, |x, at, out: &mut u16| {
                *out = f16::from_f32(x[at]).to_bits()
            })),
            _ => Data::Bf16(fill((panels, pairs(inputs) * NR), weights, cache, |x, at, out: &mut u32| {
                let bits = |i: usize| x.get(i).map_or(0, |v| u32::from(bf16_bits(*v)));
                *out = bits(2 * at) | bits(2 * at + 1) << 16;
            })),
        };
        Self { outputs, inputs, data }
    }

    /// O; of interleaved matrices all columns of all panels.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// I.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes the weights take, padding included.
    pub(crate) fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(w) => w.len() * 4,
            Data::Bf16(w) => w.len() * 4,
            Data::F16(w) => w.len() * 2,
            Data::Quantised(w) => w.bytes(),
        }
    }

    pub(super) fn data(&self) -> &Data {
        &self.data
    }

    /// Words of one panel of numbers.
    ///
    /// # Panics
    /// If the matrix is quantised: its panels have several parts.
    pub(super) fn panel_len(&self) -> usize {
        match self.data {
            Data::Bf16(_) => pairs(self.inputs) * NR,
            Data::F32(_) | Data::F16(_) => self.inputs * NR,
            Data::Quantised(_) => unreachable!("quantised panels have parts"),
        }
    }

    /// Row `o` of the matrix as f32, `[I]`.
    pub(super) fn unpack_row(&self, o: usize, out: &mut [f32]) {
        if let Data::Quantised(w) = &self.data {
            return w.unpack_row(o, out);
        }
        let start = o / NR * self.panel_len() + o % NR;
        for (i, value) in out.iter_mut().enumerate() {
            *value = match &self.data {
                Data::F32(w) => w[start + i * NR],
                Data::Quantised(_) => unreachable!("returned above"),
                Data::F16(w) => f16::from_bits(w[start + i * NR]).to_f32(),
                Data::Bf16(w) => bf16::from_bits((w[start + i / 2 * NR] >> (16 * (i % 2))) as u16).to_f32(),
            };
        }
    }
}

/// Pairs of inputs in a panel of bf16.
fn pairs(inputs: usize) -> usize {
    inputs.next_multiple_of(BLOCK) / 2
}

/// Fills panels with `put(row, place within the row, word)`.
fn fill<W: Word + Send>(
    (panels, panel_len): (usize, usize),
    weights: &[&HostTensor],
    cache: Option<&PackCache>,
    put: impl Fn(&[f32], usize, &mut W) + Sync,
) -> Packed<W> {
    if let Some(words) = Packed::cached(cache, panels * panel_len) {
        return words;
    }
    let (rows, inputs) = weights[0].dims2();
    let mut words = Aligned::zeroed(panels * panel_len);
    words.par_chunks_exact_mut(panel_len.max(1)).enumerate().for_each_init(
        || vec![0.0; inputs],
        |row, (p, panel)| {
            let weight = weights[p % weights.len()];
            let first = p / weights.len() * NR;
            for column in 0..NR.min(rows - first) {
                weight.read_f32((first + column) * inputs, row);
                for (at, word) in panel[column..].iter_mut().step_by(NR).enumerate() {
                    put(row, at, word);
                }
            }
        },
    );
    Packed::keep(words, cache)
}
