//! Percentile bootstrap: units are drawn anew with replacement, and the statistic's spread over the draws is its
//! uncertainty. Two arms are paired by drawing the same units for both.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// A value with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// A stretch of text that was scored as one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Negative log-likelihood of all its tokens.
    pub nats: f64,
    /// Tokens that were scored.
    pub tokens: u64,
    /// Bytes of text that these tokens spell.
    pub bytes: u64,
}

/// The statistic of `units`, with the 2.5 and 97.5 percentiles (linear interpolation) of its values over `resamples`
/// draws of as many units with replacement. `statistic` sees the units' mean per column, so that a mean is a column
/// and a ratio of sums the quotient of two.
///
/// The same seed and number of units draw the same units. None where there is no unit, no resample, or where the
/// statistic is not finite.
pub fn bootstrap<const D: usize>(
    units: &[[f64; D]],
    resamples: usize,
    seed: u64,
    statistic: impl Fn(&[f64; D]) -> f64,
) -> Option<Estimate> {
    resampled(units.len(), resamples, seed, |drawn| {
        let mut sums = [0.0; D];
        drawn.iter().for_each(|i| add(&mut sums, &units[*i]));
        sums.iter_mut().for_each(|s| *s /= units.len() as f64);
        statistic(&sums)
    })
}

/// The same for a `statistic` of any kind, which sees the indices of `n` units.
pub fn resampled(n: usize, resamples: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64) -> Option<Estimate> {
    let value = statistic(&(0..n).collect::<Vec<usize>>());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // The high half of the product is uniform in 0..n to within n / 2^64.
    let mut index = |_| ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize;
    let mut draws: Vec<f64> = Vec::new();
    for _ in 0..if n == 0 { 0 } else { resamples } {
        draws.push(statistic(&(0..n).map(&mut index).collect::<Vec<usize>>()));
    }
    draws.sort_by(f64::total_cmp);
    let (low, high) = (percentile(&draws, 0.025)?, percentile(&draws, 0.975)?);
    [value, low, high].iter().all(|v| v.is_finite()).then_some(Estimate { value, low, high })
}

fn add<const D: usize>(sums: &mut [f64; D], unit: &[f64; D]) {
    sums.iter_mut().zip(unit).for_each(|(sum, x)| *sum += x);
}

/// The `q`-quantile of sorted values, interpolated between neighbours.
fn percentile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// Mean of `values`.
pub fn mean_interval(values: &[f64], resamples: usize, seed: u64) -> Option<Estimate> {
    let units: Vec<[f64; 1]> = values.iter().map(|v| [*v]).collect();
    bootstrap(&units, resamples, seed, |mean| mean[0])
}

/// Mean of the first of each pair less mean of the second, paired.
pub fn mean_difference(pairs: &[[f64; 2]], resamples: usize, seed: u64) -> Option<Estimate> {
    bootstrap(pairs, resamples, seed, |mean| mean[0] - mean[1])
}

/// exp(Σ nats / Σ tokens).
pub fn perplexity(windows: &[Window], resamples: usize, seed: u64) -> Option<Estimate> {
    let units: Vec<[f64; 2]> = windows.iter().map(|w| [w.nats, w.tokens as f64]).collect();
    bootstrap(&units, resamples, seed, |mean| (mean[0] / mean[1]).exp())
}

/// Σ nats / ln 2 / Σ bytes.
pub fn bits_per_byte(windows: &[Window], resamples: usize, seed: u64) -> Option<Estimate> {
    let units: Vec<[f64; 2]> = windows.iter().map(|w| [w.nats, w.bytes as f64]).collect();
    bootstrap(&units, resamples, seed, |mean| mean[0] / mean[1] / std::f64::consts::LN_2)
}

