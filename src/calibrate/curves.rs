//! Which parameter of a rule gives which mean k on a trace.
//!
//! A token's k is a step function of the parameter, so the mean over tokens is one too, and its steps are all known: what
//! bisection would close in on is read off them.

use super::LayerTrace;
use crate::moe::calibration::CURVE_STEPS;
use crate::moe::router::Rule;

/// What a dynamic rule looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Score,
    Contribution,
    Threshold,
}

impl Signal {
    pub const ALL: [Self; 3] = [Self::Score, Self::Contribution, Self::Threshold];

    /// The rule of this signal with a parameter.
    pub fn rule(self, parameter: f32) -> Rule {
        match self {
            Self::Score => Rule::Score { tau: parameter },
            Self::Contribution => Rule::Contribution { tau: parameter },
            Self::Threshold => Rule::Threshold { theta: parameter },
        }
    }
}

/// Where the experts of a layer's tokens grow by one, as the rule of one signal is loosened.
#[derive(Clone, Debug)]
pub struct Steps {
    signal: Signal,
    tokens: usize,
    top_k: usize,
    /// Ascending, one per (token, k > 1): the token takes k experts above this τ, or from θ = −this down.
    at: Vec<f64>,
}

impl Steps {
    /// Of `signal` on `layer`, whose experts put out `norms_e`.
    pub fn of(layer: &LayerTrace, signal: Signal, norms_e: &[f32]) -> Self {
        let top_k = layer.top_k;
        let mut at = Vec::with_capacity(layer.tokens() * (top_k - 1));
        let tokens = layer.order_tk.chunks_exact(top_k).zip(layer.probs_tk.chunks_exact(top_k));
        let mut shares = Vec::with_capacity(top_k);
        for (order_k, probs_k) in tokens {
            if signal == Signal::Threshold {
                at.extend(probs_k[1..].iter().map(|p| -f64::from(*p)));
                continue;
            }
            shares.clear();
            shares.extend(order_k.iter().zip(probs_k).map(|(e, p)| {
                let norm = if signal == Signal::Score { 1.0 } else { f64::from(norms_e[*e as usize]) };
                f64::from(*p) * norm
            }));
            // As the rules sum: the whole in the order of the ranks for score, largest first for contribution.
            shares.sort_by(|a, b| b.total_cmp(a));
            let whole: f64 = shares.iter().sum();
            let gathered = shares[..top_k - 1].iter().scan(0.0, |sum, share| {
                *sum += share;
                // Where nothing contributes, one expert is enough for any τ below 1.
                Some(if whole > 0.0 { *sum / whole } else { f64::INFINITY })
            });
            at.extend(gathered);
        }
        at.sort_by(f64::total_cmp);
        Self { signal, tokens: layer.tokens(), top_k, at }
    }

    /// The rule whose mean k comes closest to `mean_k` from below. One expert, and k0, are exact on every text.
    pub fn rule(&self, mean_k: f64) -> Rule {
        let rows = ((mean_k - 1.0) * self.tokens as f64 + 1e-9).floor().max(0.0) as usize;
        self.signal.rule(self.parameter(rows.min(self.at.len())))
    }

    /// The parameter with which `rows` experts beyond one per token are taken.
    fn parameter(&self, rows: usize) -> f32 {
        let threshold = self.signal == Signal::Threshold;
        match rows {
            0 if threshold => 1.0,
            0 => 0.0,
            n if n == self.at.len() && threshold => 0.0,
            n if n == self.at.len() => 1.0,
            n => {
                let middle = (self.at[n - 1] + self.at[n]) / 2.0;
                (if threshold { -middle } else { middle }).clamp(0.0, 1.0) as f32
            }
        }
    }

    /// Mean k at `parameter`.
    pub fn mean_k(&self, parameter: f32) -> f64 {
        let parameter = f64::from(parameter);
        let more = match self.signal {
            Signal::Threshold => self.at.partition_point(|at| *at <= -parameter),
            _ if parameter == 1.0 => self.at.len(),
            _ => self.at.partition_point(|at| *at < parameter),
        };
        1.0 + more as f64 / self.tokens as f64
    }

