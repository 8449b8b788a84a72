//! Entropies of softmaxes.

use super::isa::multiversion;
use super::math::{self, LANES};

/// What an exponential counts as, with what is done to it.
pub(super) const FLOPS_PER_EXP: usize = 20;

/// See [`crate::ops::softmax_entropy`].
pub(crate) fn softmax_entropy(z: &[f32]) -> f32 {
    let mut entropy = 0.0;
    entropy_of(z, &mut entropy);
    entropy
}

multiversion!(fn entropy_of(z: &[f32], entropy: &mut f32) = entropy_of_body);

#[inline(always)]
fn entropy_of_body(z: &[f32], entropy: &mut f32) {
    let max = math::max(z);
    // With w = e^(z − max) and s = Σw: H = log s − Σ w·(z − max) / s.
    let [sum, weighted] = math::sums_by(z, |z| {
        let e = math::exp(z - max);
        [e, e * (z - max)]
    });
    *entropy = sum.ln() - weighted / sum;
}

// H(softmax(scale · z)) for rows of `z`, a scale each.
multiversion!(pub(super) fn entropies_of(z: &[f32], scale_t: &[f32], entropies: &mut [f32]) = entropies_of_body);

#[inline(always)]
fn entropies_of_body(z: &[f32], scale_t: &[f32], entropies: &mut [f32]) {
    let width = z.len() / scale_t.len().max(1);
    let mut first = 0;
    first += side_by_side::<LANES>(z, width, scale_t, entropies);
    first += side_by_side::<4>(&z[first * width..], width, &scale_t[first..], &mut entropies[first..]);
    side_by_side::<1>(&z[first * width..], width, &scale_t[first..], &mut entropies[first..]);
}

/// `N` rows at a time, so that nothing is summed across lanes: bits are the same whatever N is. Returns how many it did.
#[inline(always)]
fn side_by_side<const N: usize>(z: &[f32], width: usize, scale_t: &[f32], entropies: &mut [f32]) -> usize {
    let (scales, _) = scale_t.as_chunks::<N>();
    if scales.is_empty() {
        return 0;
    }
    // What stands in a column, and its exponentials.
    let mut columns = vec![[[0.0; N]; 2]; width];
    let entropies = entropies.as_chunks_mut::<N>().0;
    for ((z, scales), entropies) in z.chunks_exact(N * width).zip(scales).zip(entropies) {
        let rows: [&[f32]; N] = std::array::from_fn(|lane| &z[lane * width..][..width]);
        let mut max = [f32::NEG_INFINITY; N];
        for (i, [column, _]) in columns.iter_mut().enumerate() {
            for lane in 0..N {
                column[lane] = rows[lane][i];
            }
            for lane in 0..N {
                column[lane] *= scales[lane];
                max[lane] = math::larger(max[lane], column[lane]);
            }
        }
        // Apart from the sums, so that these are vectors where there is one row.
        for [column, e] in &mut columns {
            for i in 0..N {
                column[i] -= max[i];
                e[i] = math::exp(column[i]);
            }
        }
        let [mut sum, mut weighted] = [[0.0; N]; 2];
        for [column, e] in &columns {
            for i in 0..N {
                sum[i] += e[i];
                weighted[i] += e[i] * column[i];
            }
        }
        for i in 0..N {
            entropies[i] = sum[i].ln() - weighted[i] / sum[i];
        }
    }
    scales.len() * N
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, numbers};

    fn softmax_entropies(z: &[f32], scale_t: &[f32]) -> Vec<f32> {
        let mut entropies = vec![0.0; scale_t.len()];
        entropies_of(z, scale_t, &mut entropies);
        entropies
    }

    #[test]
    fn entropies_of_rows_are_those_of_each_alone_and_bits_hang_on_no_other_row() {
        for width in [1, 2, 7, 16, 32, 50] {
            let z: Vec<f32> = numbers(7, 200 * width).iter().map(|z| 8.0 * z).collect();
            let scale_t: Vec<f32> = (0..200).map(|t| 0.5 + t as f32 / 200.0).collect();
            let together = softmax_entropies(&z, &scale_t);
            let alone = z.chunks_exact(width).zip(&scale_t).map(|(z, scale)| {
                let scaled: Vec<f32> = z.iter().map(|z| z * scale).collect();
                softmax_entropy(&scaled)
            });
            assert_close(&together, &alone.collect::<Vec<_>>(), 1e-5);
            for rows in [0..1, 3..20, 150..200] {
                let some = softmax_entropies(&z[rows.start * width..rows.end * width], &scale_t[rows.clone()]);
                assert!(some.iter().zip(&together[rows]).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
        assert_close(&softmax_entropies(&[3.0; 8], &[1.0; 2]), &[4.0f32.ln(); 2], 1e-6);
        assert!(softmax_entropies(&[1.0, f32::NAN, 1.0, 2.0], &[1.0; 2])[0].is_nan());
        assert!(softmax_entropies(&[], &[]).is_empty());
    }
}
