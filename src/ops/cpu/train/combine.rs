//! From tokens to routed rows and back.
//!
//! A routing lists its rows sorted by expert; row r computes token `token_r[r]`. The rows of token t are
//! `row_of[starts_t1[t]..starts_t1[t + 1]]`, ascending; a token may have none.

use super::super::isa::multiversion;
use super::super::math;
use super::{chunk_elements, chunk_rows};
use rayon::prelude::*;

/// The rows of every token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenRows<'a> {
    /// `[T + 1]`
    pub starts_t1: &'a [u32],
    /// `[R]`
    pub row_of: &'a [u32],
}

impl<'a> TokenRows<'a> {
    pub(crate) fn of_routing(routing: &'a crate::moe::Routing) -> Self {
        Self { starts_t1: routing.starts_t1(), row_of: routing.row_of() }
    }

    fn tokens(&self) -> usize {
        self.starts_t1.len() - 1
    }

    #[inline(always)]
    fn of(&self, token: usize) -> &[u32] {
        &self.row_of[self.starts_t1[token] as usize..self.starts_t1[token + 1] as usize]
    }
}

/// Every token's sum over its rows of `y [R, D]`, each times its weight `w_r [R]`: `[T, D]`. Zeros where a token has
/// no row.
pub(crate) fn combine(y: &[f32], w_r: &[f32], width: usize, rows: TokenRows<'_>) -> Vec<f32> {
    let mut out = vec![0.0; rows.tokens() * width];
    let tokens = chunk_rows(width);
    out.par_chunks_mut(chunk_elements(width)).enumerate().for_each(|(chunk, out)| {
        combine_tokens(y, w_r, rows, chunk * tokens, width, out);
    });
    out
}

