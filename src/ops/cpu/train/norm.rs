//! RMS norm and layer norm of rows `[T, D]`. Backward computes the scale again and needs nothing from forward.

use super::super::isa::multiversion;
use super::super::math;
use super::super::norm::rms_scale;
use super::{add_in_order, chunk_elements};
use rayon::prelude::*;

/// `y = x / √(mean(x²) + eps) ⊙ w`, `[T, D]`.
pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    let chunk = chunk_elements(w.len());
    x.par_chunks(chunk).zip(y.par_chunks_mut(chunk)).for_each(|(x, y)| rms_norm_rows(x, w, eps, y));
    y
}

multiversion!(fn rms_norm_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) = rms_norm_rows_body);

#[inline(always)]
fn rms_norm_rows_body(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let scale = rms_scale(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    }
}

/// Gradients of [`rms_norm`] from that of its result: `(dx [T, D], dw [D])`.
pub(crate) fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut dx = vec![0.0; x.len()];
    let chunk = chunk_elements(w.len());
    let chunks = x.par_chunks(chunk).zip(dy.par_chunks(chunk)).zip(dx.par_chunks_mut(chunk));
    let dw: Vec<_> = chunks
        .map(|((x, dy), dx)| {
            let mut dw = vec![0.0; w.len()];
            rms_norm_backward_rows(x, w, eps, dy, dx, &mut dw);
            dw
        })
        .collect();
    (dx, add_in_order(dw, w.len()))
}

multiversion!(
    fn rms_norm_backward_rows(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]) =
        rms_norm_backward_rows_body
);

#[inline(always)]
fn rms_norm_backward_rows_body(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let width = w.len();
    for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
        let scale = rms_scale(x, eps);
        for ((((dx, dw), x), dy), w) in dx.iter_mut().zip(&mut *dw).zip(x).zip(dy).zip(w) {
            *dw += dy * (x * scale);
            *dx = dy * w;
        }
        // With x̂ = scale·x and g = dy ⊙ w: dx = scale·(g − x̂·mean(g ⊙ x̂)).
        let along = math::dot(dx, x) / width as f32 * scale * scale;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = scale * (*dx - x * along);
        }
    }
}

/// `y = (x − mean(x)) / √(var(x) + eps) ⊙ w + b`, `[T, D]`.
pub(crate) fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    let chunk = chunk_elements(w.len());
    x.par_chunks(chunk).zip(y.par_chunks_mut(chunk)).for_each(|(x, y)| layer_norm_rows(x, w, b, eps, y));
    y
}

multiversion!(fn layer_norm_rows(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) = layer_norm_rows_body);

#[inline(always)]
fn layer_norm_rows_body(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let (mean, scale) = mean_and_scale(x, eps);
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = (x - mean) * scale * w + b;
        }
    }
}

#[inline(always)]
fn mean_and_scale(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = math::sum_by(x, x, |x, _| x) / x.len() as f32;
    let variance = math::sum_by(x, x, |x, _| (x - mean) * (x - mean)) / x.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Gradients of [`layer_norm`], which do not depend on its bias: `(dx [T, D], dw [D], db [D])`.
pub(crate) fn layer_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut dx = vec![0.0; x.len()];
    let chunk = chunk_elements(w.len());
    let chunks = x.par_chunks(chunk).zip(dy.par_chunks(chunk)).zip(dx.par_chunks_mut(chunk));
    let (dw, db): (Vec<_>, Vec<_>) = chunks
        .map(|((x, dy), dx)| {
            let (mut dw, mut db) = (vec![0.0; w.len()], vec![0.0; w.len()]);
            layer_norm_backward_rows(x, w, eps, dy, dx, (&mut dw, &mut db));
            (dw, db)
        })
        .unzip();
    (dx, add_in_order(dw, w.len()), add_in_order(db, w.len()))
}

