//! How far estimators of difficulty go along with the true loss of the next token.

use super::Trace;
use crate::eval::stats::resampled;
use serde::Serialize;

/// The report on all estimators.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Correlations {
    /// Tokens with a next one.
    pub tokens: usize,
    pub windows: usize,
    pub estimators: Vec<Correlation>,
}

/// Spearman's rank correlation of one estimator's measure with −log p of the token that follows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Correlation {
    pub name: String,
    /// Per MoE layer; none where the measure or the loss is the same for all tokens, or is not there.
    pub layers: Vec<Option<f64>>,
    /// Mean over the layers that have one.
    pub mean: Option<f64>,
    /// 95 % interval of the mean: windows are drawn anew, ranks are those among all tokens.
    pub low: Option<f64>,
    pub high: Option<f64>,
}

/// Draws of the bootstrap.
const RESAMPLES: usize = 1000;

/// Sums over one window from which a correlation is made: n, Σx, Σy, Σx², Σy², Σxy.
type Sums = [f64; 6];

impl Correlations {
    /// Of all estimators of `trace`.
    pub fn of(trace: &Trace, seed: u64) -> Self {
        let windows = trace.losses_t.len() / trace.window.max(1);
        let tokens = trace.losses_t.iter().filter(|loss| loss.is_finite()).count();
        let estimator = |(i, name): (usize, &&'static str)| {
            let sums_lw: Vec<Vec<Sums>> =
                trace.layers.iter().map(|layer| sums(&layer.measures[i], &trace.losses_t, trace.window)).collect();
            let all: Vec<usize> = (0..windows).collect();
            let layers: Vec<Option<f64>> = sums_lw.iter().map(|sums_w| pearson(sums_w, &all)).collect();
            let estimate = resampled(windows, RESAMPLES, seed, |drawn| {
                mean(sums_lw.iter().map(|sums_w| pearson(sums_w, drawn))).unwrap_or(f64::NAN)
            });
            let (low, high) = (estimate.map(|e| e.low), estimate.map(|e| e.high));
            Correlation { name: name.to_string(), mean: mean(layers.iter().copied()), layers, low, high }
        };
        let estimators = trace.estimators.iter().enumerate().map(estimator).collect();
        Self { tokens, windows, estimators }
    }
}

/// Spearman's rank correlation of pairs of numbers; none where one side is all alike. What is no finite number is left
/// out with its partner.
pub fn spearman(x: &[f32], y: &[f32]) -> Option<f64> {
    let sums_w = sums(x, y, x.len());
    pearson(&sums_w, &(0..sums_w.len()).collect::<Vec<usize>>())
}

fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.flatten().collect();
    crate::eval::stats::mean(&known)
}

/// Sums over the ranks of `x_t` and `y_t` among all tokens, window by window.
fn sums(x_t: &[f32], y_t: &[f32], window: usize) -> Vec<Sums> {
    let known: Vec<usize> = (0..x_t.len()).filter(|t| x_t[*t].is_finite() && y_t[*t].is_finite()).collect();
    let (ranks_x, ranks_y) = (ranks(x_t, &known), ranks(y_t, &known));
    let mut sums_w = vec![[0.0; 6]; x_t.len().div_ceil(window.max(1))];
    for ((t, x), y) in known.iter().zip(&ranks_x).zip(&ranks_y) {
        let terms = [1.0, *x, *y, x * x, y * y, x * y];
        sums_w[t / window].iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    }
    sums_w
}

/// Ranks of `values[known]` in 0..=1, centred; equal values share the mean of their ranks.
fn ranks(values: &[f32], known: &[usize]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..known.len()).collect();
    order.sort_by(|a, b| values[known[*a]].total_cmp(&values[known[*b]]));
    let mut ranks = vec![0.0; known.len()];
    let scale = known.len().saturating_sub(1).max(1) as f64;
    let mut before = 0;
    // A zero and a negative zero are equal, though sorted apart.
    for group in order.chunk_by(|a, b| values[known[*a]] == values[known[*b]]) {
        let rank = (before as f64 + (group.len() - 1) as f64 / 2.0) / scale - 0.5;
        group.iter().for_each(|i| ranks[*i] = rank);
        before += group.len();
    }
    ranks
}

fn pearson(sums_w: &[Sums], drawn: &[usize]) -> Option<f64> {
    let mut all = [0.0; 6];
    drawn.iter().for_each(|w| all.iter_mut().zip(&sums_w[*w]).for_each(|(sum, term)| *sum += term));
    let [n, x, y, xx, yy, xy] = all;
    let (variance_x, variance_y) = (xx - x * x / n, yy - y * y / n);
    let spread = n > 1.0 && variance_x > 1e-9 * n && variance_y > 1e-9 * n;
    spread.then(|| (xy - x * y / n) / (variance_x * variance_y).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spearman_is_that_of_a_hand_count() {
        let close = |x: &[f32], y: &[f32], want: f64| {
            let got = spearman(x, y).unwrap();
            assert!((got - want).abs() < 1e-9, "{got} is not {want}");
        };
        close(&[1.0, 2.0, 3.0, 10.0], &[0.1, 0.2, 5.0, 6.0], 1.0);
        close(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0], -1.0);
        // d = (0, −1, 1, 0): 1 − 6·2 / (4·15).
        close(&[1.0, 2.0, 3.0, 4.0], &[1.0, 3.0, 2.0, 4.0], 0.8);
        // Ties share 1.5: ranks 1.5 1.5 3 4 against 1 2 3 4, by Pearson's formula.
        close(&[5.0, 5.0, 6.0, 7.0], &[1.0, 2.0, 3.0, 4.0], 4.5 / (4.5f64 * 5.0).sqrt());
        close(&[1.0, f32::NAN, 2.0, 3.0, 9.0], &[1.0, 7.0, 2.0, 3.0, f32::INFINITY], 1.0);
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[], &[]), None);
    }

    #[test]
    fn the_mean_over_layers_has_an_interval_around_it() {
        let window = 10;
        let losses_t: Vec<f32> = (0..60).map(|t| ((t * 37) % 61) as f32).collect();
        let noisy = losses_t.iter().enumerate().map(|(t, l)| l + ((t * 17) % 23) as f32).collect();
        let layer = |x_t: Vec<f32>| super::super::LayerTrace { measures: vec![x_t], ..Default::default() };
        let layers = vec![layer(losses_t.clone()), layer(noisy), layer(vec![f32::NAN; 60])];
        let trace = Trace { layers, estimators: vec!["router-entropy"], window, losses_t };
        let found = Correlations::of(&trace, 1);
        let one = &found.estimators[0];
        assert_eq!((found.tokens, found.windows), (60, 6));
        assert!((one.layers[0].unwrap() - 1.0).abs() < 1e-9 && one.layers[2].is_none());
        let mean = one.mean.unwrap();
        assert!(one.low.unwrap() <= mean && mean <= one.high.unwrap() && mean < 1.0);
    }
}
