//! Arithmetic of rows that compiles to vectors; the order of every sum is fixed.

/// Partial sums of a row.
pub(super) const LANES: usize = 16;

/// eˣ for x ≤ 0: relative error below 3·10⁻⁷, 0 where the result would be no normal number.
#[inline(always)]
pub(in crate::ops::cpu) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to whole numbers, which are then the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first so short that its products with whole numbers are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Fused, for speed: the multiply-adds are a chain, in which every step waits for the one before.
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    let whole = rounded - ROUND;
    let rest = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, x));
    let mut y = POLY[0];
    for c in &POLY[1..] {
        y = y.mul_add(rest, *c);
    }
    let y = 1.0 + (rest * rest).mul_add(y, rest);
    if x < -87.0 { 0.0 } else { y * power }
}

/// Of (eʳ − 1 − r)/r² in ±½·ln 2, highest power first: through its values at the Chebyshev nodes. What it makes of
/// eʳ has a relative error of 10⁻⁸.
const POLY: [f32; 5] = [1.392_617_6e-3, 8.363_173e-3, 4.166_655_5e-2, 0.166_665_77, 0.5];

/// 1/(1 + e⁻ˣ)
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let y = 1.0 / (1.0 + e);
    if x < 0.0 { e * y } else { y }
}

/// Σ f(aᵢ, bᵢ)
#[inline(always)]
pub(super) fn sum_by(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| f(*a, *b)).sum();
    add_lanes(&lanes) + rest
}

/// Both sums of the numbers that `f` makes of every aᵢ.
#[inline(always)]
pub(super) fn sums_by(a: &[f32], f: impl Fn(f32) -> [f32; 2]) -> [f32; 2] {
    let mut lanes = [[0.0; LANES]; 2];
    let (a, rest) = a.as_chunks::<LANES>();
    for a in a {
        for i in 0..LANES {
            let [x, y] = f(a[i]);
            lanes[0][i] += x;
            lanes[1][i] += y;
        }
    }
    let mut sums = [add_lanes(&lanes[0]), add_lanes(&lanes[1])];
    for a in rest {
        let [x, y] = f(*a);
        sums = [sums[0] + x, sums[1] + y];
    }
    sums
}

/// Σ aᵢ·bᵢ
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_by(a, b, |a, b| a * b)
}

/// The largest number of `a`; what is none is passed over.
#[inline(always)]
pub(super) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (a, rest) = a.as_chunks::<LANES>();
    for a in a {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], a[i]);
        }
    }
    rest.iter().fold(largest_lane(&lanes), |a, b| larger(a, *b))
}

#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// ln Σ eᵃ
#[inline(always)]
pub(super) fn log_sum_exp(a: &[f32]) -> f32 {
    let max = max(a);
    max + sum_by(a, a, |a, _| exp(a - max)).ln()
}

// These two are not inlined, so that lanes come through memory: else the compiler takes the array apart and sums
// lane by lane, without vectors.

#[inline(never)]
pub(super) fn add_lanes(lanes: &[f32; LANES]) -> f32 {
    halve(*lanes, |a, b| a + b)
}

#[inline(never)]
fn largest_lane(lanes: &[f32; LANES]) -> f32 {
    halve(*lanes, larger)
}

#[inline(always)]
fn halve(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_the_last_bits() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / want - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
    }

    #[test]
    fn sigmoids_are_right_on_both_sides() {
        for i in -800..=800 {
            let x = i as f32 * 0.1;
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(sigmoid(x)) / want - 1.0).abs() < 5e-7, "{x}");
        }
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for n in [0, 1, 15, 16, 17, 50] {
            let a: Vec<f32> = (0..n).map(|i| i as f32 - 20.0).collect();
            assert_eq!(dot(&a, &a), a.iter().map(|a| a * a).sum::<f32>());
            assert_eq!(max(&a), a.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
        assert!((log_sum_exp(&[0.0, 3.0f32.ln()]) - 4.0f32.ln()).abs() < 1e-6);
    }
}
