//! Biases of projections.

use super::super::isa::multiversion;
use super::{add_in_order, chunk_elements};
use rayon::prelude::*;

/// Adds `b [W]` to every row of `y [T, W]`.
pub(crate) fn add_bias(y: &mut [f32], b: &[f32]) {
    y.par_chunks_mut(chunk_elements(b.len())).for_each(|y| add_to_rows(y, b));
}

multiversion!(fn add_to_rows(y: &mut [f32], b: &[f32]) = add_to_rows_body);

#[inline(always)]
fn add_to_rows_body(y: &mut [f32], b: &[f32]) {
    for y in y.chunks_exact_mut(b.len()) {
        y.iter_mut().zip(b).for_each(|(y, b)| *y += b);
    }
}

/// The sum of the rows of `dy [T, width]`: the gradient of a bias.
pub(crate) fn sum_of_rows(dy: &[f32], width: usize) -> Vec<f32> {
    let sums: Vec<_> = dy
        .par_chunks(chunk_elements(width))
        .map(|dy| {
            let mut sum = vec![0.0; width];
            add_rows(dy, &mut sum);
            sum
        })
        .collect();
    add_in_order(sums, width)
}

multiversion!(fn add_rows(dy: &[f32], sum: &mut [f32]) = add_rows_body);

#[inline(always)]
fn add_rows_body(dy: &[f32], sum: &mut [f32]) {
    for dy in dy.chunks_exact(sum.len()) {
        sum.iter_mut().zip(dy).for_each(|(s, d)| *s += d);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn every_row_gets_the_bias_and_gives_its_gradient() {
        let (rows, width) = (700, 101);
        let (y, b) = (random(rows * width, 1), random(width, 2));
        let mut sum = y.clone();
        add_bias(&mut sum, &b);
        assert!((0..y.len()).all(|i| sum[i] == y[i] + b[i % width]));
        let column = |c: usize| (0..rows).map(|r| f64::from(y[r * width + c])).sum::<f64>();
        assert_close(&sum_of_rows(&y, width), &(0..width).map(column).collect::<Vec<_>>());
        assert_same_bits_on_any_threads(|| sum_of_rows(&y, width));
    }
}
