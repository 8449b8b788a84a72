//! What the tests of the kernels share: random inputs, numeric gradients, comparisons.

use super::dropout::mix;

/// `n` numbers in ±1, the same for the same seed.
pub(super) fn random(n: usize, seed: u32) -> Vec<f32> {
    (0..n).map(|i| mix(mix(i as u32, 77), seed) as f32 / (1u64 << 31) as f32 - 1.0).collect()
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Σ aᵢ·bᵢ, the scalar whose gradient by `a` is `b`.
pub(super) fn inner(a: &[f64], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// The gradient of `f` at `x` by central differences.
pub(super) fn numeric_gradient(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = wide(x);
    (0..x.len())
        .map(|i| {
            let here = x[i];
            x[i] = here + STEP;
            let above = f(&x);
            x[i] = here - STEP;
            let below = f(&x);
            x[i] = here;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Every element within 2·10⁻⁵ of the largest.
#[track_caller]
pub(super) fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-3f64, |m, w| m.max(w.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= 2e-5 * scale, "element {i} is {g}, not {w}, of at most {scale}");
    }
}

/// That `f` gives the same bits on one thread and on two.
#[track_caller]
pub(super) fn assert_same_bits_on_any_threads(f: impl Fn() -> Vec<f32> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(&f).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(on(1) == on(2));
}
