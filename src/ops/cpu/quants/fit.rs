//! From weights to codes.

use super::{Format, GROUP, SUPER};
use crate::ops::cpu::isa::multiversion;
use crate::ops::cpu::pack::{BLOCK, NR};
use half::f16;

/// Where one output of a panel writes its codes.
pub(super) struct Columns<'a> {
    pub column: usize,
    pub codes: &'a mut [u8],
    pub scales: &'a mut [u16],
    pub multiples: &'a mut [u8],
}

impl Columns<'_> {
    /// Quantises an output's weights, whole blocks.
    pub(super) fn quantise(self, format: Format, weights: &[f32]) {
        let Self { column, codes, scales, multiples } = self;
        if format == Format::Q4K {
            let blocks = codes.chunks_mut(SUPER * format.block_bytes()).zip(multiples.chunks_mut(SUPER * 2 * NR));
            for (((codes, multiples), scales), weights) in
                blocks.zip(scales.chunks_exact_mut(2 * NR)).zip(weights.chunks(SUPER * BLOCK))
            {
                Columns { column, codes, scales, multiples }.quantise_super(weights);
            }
            return;
        }
        let blocks = codes.chunks_exact_mut(format.block_bytes()).zip(scales.chunks_exact_mut(NR));
        for ((codes, scales), weights) in blocks.zip(weights.chunks_exact(BLOCK)) {
            let largest = weights.iter().fold(0.0f32, |largest, x| if x.abs() > largest.abs() { *x } else { largest });
            let scale = f16::from_f32(if format == Format::Q8_0 { largest.abs() / 127.0 } else { largest / -8.0 });
            let (wide, [least, most]) =
                (scale.to_f32(), if format == Format::Q8_0 { [-127.0, 127.0] } else { [-8.0, 7.0] });
            let code = |x: f32| if wide == 0.0 { 0 } else { (x / wide).round().clamp(least, most) as i8 };
            if format == Format::Q8_0 {
                let groups = codes[column * GROUP..].chunks_mut(NR * GROUP).zip(weights.chunks_exact(GROUP));
                for (codes, weights) in groups {
                    codes.iter_mut().zip(weights).for_each(|(to, x)| *to = code(*x).cast_unsigned());
                }
            } else {
                write_four(codes, column, weights, |x| (code(x) + 8) as u8);
            }
            scales[column] = scale.to_bits();
        }
    }

    /// Up to [`SUPER`] blocks of `Q4K`.
    fn quantise_super(self, weights: &[f32]) {
        let Self { column, codes, scales, multiples } = self;
        let mut fits = [Fit::default(); SUPER];
        for (fit, weights) in fits.iter_mut().zip(weights.as_chunks().0) {
            fit_block(weights, fit);
        }
        let largest = |of: fn(&Fit) -> f32| f16::from_f32(fits.iter().map(of).fold(0.0, f32::max) / MULTIPLE_MAX);
        let shared = [largest(|fit| fit.step), largest(|fit| fit.offset)];
        let [steps, offsets] = shared.map(f16::to_f32);
        scales[column] = shared[0].to_bits();
        scales[NR + column] = shared[1].to_bits();
        let blocks = codes.chunks_exact_mut(Format::Q4K.block_bytes()).zip(multiples.chunks_exact_mut(2 * NR));
        for (((codes, multiples), weights), fit) in blocks.zip(weights.chunks_exact(BLOCK)).zip(fits) {
            let multiple = |x: f32, scale: f32| if scale == 0.0 { 0.0 } else { (x / scale).round().min(MULTIPLE_MAX) };
            let (step, offset) = (multiple(fit.step, steps), multiple(fit.offset, offsets));
            multiples[column] = step as u8;
            multiples[NR + column] = offset as u8;
            let (step, offset) = (step * steps, offset * offsets);
            write_four(codes, column, weights, |x| {
                if step == 0.0 { 0 } else { ((x + offset) / step).round().clamp(0.0, CODE_MAX) as u8 }
            });
        }
    }
}

/// Codes of a column's block, into their half of the bytes, which must be zero.
fn write_four(codes: &mut [u8], column: usize, weights: &[f32], code: impl Fn(f32) -> u8) {
    let (place, shift) = (column % (NR / 2), column / (NR / 2) * 4);
    let groups = codes[place * GROUP..].chunks_mut(NR / 2 * GROUP).zip(weights.chunks_exact(GROUP));
    for (codes, weights) in groups {
        codes.iter_mut().zip(weights).for_each(|(to, x)| *to |= code(*x) << shift);
    }
}

/// Largest code, and largest multiple of a scale, of `Q4K`.
const CODE_MAX: f32 = 15.0;
const MULTIPLE_MAX: f32 = 63.0;

/// A block as step · code − offset. Neither is negative.
#[derive(Clone, Copy, Default)]
struct Fit {
    step: f32,
    offset: f32,
}

/// Numbers that are summed side by side.
const LANES: usize = 16;
/// Steps that are tried: 15 to (range of the block) and this much more or less, by tenths.
const TRIES: std::ops::RangeInclusive<i32> = -10..=10;

multiversion!(fn fit_block(weights: &[f32; BLOCK], best: &mut Fit) = fit_block_body);

/// The step and offset of least squared error, where large weights count more: for each of several steps, codes are rounded,
/// and then step and offset solved for by linear regression on the codes.
#[inline(always)]
fn fit_block_body(weights: &[f32; BLOCK], best: &mut Fit) {
    let low = weights.iter().fold(0.0f32, |low, x| low.min(*x));
    let high = weights.iter().fold(f32::NEG_INFINITY, |high, x| high.max(*x));
    *best = Fit { step: 0.0, offset: -low };
    if high <= low {
        return;
    }
    let rms = (sum(|i| weights[i] * weights[i]) / BLOCK as f32).sqrt();
    let counts: [f32; BLOCK] = std::array::from_fn(|i| rms + weights[i].abs());
    let (n, x, xx) =
        (sum(|i| counts[i]), sum(|i| counts[i] * weights[i]), sum(|i| counts[i] * weights[i] * weights[i]));
    let mut least = f32::INFINITY;
    for tenths in TRIES {
        let inverse = (CODE_MAX + 0.1 * tenths as f32) / (high - low);
        let codes: [f32; BLOCK] =
            std::array::from_fn(|i| ((weights[i] - low) * inverse).round_ties_even().clamp(0.0, CODE_MAX));
        let c = sum(|i| counts[i] * codes[i]);
        let cc = sum(|i| counts[i] * codes[i] * codes[i]);
        let cx = sum(|i| counts[i] * codes[i] * weights[i]);
        let determinant = n * cc - c * c;
        let mut fit = Fit { step: (n * cx - x * c) / determinant, offset: (c * cx - cc * x) / determinant };
        // With but one code the determinant is 0.
        let regular = determinant > 1e-5 * n * cc;
        if !regular || fit.offset < 0.0 {
            fit = Fit { step: cx / cc, offset: 0.0 };
        }
        let Fit { step, offset } = fit;
        let error =
            xx - 2.0 * (step * cx - offset * x) + step * step * cc - 2.0 * step * offset * c + offset * offset * n;
        if step > 0.0 && error < least {
            (least, *best) = (error, fit);
        }
    }
}

/// Σ over a block, in one order with every instruction set.
#[inline(always)]
fn sum(of: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for first in (0..BLOCK).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += of(first + lane);
        }
    }
    lanes.iter().sum()
}