    /// The parameters at which mean k is 1, …, k0 in evenly spaced steps, `[CURVE_STEPS + 1]`.
    pub fn curve(&self) -> Vec<f32> {
        let rows = |i: usize| self.at.len() * i / CURVE_STEPS;
        (0..=CURVE_STEPS).map(|i| self.parameter(rows(i))).collect()
    }

    pub fn top_k(&self) -> usize {
        self.top_k
    }

    pub fn signal(&self) -> Signal {
        self.signal
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::split_mix;
    use proptest::prelude::*;

    const E: usize = 6;

    /// `tokens` tokens of a layer of E experts, drawn from `seed`.
    fn layer(seed: u64, tokens: usize, top_k: usize) -> LayerTrace {
        let mut layer = LayerTrace { top_k, ..Default::default() };
        for t in 0..tokens {
            let draw = |i: usize| (split_mix(seed, (t * E + i) as u64) >> 40) as f32 / 1e6;
            let z: Vec<f32> = (0..E).map(|e| draw(e).fract() * 4.0).collect();
            let sum: f32 = z.iter().map(|z| z.exp()).sum();
            let mut order: Vec<u16> = (0..E as u16).collect();
            order.sort_by(|a, b| z[*b as usize].total_cmp(&z[*a as usize]));
            layer.order_tk.extend(&order[..top_k]);
            layer.probs_tk.extend(order[..top_k].iter().map(|e| z[*e as usize].exp() / sum));
        }
        layer
    }

    fn by_rule(layer: &LayerTrace, rule: &Rule, norms_e: &[f32]) -> f64 {
        let rows: usize = (0..layer.tokens()).map(|t| layer.choose(t, rule, norms_e).len()).sum();
        rows as f64 / layer.tokens() as f64
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_steps_count_what_the_rule_itself_takes(seed: u64, top_k in 2usize..=E, parameter in 0.0f32..=1.0) {
            let (layer, norms_e) = (layer(seed, 40, top_k), [1.0, 2.0, 0.5, 3.0, 1.5, 0.0]);
            for signal in Signal::ALL {
                let steps = Steps::of(&layer, signal, &norms_e);
                let rule = signal.rule(parameter);
                prop_assert_eq!(steps.mean_k(parameter), by_rule(&layer, &rule, &norms_e), "{:?}", rule);
            }
        }

        #[test]
        fn a_mean_k_is_hit_to_within_a_token_from_below(seed: u64, top_k in 2usize..=E, share in 0.0f64..=1.0) {
            let (layer, norms_e) = (layer(seed, 60, top_k), [1.0, 2.0, 0.5, 3.0, 1.5, 1.0]);
            let asked = 1.0 + share * (top_k - 1) as f64;
            for signal in Signal::ALL {
                let got = by_rule(&layer, &Steps::of(&layer, signal, &norms_e).rule(asked), &norms_e);
                // Equal probabilities cannot be told apart, but drawn ones are rarely equal.
                prop_assert!((asked - got).abs() <= 2.0 / 60.0, "{:?}: {} for {}", signal, got, asked);
            }
        }

        #[test]
        fn curves_rise_from_one_expert_to_all(seed: u64, top_k in 2usize..=E) {
            let (layer, norms_e) = (layer(seed, 50, top_k), [1.0; E]);
            for signal in Signal::ALL {
                let curve = Steps::of(&layer, signal, &norms_e).curve();
                prop_assert_eq!(curve.len(), CURVE_STEPS + 1);
                let falls = signal == Signal::Threshold;
                let sorted: Vec<f32> = if falls { curve.iter().rev().copied().collect() } else { curve.clone() };
                prop_assert!(sorted.is_sorted(), "{:?}", sorted);
                let ends = [curve[0], curve[CURVE_STEPS]].map(|p| by_rule(&layer, &signal.rule(p), &norms_e));
                prop_assert_eq!(ends, [1.0, top_k as f64]);
            }
        }
    }
}
