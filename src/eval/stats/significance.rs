//! Tests of two arms on the same samples, and the correction for testing often.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// McNemar's exact test, two-sided: the chance that, of the samples that only one of two arms got right, at least so
/// uneven a share fell to one of them, were both equally likely. `2·P(X ≤ min(b, c))`, X ~ Binomial(b + c, ½).
pub fn mcnemar(only_arm: u64, only_against: u64) -> f64 {
    let (k, n) = (only_arm.min(only_against) as f64, only_arm as f64 + only_against as f64);
    if only_arm == only_against {
        return 1.0;
    }
    // Relative to the greatest term, P(X = k), each further term is its neighbour's i / (n − i + 1).
    let (mut i, mut term, mut sum) = (k, 1.0, 1.0);
    while i > 0.0 && term > sum * f64::EPSILON {
        term *= i / (n - i + 1.0);
        sum += term;
        i -= 1.0;
    }
    let greatest = ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k) - n * std::f64::consts::LN_2;
    (2.0 * (greatest.exp() * sum)).min(1.0)
}

/// ln n! by Stirling's series from 20 on, where its error is below 1e-14.
fn ln_factorial(n: f64) -> f64 {
    if n < 20.0 {
        return (2..=n as u64).map(|i| i as f64).product::<f64>().ln();
    }
    let series = (1.0 / 12.0 - (1.0 / 360.0 - 1.0 / (1260.0 * n * n)) / (n * n)) / n;
    n * n.ln() - n + 0.5 * (std::f64::consts::TAU * n).ln() + series
}

