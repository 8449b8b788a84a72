//! Quantiles of Student's t distribution.

use std::f64::consts::FRAC_PI_2;

/// The value that a Student's t variable with `freedom` degrees of freedom stays below with probability `p`. NaN unless
/// 0 < p < 1 and freedom > 0.
pub fn t_quantile(p: f64, freedom: usize) -> f64 {
    if !(p > 0.0 && p < 1.0) || freedom == 0 {
        return f64::NAN;
    }
    // Bisection over θ = arctan(t / √ν): bounded, and the probability rises with it.
    let within = (2.0 * p - 1.0).abs();
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    for _ in 0..64 {
        let middle = (low + high) / 2.0;
        if probability_within(middle, freedom) < within { low = middle } else { high = middle }
    }
    let t = (freedom as f64).sqrt() * ((low + high) / 2.0).tan();
    if p < 0.5 { -t } else { t }
}

/// P(|T| < √ν · tan θ), a finite series for whole ν (Abramowitz and Stegun 26.7.3 and 26.7.4).
fn probability_within(theta: f64, freedom: usize) -> f64 {
    let (sin, cos) = theta.sin_cos();
    let odd = freedom % 2 == 1;
    // Each term is the one before times cos² θ and (j − 1)/j, where j steps by two.
    let (mut term, first) = if odd { (cos, 3) } else { (1.0, 2) };
    let mut sum = if odd && freedom == 1 { 0.0 } else { term };
    for j in (first..freedom.saturating_sub(1)).step_by(2) {
        term *= cos * cos * (j - 1) as f64 / j as f64;
        sum += term;
    }
    if odd { (theta + sin * sum) / FRAC_PI_2 } else { sin * sum }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        let table = [
            (0.975, 1, 12.706_205),
            (0.975, 2, 4.302_653),
            (0.975, 3, 3.182_446),
            (0.975, 4, 2.776_445),
            (0.975, 5, 2.570_582),
            (0.975, 9, 2.262_157),
            (0.975, 10, 2.228_139),
            (0.975, 30, 2.042_272),
            (0.975, 120, 1.979_930),
            (0.95, 7, 1.894_579),
            (0.995, 4, 4.604_095),
            (0.9995, 1, 636.619_249),
        ];
        for (p, freedom, expected) in table {
            let found = t_quantile(p, freedom);
            assert!((found - expected).abs() < 1e-6 * expected, "p {p}, freedom {freedom}: {found}");
        }
        assert!((t_quantile(0.975, 100_000) - 1.959_964).abs() < 1e-4, "the normal distribution's");
    }

    #[test]
    fn what_is_no_probability_has_no_quantile() {
        assert!(
            [t_quantile(0.0, 3), t_quantile(1.0, 3), t_quantile(f64::NAN, 3), t_quantile(0.9, 0)]
                .iter()
                .all(|t| t.is_nan())
        );
        assert!(t_quantile(0.5, 3).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn quantiles_rise_and_are_symmetric(p in 0.501f64..0.999, more in 1.0001f64..1.0005, freedom in 1usize..200) {
            let t = t_quantile(p, freedom);
            prop_assert!(t > 0.0 && t_quantile((p * more).min(0.9999), freedom) > t);
            prop_assert!((t + t_quantile(1.0 - p, freedom)).abs() < 1e-6 * t.max(1.0));
            prop_assert!(t_quantile(p, freedom + 1) <= t + 1e-9, "more freedom, lighter tails");
        }
    }
}