/// [`perplexity`] of the first of each pair less that of the second, paired by window.
pub fn perplexity_difference(pairs: &[[Window; 2]], resamples: usize, seed: u64) -> Option<Estimate> {
    let units: Vec<[f64; 4]> = pairs.iter().map(|[a, b]| [a.nats, a.tokens as f64, b.nats, b.tokens as f64]).collect();
    bootstrap(&units, resamples, seed, |mean| (mean[0] / mean[1]).exp() - (mean[2] / mean[3]).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bernoulli(n: usize, p: f64, seed: u64) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| f64::from(u8::from((rng.next_u64() as f64) < p * 2f64.powi(64)))).collect()
    }

    #[test]
    fn percentiles_are_those_of_numpy() {
        let sorted = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
        assert!((percentile(&sorted, 0.025).unwrap() - 0.575).abs() < 1e-12);
        assert!((percentile(&sorted, 0.975).unwrap() - 29.6).abs() < 1e-12);
        assert_eq!((percentile(&[], 0.5), percentile(&[3.0], 0.975)), (None, Some(3.0)));
    }

    #[test]
    fn the_seed_alone_decides_the_interval() {
        let values = bernoulli(100, 0.4, 1);
        assert_eq!(mean_interval(&values, 200, 7), mean_interval(&values, 200, 7));
        assert_ne!(mean_interval(&values, 200, 7), mean_interval(&values, 200, 8));
    }

    #[test]
    fn the_interval_of_a_mean_is_about_two_standard_errors_to_each_side() {
        let values = bernoulli(1000, 0.3, 2);
        let estimate = mean_interval(&values, 4000, 3).unwrap();
        let stderr = super::super::mean_stderr(&values).unwrap();
        assert!(((estimate.high - estimate.value) / stderr - 1.96).abs() < 0.12);
        assert!(((estimate.value - estimate.low) / stderr - 1.96).abs() < 0.12);
    }

    #[test]
    fn intervals_cover_the_truth_about_95_times_in_100() {
        let truth = 0.35;
        let covered = |seed: &u64| {
            let e = mean_interval(&bernoulli(80, truth, 1000 + seed), 300, *seed).unwrap();
            e.low <= truth && truth <= e.high
        };
        let count = (0..400).filter(covered).count();
        assert!((364..=392).contains(&count), "{count} of 400 intervals hold the true mean");
    }

    #[test]
    fn pairing_takes_the_samples_own_difficulty_out() {
        let pairs: Vec<[f64; 2]> = bernoulli(400, 0.5, 4).into_iter().map(|right| [right, right]).collect();
        let same = mean_difference(&pairs, 300, 5).unwrap();
        assert_eq!((same.value, same.low, same.high), (0.0, 0.0, 0.0));
    }

    #[test]
    fn perplexity_and_bits_per_byte_are_ratios_of_sums() {
        let windows = [Window { nats: 30.0, tokens: 10, bytes: 45 }, Window { nats: 5.0, tokens: 4, bytes: 15 }];
        let ppl = perplexity(&windows, 500, 1).unwrap();
        assert!((ppl.value - 2.5f64.exp()).abs() < 1e-12);
        assert!((ppl.low - 1.25f64.exp()).abs() < 1e-9 && (ppl.high - 3f64.exp()).abs() < 1e-9);
        let bits = bits_per_byte(&windows, 500, 1).unwrap();
        assert!((bits.value - 35.0 / 60.0 / std::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn differences_of_windows_are_those_of_their_values() {
        let one = Window { nats: 30.0, tokens: 10, bytes: 45 };
        let other = Window { nats: 32.0, ..one };
        let pairs = [[other, one], [other, one]];
        let ppl = perplexity_difference(&pairs, 50, 1).unwrap();
        assert!((ppl.value - (3.2f64.exp() - 3f64.exp())).abs() < 1e-12 && (ppl.low - ppl.high).abs() < 1e-12);
    }

    #[test]
    fn nothing_to_draw_from_gives_none() {
        assert_eq!(mean_interval(&[], 100, 1), None);
        assert_eq!(mean_interval(&[1.0], 0, 1), None);
        assert_eq!(mean_interval(&[f64::NAN, 1.0], 10, 1), None);
        assert_eq!(perplexity(&[Window { nats: 1.0, tokens: 0, bytes: 0 }], 10, 1), None);
        assert_eq!(mean_interval(&[0.5], 10, 1), Some(Estimate { value: 0.5, low: 0.5, high: 0.5 }));
    }

    proptest! {
        #[test]
        fn the_interval_of_a_mean_holds_the_mean_and_stays_in_range(
            values in proptest::collection::vec(-1.0f64..1.0, 1..60), seed: u64,
        ) {
            let e = mean_interval(&values, 400, seed).unwrap();
            let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
            prop_assert!(e.low <= e.value + 1e-12 && e.value <= e.high + 1e-12);
            prop_assert!(min - 1e-12 <= e.low && e.high <= max + 1e-12);
        }

        #[test]
        fn swapping_the_arms_mirrors_the_difference(
            pairs in proptest::collection::vec([-1.0f64..1.0, -1.0f64..1.0], 1..40), seed: u64,
        ) {
            let swapped: Vec<[f64; 2]> = pairs.iter().map(|[a, b]| [*b, *a]).collect();
            let (e, s) = (mean_difference(&pairs, 101, seed).unwrap(), mean_difference(&swapped, 101, seed).unwrap());
            prop_assert!((e.value + s.value).abs() < 1e-12 && (e.low + s.high).abs() < 1e-9);
        }
    }
}