/// Sign-flip permutation test of paired differences, two-sided: how often the sum of differences of random sign is at
/// least as far from zero as the sum found. All signs are tried where there are at most `resamples` of them; otherwise
/// that many are drawn, and the one found counts as one more, so that p is never 0.
///
/// 1 where no difference is other than zero, or where one is not finite.
pub fn sign_flip(differences: &[f64], resamples: usize, seed: u64) -> f64 {
    let differences: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
    let size: f64 = differences.iter().map(|d| d.abs()).sum();
    if differences.is_empty() || !size.is_finite() {
        return 1.0;
    }
    // Sums that are equal but for rounding count as equal.
    let found = differences.iter().sum::<f64>().abs() - 1e-12 * size;
    let as_far = |signs: &mut dyn FnMut() -> u64| signed_sum(&differences, signs).abs() >= found;
    if differences.len() < 32 && 1usize << differences.len() <= resamples {
        let all = 1u64 << differences.len();
        let count = (0..all).filter(|signs| as_far(&mut || *signs)).count();
        return count as f64 / all as f64;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = (0..resamples).filter(|_| as_far(&mut || rng.next_u64())).count();
    (count + 1) as f64 / (resamples + 1) as f64
}

/// Sum of `values`, each negated where its bit is set; `signs` gives the bits of the next 64.
fn signed_sum(values: &[f64], signs: &mut dyn FnMut() -> u64) -> f64 {
    let mut sum = 0.0;
    for chunk in values.chunks(64) {
        let mut bits = signs();
        for value in chunk {
            sum += f64::from_bits(value.to_bits() ^ (bits << 63));
            bits >>= 1;
        }
    }
    sum
}

/// Holm's step-down correction: p-values, in their order, that may be held against one level together. The i-th
/// smallest of m is multiplied by m − i + 1, is never below a smaller one's, and stays at most 1.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let mut corrected = vec![1.0; p.len()];
    let mut least: f64 = 0.0;
    for (rank, at) in order.into_iter().enumerate() {
        least = least.max(p[at] * (p.len() - rank) as f64).min(1.0);
        corrected[at] = least;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mcnemar_is_the_exact_binomial_test_of_scipy() {
        for (b, c, p) in [
            (0, 1, 1.0),
            (5, 5, 1.0),
            (3, 4, 1.0),
            (0, 10, 0.001953125),
            (2, 11, 0.0224609375),
            (10, 25, 0.016673847800120715),
            (120, 80, 0.005685155996750306),
            (700, 812, 0.004293681537359062),
            (5000, 5300, 0.003215819673645259),
            (40000, 41000, 0.0004478218231375636),
            (1, 400, 1.556781949769426e-118),
        ] {
            let found = mcnemar(b, c);
            assert!((found - p).abs() <= 2e-9 * p, "mcnemar({b}, {c}) = {found}, scipy says {p}");
        }
    }

    #[test]
    fn mcnemar_of_counts_beyond_any_table_is_still_a_probability() {
        assert_eq!(mcnemar(0, 0), 1.0);
        assert_eq!(mcnemar(0, 5000), 0.0, "below the least double");
        assert_eq!(mcnemar(1 << 62, 1 << 62), 1.0);
        assert_eq!(mcnemar(u64::MAX, 0), 0.0);
    }

    #[test]
    fn factorials_are_right_where_the_series_begins() {
        let exact = |n: u32| (2..=n).map(|i| f64::from(i).ln()).sum::<f64>();
        for n in [0, 1, 2, 19, 20, 21, 100, 1000] {
            assert!((ln_factorial(f64::from(n)) - exact(n)).abs() < 1e-11, "ln {n}!");
        }
    }

    #[test]
    fn few_differences_are_tested_exactly_as_scipy_does() {
        for (differences, p) in [
            (&[1.0, 2.0, 3.0][..], 0.25),
            (&[0.5, -0.25, 0.75, 1.5, -0.1], 0.25),
            (&[1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0], 0.125),
            (&[0.2, 0.3, -0.9, 0.05, 0.4, 0.6, -0.15, 0.8], 0.4140625),
        ] {
            assert!((sign_flip(differences, 100_000, 1) - p).abs() < 1e-12, "{differences:?}");
        }
    }

    #[test]
    fn drawn_signs_come_near_all_signs() {
        let differences = [0.9, -0.2, 0.4, 1.1, -0.3, 0.8, 0.1, -0.6, 0.5, 0.7, 0.2];
        let (exact, drawn) = (sign_flip(&differences, 1 << 11, 1), sign_flip(&differences, 2000, 1));
        assert!((exact - drawn).abs() < 0.02 && exact != drawn, "{exact} and {drawn}");
        assert_eq!(drawn, sign_flip(&differences, 2000, 1));
    }

    #[test]
    fn under_the_null_a_test_is_seldom_significant() {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut differences = || -> Vec<f64> { (0..40).map(|_| rng.next_u32() as i32 as f64).collect() };
        let significant = (0..400).filter(|seed| sign_flip(&differences(), 200, *seed) <= 0.05).count();
        assert!((6..=36).contains(&significant), "{significant} of 400 at the 5 % level");
    }

    #[test]
    fn sign_flips_of_nothing_or_of_no_numbers_prove_nothing() {
        for differences in [&[][..], &[0.0, 0.0], &[f64::NAN, 1.0], &[f64::INFINITY]] {
            assert_eq!(sign_flip(differences, 100, 1), 1.0);
        }
        assert_eq!(sign_flip(&[1.0; 100], 0, 1), 1.0, "no sign was drawn");
    }

    #[test]
    fn holm_is_the_textbook_example() {
        let corrected = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (found, expected) in corrected.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((found - expected).abs() < 1e-12, "{corrected:?}");
        }
        assert_eq!(holm(&[]), Vec::<f64>::new());
        assert_eq!(holm(&[0.8, 0.9]), [1.0, 1.0]);
    }

    proptest! {
        #[test]
        fn mcnemar_is_a_symmetric_probability(b in 0u64..20_000, c in 0u64..20_000) {
            let p = mcnemar(b, c);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert_eq!(p, mcnemar(c, b));
        }

        #[test]
        fn mcnemar_falls_as_the_counts_part(n in 1u64..3000, k in 0u64..3000) {
            let k = k % n;
            prop_assert!(mcnemar(k, 2 * n - k) <= mcnemar(k + 1, 2 * n - k - 1));
        }

        #[test]
        fn sign_flips_give_a_probability_that_mirrors(
            differences in proptest::collection::vec(-1.0f64..1.0, 0..90), seed: u64,
        ) {
            let p = sign_flip(&differences, 99, seed);
            prop_assert!(p > 0.0 && p <= 1.0);
            let mirrored: Vec<f64> = differences.iter().map(|d| -d).collect();
            prop_assert_eq!(p, sign_flip(&mirrored, 99, seed));
        }

        #[test]
        fn holm_keeps_the_order_and_never_lowers(p in proptest::collection::vec(0.0f64..=1.0, 0..20)) {
            let corrected = holm(&p);
            for (i, a) in p.iter().enumerate() {
                prop_assert!((*a..=1.0).contains(&corrected[i]));
                for (j, b) in p.iter().enumerate() {
                    prop_assert!(a > b || corrected[i] <= corrected[j]);
                }
            }
        }
    }
}