multiversion!(
    fn layer_norm_backward_rows(
        x: &[f32],
        w: &[f32],
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        dw_db: (&mut [f32], &mut [f32]),
    ) = layer_norm_backward_rows_body
);

#[inline(always)]
fn layer_norm_backward_rows_body(
    x: &[f32],
    w: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    (dw, db): (&mut [f32], &mut [f32]),
) {
    let width = w.len();
    for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
        let (mean, scale) = mean_and_scale(x, eps);
        for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
            *dx = dy * w;
        }
        for (((dw, db), x), dy) in dw.iter_mut().zip(&mut *db).zip(x).zip(dy) {
            *dw += dy * ((x - mean) * scale);
            *db += dy;
        }
        // With x̂ = scale·(x − mean) and g = dy ⊙ w: dx = scale·(g − mean(g) − x̂·mean(g ⊙ x̂)).
        let level = math::sum_by(dx, dx, |g, _| g) / width as f32;
        let along = math::sum_by(dx, x, |g, x| g * (x - mean)) / width as f32 * scale * scale;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = scale * (*dx - level - (x - mean) * along);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const EPS: f32 = 1e-3;

    fn rms_reference(x: &[f64], w: &[f64]) -> Vec<f64> {
        let norm = |x: &[f64]| {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + f64::from(EPS)).sqrt();
            x.iter().zip(w).map(|(x, w)| x * scale * w).collect::<Vec<_>>()
        };
        x.chunks(w.len()).flat_map(norm).collect()
    }

    fn layer_reference(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
        let norm = |x: &[f64]| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (variance + f64::from(EPS)).sqrt();
            x.iter().zip(w).zip(b).map(|((x, w), b)| (x - mean) * scale * w + b).collect::<Vec<_>>()
        };
        x.chunks(w.len()).flat_map(norm).collect()
    }

    #[test]
    fn rms_norm_and_its_gradients_match_the_reference() {
        for width in [1, 5, 16, 37] {
            let (x, w, dy) = (random(3 * width, 1), random(width, 2), random(3 * width, 3));
            assert_close(&rms_norm(&x, &w, EPS), &rms_reference(&wide(&x), &wide(&w)));
            let (dx, dw) = rms_norm_backward(&x, &w, EPS, &dy);
            assert_close(&dx, &numeric_gradient(&x, |x| inner(&rms_reference(x, &wide(&w)), &dy)));
            assert_close(&dw, &numeric_gradient(&w, |w| inner(&rms_reference(&wide(&x), w), &dy)));
        }
    }

    #[test]
    fn layer_norm_and_its_gradients_match_the_reference() {
        for width in [3, 5, 16, 37] {
            let (x, dy) = (random(3 * width, 1), random(3 * width, 3));
            let (w, b) = (random(width, 2), random(width, 4));
            assert_close(&layer_norm(&x, &w, &b, EPS), &layer_reference(&wide(&x), &wide(&w), &wide(&b)));
            let (dx, dw, db) = layer_norm_backward(&x, &w, EPS, &dy);
            assert_close(&dx, &numeric_gradient(&x, |x| inner(&layer_reference(x, &wide(&w), &wide(&b)), &dy)));
            assert_close(&dw, &numeric_gradient(&w, |w| inner(&layer_reference(&wide(&x), w, &wide(&b)), &dy)));
            assert_close(&db, &numeric_gradient(&b, |b| inner(&layer_reference(&wide(&x), &wide(&w), b), &dy)));
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (x, w, dy) = (random(700 * 256, 1), random(256, 2), random(700 * 256, 3));
        assert_same_bits_on_any_threads(|| {
            let (mut all, dw) = rms_norm_backward(&x, &w, EPS, &dy);
            let (dx, layer_dw, db) = layer_norm_backward(&x, &w, EPS, &dy);
            for part in [dw, dx, layer_dw, db, rms_norm(&x, &w, EPS), layer_norm(&x, &w, &w, EPS)] {
                all.extend(part);
            }
            all
        });
    }
}
