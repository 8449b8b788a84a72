use super::*;
use crate::types::split_mix;
use proptest::prelude::*;

const E: usize = 5;
const D: usize = 7;

/// A gate W `[E, D]` and an input h `[D]`, drawn from `seed`.
fn gate(seed: u64) -> (Vec<f64>, Vec<f64>) {
    let draw = |i: usize| (split_mix(seed, i as u64) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
    ((0..E * D).map(draw).collect(), (E * D..E * D + D).map(|i| 3.0 * draw(i)).collect())
}

fn logits(w: &[f64], h: &[f64]) -> Vec<f64> {
    w.chunks(D).map(|row| row.iter().zip(h).map(|(w, h)| w * h).sum()).collect()
}

fn logsumexp(z: &[f64]) -> f64 {
    z.iter().map(|z| z.exp()).sum::<f64>().ln()
}

fn softmax(z: &[f64]) -> Vec<f64> {
    z.iter().map(|x| (x - logsumexp(z)).exp()).collect()
}

fn entropy(z: &[f64]) -> f64 {
    softmax(z).iter().map(|p| -p * p.ln()).sum()
}

/// Central differences of `f` by h.
fn gradient(w: &[f64], h: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let at = |d: usize, by: f64| {
        let mut moved = h.to_vec();
        moved[d] += by;
        f(&logits(w, &moved))
    };
    (0..D).map(|d| (at(d, step) - at(d, -step)) / (2.0 * step)).collect()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// What an estimator measures of the token with input h at the gate W.
fn measure(name: &str, w: &[f64], h: &[f64]) -> f64 {
    let probs_e: Vec<f32> = softmax(&logits(w, h)).iter().map(|p| *p as f32).collect();
    let mut order_e: Vec<u16> = (0..E as u16).collect();
    order_e.sort_by(|a, b| probs_e[*b as usize].total_cmp(&probs_e[*a as usize]));
    let row = |e: usize| &w[e * D..(e + 1) * D];
    let product = |a: usize, b: usize| row(a).iter().zip(row(b)).map(|(a, b)| a * b).sum::<f64>() as f32;
    let gram_ee: Vec<f32> = (0..E * E).map(|i| product(i / E, i % E)).collect();
    let hidden_d: Vec<f32> = h.iter().map(|h| *h as f32).collect();
    let token = TokenGate { hidden_d: &hidden_d, gram_ee: &gram_ee, ..blank(&probs_e, &order_e) };
    f64::from(estimator(name).unwrap().0.measure(&token))
}

fn blank<'a>(probs_e: &'a [f32], order_e: &'a [u16]) -> TokenGate<'a> {
    TokenGate {
        row: 0,
        layer: 0,
        probs_e,
        order_e,
        position: 3,
        token: 0,
        hidden_d: &[],
        gram_ee: &[],
        lens_entropy: f32::NAN,
        attention_entropy: f32::NAN,
        surprisal: f32::NAN,
        tenant: 0,
        decodes: false,
    }
}

fn widest_norm(w: &[f64]) -> f64 {
    w.chunks(D).map(norm).fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn gradients_in_closed_form_match_finite_differences(seed: u64) {
        let (w, h) = gate(seed);
        let scale = widest_norm(&w);
        let by_differences = norm(&gradient(&w, &h, logsumexp)) / scale;
        prop_assert!((measure("gradient-norm", &w, &h) - by_differences).abs() < 1e-3);
        let by_differences = norm(&gradient(&w, &h, entropy)) / scale;
        prop_assert!((measure("gradient-norm:entropy", &w, &h) - by_differences).abs() < 1e-3);
    }

    #[test]
    fn the_gradients_variance_is_the_trace_of_their_covariance(seed: u64) {
        let (w, h) = gate(seed);
        let p = softmax(&logits(&w, &h));
        // E‖∇ log p_e − E∇ log p_e‖², by differences; the mean is 0.
        let variance: f64 = (0..E)
            .map(|e| p[e] * norm(&gradient(&w, &h, |z| z[e] - logsumexp(z))).powi(2))
            .sum();
        let got = measure("gradient-variance", &w, &h) * widest_norm(&w).powi(2);
        prop_assert!((got - variance).abs() < 1e-3 * (1.0 + variance), "{got} is not {variance}");
    }

    #[test]
    fn every_fixed_map_is_within_bounds_and_never_falls(seed: u64) {
        let (w, h) = gate(seed);
        for entry in ESTIMATORS.iter().filter(|entry| entry.calibrates) {
            let estimator = entry.build().unwrap();
            let measured = measure(entry.name, &w, &h) as f32;
            if measured.is_finite() {
                prop_assert!((0.0..=1.0001).contains(&estimator.squash(measured)), "{}: {measured}", entry.name);
            }
            prop_assert!(estimator.squash(0.2) <= estimator.squash(0.7), "{}", entry.name);
        }
    }
}

#[test]
fn names_are_unique_and_the_unknown_is_refused_with_the_list() {
    let mut names: Vec<&str> = ESTIMATORS.iter().map(|entry| entry.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ESTIMATORS.len());
    let error = estimator("luck").err().unwrap();
    assert!(ESTIMATORS.iter().all(|entry| error.contains(entry.usage)), "{error}");
    for (text, want) in [
        ("constant", "constant:0.5"),
        ("constant:2", "[0, 1]; got 2"),
        ("hidden-norm:3", "takes no argument; got 3"),
        ("gradient-norm:loss", "`entropy`; got loss"),
    ] {
        let error = estimator(text).err().unwrap();
        assert!(error.contains(want), "{text}: {error}");
    }
}

#[test]
fn measures_are_what_a_hand_count_says() {
    let even = [0.25f32; 4];
    let order = [0u16, 1, 2, 3];
    let of = |name: &str, token: &TokenGate<'_>| estimator(name).unwrap().0.measure(token);
    assert!((of("router-entropy", &blank(&even, &order)) - 1.0).abs() < 1e-6);
    assert_eq!(of("router-margin", &blank(&even, &order)), 1.0);
    let sure = [0.9f32, 0.1, 0.0, 0.0];
    assert!((of("router-margin", &blank(&sure, &order)) - 0.2).abs() < 1e-6);
    let told = TokenGate {
        hidden_d: &[3.0, -4.0],
        lens_entropy: 1.0,
        attention_entropy: 2.0f32.ln(),
        surprisal: 1.5,
        ..blank(&even, &order)
    };
    assert!((of("hidden-norm", &told) - (25.0f32 / 2.0).sqrt()).abs() < 1e-6);
    assert!((of("logit-lens", &told) - 1.0).abs() < 1e-6);
    assert!((of("attention-entropy", &told) - 0.5).abs() < 1e-6, "ln 2 of ln 4 at position 3");
    assert_eq!(of("surprisal", &told), 1.5);
    assert_eq!(of("constant:0.3", &told), 0.3);
    let two = 1.0 / (1.0 + (-7.0f32).exp());
    let nats = -(two * two.ln() + (1.0 - two) * (1.0 - two).ln());
    assert!((of("perplexity-proxy", &told) - nats / 2.0f32.ln()).abs() < 1e-5);
    let first = TokenGate { position: 0, ..told };
    assert_eq!((of("attention-entropy", &first), of("surprisal", &first)), (0.0, f32::INFINITY));
    assert_eq!(estimator("surprisal").unwrap().0.squash(f32::INFINITY), 1.0);
}
