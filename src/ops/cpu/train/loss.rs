//! Cross-entropy over a large vocabulary without all logits at once.
//!
//! Rows are taken in chunks whose logits fit in a buffer of 256 MiB. Ignored rows are left out before anything is
//! multiplied.

use super::super::gemm::{Matrix, Precision, Product, products};
use super::super::isa::multiversion;
use super::super::math;
use super::chunk_rows;
use rayon::prelude::*;

/// Target of a row that is ignored.
pub(crate) const IGNORED: u32 = u32::MAX;

/// The last hidden states, the head that makes logits of them, and what should have come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head<'a> {
    /// `[T, D]`
    pub x: &'a [f32],
    /// `[V, D]`
    pub w: &'a [f32],
    /// D
    pub width: usize,
    /// `[T]`, each below V or [`IGNORED`].
    pub targets: &'a [u32],
    pub precision: Precision,
}

/// How well a target was foreseen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Negative log-likelihood; 0 for an ignored row.
    pub nll: f32,
    /// Logits strictly above the target's: 0 if none is.
    pub rank: u32,
}

/// Losses and gradients of a [`Head`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LossGradients {
    /// `[T]`
    pub nll: Vec<f32>,
    /// `[T, D]`
    pub dx: Vec<f32>,
    /// `[V, D]`
    pub dw: Vec<f32>,
}

/// What becomes of one row of logits, which may become the row's gradient: its target, and the row.
type RowFn<'a, R> = dyn Fn(u32, &mut [f32]) -> R + Sync + 'a;

impl Head<'_> {
    /// The loss of every row, and its target's rank among the logits.
    pub(crate) fn scores(&self) -> Vec<Score> {
        let mut scores = vec![Score::default(); self.targets.len()];
        let row = |target: u32, logits: &mut [f32]| {
            let logit = logits[target as usize];
            let mut rank = 0;
            count_above(logits, logit, &mut rank);
            Score { nll: log_sum_exp(logits) - logit, rank }
        };
        self.each_chunk(&row, |rows, found, _| {
            for (row, score) in rows.iter().zip(found) {
                scores[*row as usize] = score;
            }
        });
        scores
    }

    fn vocab(&self) -> usize {
        self.w.len() / self.width
    }

    /// The losses of all rows, and the gradients of their sum times `scale`.
    pub(crate) fn gradients(&self, scale: f32) -> LossGradients {
        let (width, vocab) = (self.width, self.vocab());
        let mut nll = vec![0.0; self.targets.len()];
        let (mut dx, mut dw) = (vec![0.0; self.x.len()], vec![0.0; self.w.len()]);
        let mut chunk = Vec::new();
        let mut accumulate = false;
        // A row's logits become their gradient.
        let row = |target: u32, logits: &mut [f32]| {
            let lse = log_sum_exp(logits);
            let nll = lse - logits[target as usize];
            scaled_softmax(logits, lse, scale);
            logits[target as usize] -= scale;
            nll
        };
        self.each_chunk(&row, |rows, found, d_logits| {
            chunk.resize(rows.len() * width, 0.0);
            let d_logits = Matrix::new(d_logits, rows.len(), vocab);
            let d_rows = Product::new(d_logits, Matrix::new(self.w, vocab, width), &mut chunk);
            let mut d_weight = Product::new(d_logits.t(), self.rows(rows), &mut dw);
            if accumulate {
                d_weight = d_weight.accumulate();
            }
            products(&mut [d_rows, d_weight], self.precision);
            accumulate = true;
            for ((row, dx_row), n) in rows.iter().zip(chunk.chunks_exact(width)).zip(found) {
                let row = *row as usize;
                nll[row] = n;
                dx[row * width..(row + 1) * width].copy_from_slice(dx_row);
            }
        });
        LossGradients { nll, dx, dw }
    }

    fn rows<'a>(&'a self, rows: &'a [u32]) -> Matrix<'a> {
        Matrix::new(self.x, self.targets.len(), self.width).gathered(rows)
    }

    /// Calls `row` for every row that is not ignored, on all threads, and `chunk` with some of them after the other:
    /// their numbers, what `row` gave, and what it left of their logits.
    fn each_chunk<R: Send>(&self, row: &RowFn<'_, R>, mut chunk: impl FnMut(&[u32], Vec<R>, &[f32])) {
        let vocab = self.vocab();
        let kept: Vec<u32> = (0..).zip(self.targets).filter(|(_, t)| **t != IGNORED).map(|(row, _)| row).collect();
        let at_once = rows_at_once(vocab).min(kept.len()).max(1);
        let mut logits = vec![0.0; at_once * vocab];
        for rows in kept.chunks(at_once) {
            let logits = &mut logits[..rows.len() * vocab];
            let weight = Matrix::new(self.w, vocab, self.width).t();
            products(&mut [Product::new(self.rows(rows), weight, logits)], self.precision);
            let found = logits
                .par_chunks_exact_mut(vocab)
                .zip(rows)
                .with_min_len(chunk_rows(vocab))
                .map(|(logits, at)| row(self.targets[*at as usize], logits))
                .collect();
            chunk(rows, found, logits);
        }
    }
}