multiversion!(
    fn combine_tokens(y: &[f32], w_r: &[f32], rows: TokenRows<'_>, first: usize, width: usize, out: &mut [f32]) =
        combine_tokens_body
);

#[inline(always)]
fn combine_tokens_body(y: &[f32], w_r: &[f32], rows: TokenRows<'_>, first: usize, width: usize, out: &mut [f32]) {
    for (t, out) in out.chunks_exact_mut(width).enumerate() {
        for &row in rows.of(first + t) {
            let row = row as usize;
            let weight = w_r[row];
            out.iter_mut().zip(&y[row * width..(row + 1) * width]).for_each(|(o, y)| *o += weight * y);
        }
    }
}

/// Gradients of [`combine`] from `d_out [T, D]`: `(dy [R, D], dw_r [R])`.
pub(crate) fn combine_backward(
    y: &[f32],
    w_r: &[f32],
    width: usize,
    token_r: &[u32],
    d_out: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (mut dy, mut dw) = (vec![0.0; y.len()], vec![0.0; w_r.len()]);
    let (rows, chunk) = (chunk_rows(width), chunk_elements(width));
    y.par_chunks(chunk)
        .zip(w_r.par_chunks(rows))
        .zip(token_r.par_chunks(rows))
        .zip(dy.par_chunks_mut(chunk).zip(dw.par_chunks_mut(rows)))
        .for_each(|(((y, w), tokens), (dy, dw))| combine_backward_rows(y, w, tokens, d_out, dy, dw));
    (dy, dw)
}

multiversion!(
    fn combine_backward_rows(y: &[f32], w: &[f32], tokens: &[u32], d_out: &[f32], dy: &mut [f32], dw: &mut [f32]) =
        combine_backward_rows_body
);

#[inline(always)]
fn combine_backward_rows_body(y: &[f32], w: &[f32], tokens: &[u32], d_out: &[f32], dy: &mut [f32], dw: &mut [f32]) {
    let width = y.len() / tokens.len();
    let rows = y.chunks_exact(width).zip(dy.chunks_exact_mut(width)).zip(w.iter().zip(dw));
    for (((y, dy), (w, dw)), &token) in rows.zip(tokens) {
        let d_out = &d_out[token as usize * width..(token as usize + 1) * width];
        *dw = math::dot(y, d_out);
        dy.iter_mut().zip(d_out).for_each(|(dy, d)| *dy = w * d);
    }
}

/// Every token's sum over its rows of `dx_r [R, D]`, `[T, D]`: the gradient of what the rows were gathered from.
pub(crate) fn scatter_rows(dx_r: &[f32], width: usize, rows: TokenRows<'_>) -> Vec<f32> {
    let mut dx = vec![0.0; rows.tokens() * width];
    let tokens = chunk_rows(width);
    dx.par_chunks_mut(chunk_elements(width)).enumerate().for_each(|(chunk, dx)| {
        scatter_tokens(dx_r, rows, chunk * tokens, width, dx);
    });
    dx
}

multiversion!(
    fn scatter_tokens(dx_r: &[f32], rows: TokenRows<'_>, first: usize, width: usize, dx: &mut [f32]) =
        scatter_tokens_body
);

#[inline(always)]
fn scatter_tokens_body(dx_r: &[f32], rows: TokenRows<'_>, first: usize, width: usize, dx: &mut [f32]) {
    for (t, dx) in dx.chunks_exact_mut(width).enumerate() {
        for &row in rows.of(first + t) {
            let row = row as usize;
            dx.iter_mut().zip(&dx_r[row * width..(row + 1) * width]).for_each(|(dx, d)| *dx += d);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// Rows of tokens that each take part in some of 4 experts, token 1 in none.
    struct Rows {
        token_r: Vec<u32>,
        starts_t1: Vec<u32>,
        row_of: Vec<u32>,
    }

    impl Rows {
        fn new(tokens: usize) -> Self {
            let takes = |e: u32, t: u32| t != 1 && !(t + e).is_multiple_of(3);
            let token_r: Vec<u32> = (0..4).flat_map(|e| (0..tokens as u32).filter(move |t| takes(e, *t))).collect();
            let (mut starts_t1, mut row_of) = (vec![0], Vec::new());
            for t in 0..tokens as u32 {
                row_of.extend((0..token_r.len() as u32).filter(|r| token_r[*r as usize] == t));
                starts_t1.push(row_of.len() as u32);
            }
            Self { token_r, starts_t1, row_of }
        }

        fn lists(&self) -> TokenRows<'_> {
            TokenRows { starts_t1: &self.starts_t1, row_of: &self.row_of }
        }
    }

    fn reference(y: &[f64], w: &[f64], width: usize, tokens: usize, token_r: &[u32]) -> Vec<f64> {
        let mut out = vec![0.0; tokens * width];
        for (r, t) in token_r.iter().enumerate() {
            for i in 0..width {
                out[*t as usize * width + i] += w[r] * y[r * width + i];
            }
        }
        out
    }

    #[test]
    fn sums_over_rows_and_their_gradients_match_the_reference() {
        let (tokens, width) = (5, 19);
        let rows = Rows::new(tokens);
        let count = rows.token_r.len();
        let (y, w, d_out) = (random(count * width, 1), random(count, 2), random(tokens * width, 3));
        let out = combine(&y, &w, width, rows.lists());
        assert_close(&out, &reference(&wide(&y), &wide(&w), width, tokens, &rows.token_r));
        assert!(out[width..2 * width].iter().all(|o| *o == 0.0));
        let (dy, dw) = combine_backward(&y, &w, width, &rows.token_r, &d_out);
        let loss = |y: &[f64], w: &[f64]| inner(&reference(y, w, width, tokens, &rows.token_r), &d_out);
        assert_close(&dy, &numeric_gradient(&y, |y| loss(y, &wide(&w))));
        assert_close(&dw, &numeric_gradient(&w, |w| loss(&wide(&y), w)));
        let ones = vec![1.0; count];
        assert_eq!(scatter_rows(&y, width, rows.lists()), combine(&y, &ones, width, rows.lists()));
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (tokens, width) = (200, 400);
        let rows = Rows::new(tokens);
        let count = rows.token_r.len();
        let (y, w, d_out) = (random(count * width, 1), random(count, 2), random(tokens * width, 3));
        assert_same_bits_on_any_threads(|| {
            let (mut all, dw) = combine_backward(&y, &w, width, &rows.token_r, &d_out);
            all.extend(dw);
            all.extend(combine(&y, &w, width, rows.lists()));
            all.extend(scatter_rows(&y, width, rows.lists()));
            all
        });
    }
}