/// Rows whose logits are in memory at once: at most 2²⁶ logits (256 MiB) if the vocabulary allows, and no more than a
/// product needs to be fast.
fn rows_at_once(vocab: usize) -> usize {
    const ROWS: usize = 1024;
    ((1 << 26) / vocab.max(1)).clamp(1, ROWS)
}

multiversion!(fn scaled_softmax(logits: &mut [f32], lse: f32, scale: f32) = scaled_softmax_body);

#[inline(always)]
fn scaled_softmax_body(logits: &mut [f32], lse: f32, scale: f32) {
    logits.iter_mut().for_each(|z| *z = scale * math::exp(*z - lse));
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let mut lse = 0.0;
    log_sum_exp_to(logits, &mut lse);
    lse
}

multiversion!(fn log_sum_exp_to(logits: &[f32], lse: &mut f32) = log_sum_exp_body);

#[inline(always)]
fn log_sum_exp_body(logits: &[f32], lse: &mut f32) {
    *lse = math::log_sum_exp(logits);
}

multiversion!(fn count_above(logits: &[f32], than: f32, count: &mut u32) = count_above_body);

#[inline(always)]
fn count_above_body(logits: &[f32], than: f32, count: &mut u32) {
    *count = logits.iter().map(|z| u32::from(*z > than)).sum();
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const D: usize = 6;
    const V: usize = 21;
    const TARGETS: [u32; 5] = [3, IGNORED, 20, 0, 3];

    fn reference(x: &[f64], w: &[f64], targets: &[u32]) -> Vec<f64> {
        let loss = |(x, target): (&[f64], &u32)| {
            if *target == IGNORED {
                return 0.0;
            }
            let logits: Vec<f64> = w.chunks(D).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum()).collect();
            logits.iter().map(|z: &f64| z.exp()).sum::<f64>().ln() - logits[*target as usize]
        };
        x.chunks(D).zip(targets).map(loss).collect()
    }

    fn inputs() -> (Vec<f32>, Vec<f32>) {
        (random(TARGETS.len() * D, 1).iter().map(|x| 3.0 * x).collect(), random(V * D, 2))
    }

    fn head<'a>(x: &'a [f32], w: &'a [f32], targets: &'a [u32]) -> Head<'a> {
        Head { x, w, width: D, targets, precision: Precision::F32 }
    }

    #[test]
    fn losses_and_gradients_match_the_reference() {
        let (x, w) = inputs();
        let found = head(&x, &w, &TARGETS).gradients(0.3);
        assert_close(&found.nll, &reference(&wide(&x), &wide(&w), &TARGETS));
        let scales = [0.3; TARGETS.len()];
        assert_close(&found.dx, &numeric_gradient(&x, |x| inner(&reference(x, &wide(&w), &TARGETS), &scales)));
        assert_close(&found.dw, &numeric_gradient(&w, |w| inner(&reference(&wide(&x), w, &TARGETS), &scales)));
    }

    #[test]
    fn ignored_rows_have_neither_loss_nor_gradient() {
        let (x, w) = inputs();
        let targets = [IGNORED; 5];
        let all = head(&x, &w, &targets).gradients(1.0);
        assert_eq!(all, LossGradients { nll: vec![0.0; 5], dx: vec![0.0; 5 * D], dw: vec![0.0; V * D] });
    }

    #[test]
    fn ranks_count_the_logits_above_the_target() {
        let (x, w) = inputs();
        let head = head(&x, &w, &TARGETS);
        let losses = head.gradients(1.0);
        for (t, score) in head.scores().iter().enumerate() {
            assert_eq!(score.nll, losses.nll[t]);
            let logit = |v: u32| (0..D).map(|i| x[t * D + i] * w[v as usize * D + i]).sum::<f32>();
            let target = TARGETS[t];
            let want = if target == IGNORED { 0 } else { (0..V as u32).filter(|v| logit(*v) > logit(target)).count() };
            assert_eq!(score.rank as usize, want, "{t}");
        }
    }

    #[test]
    fn chunks_of_rows_add_up_and_bits_do_not_depend_on_threads() {
        let rows = 2 * rows_at_once(V) + 7;
        let (x, w) = (random(rows * D, 1), random(V * D, 2));
        let targets: Vec<u32> = (0..rows as u32).map(|t| if t % 11 == 0 { IGNORED } else { t % V as u32 }).collect();
        let all = head(&x, &w, &targets).gradients(0.5);
        assert_close(&all.nll, &reference(&wide(&x), &wide(&w), &targets));
        let mut dw = vec![0.0f64; w.len()];
        for from in (0..rows).step_by(100) {
            let to = rows.min(from + 100);
            let part = head(&x[from * D..to * D], &w, &targets[from..to]).gradients(0.5);
            assert_close(&part.dx, &wide(&all.dx[from * D..to * D]));
            dw.iter_mut().zip(&part.dw).for_each(|(sum, d)| *sum += f64::from(*d));
        }
        assert_close(&all.dw, &dw);
        assert_same_bits_on_any_threads(|| {
            let LossGradients { mut nll, dx, dw } = head(&x, &w, &targets).gradients(0.5);
            nll.extend(dx);
            nll.extend(dw);
            nll.extend(head(&x, &w, &targets).scores().iter().map(|s| s.nll));
            nll
        });
    }
}
