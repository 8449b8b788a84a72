//! What routing and evaluations of a trained model look like in numbers: who computes which tokens, and how sure a
//! perplexity is.
//!
//! Legend: T tokens, E experts, R routed rows.

mod student;
mod token_class;

pub use student::t_quantile;
pub use token_class::{TokenClass, token_classes};

use super::report::{ClassRow, Interval, LayerRouting, RoutingAnalysis};

/// Rows that do not fit the layer or the tokens they are counted for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnalysisError {
    #[error("routing of mixture {mixture} was counted, but the model has {mixtures} mixtures; count those it has")]
    Mixture { mixture: usize, mixtures: usize },
    #[error("routing of mixture {mixture} has {found} expert offsets, but {expected} were due: one more than experts")]
    Experts { mixture: usize, expected: usize, found: usize },
    #[error("routing of mixture {mixture} has offsets that do not rise from 0 to its {rows} rows: {offset} at {at}")]
    Offsets { mixture: usize, rows: usize, at: usize, offset: u32 },
    #[error(
        "routing of mixture {mixture} names token {token}, but classes were given for {tokens}; give one per token"
    )]
    Token { mixture: usize, token: u32, tokens: usize },
}

/// One layer's routing of a batch, as compressed sparse rows sorted by expert.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Token of every row, `[R]`.
    pub token_r: &'a [u32],
    /// Rows of expert e are `offsets_e1[e]..offsets_e1[e + 1]`, `[E + 1]`.
    pub offsets_e1: &'a [u32],
}

/// Counts the routing of many batches, layer by layer.
#[derive(Clone, Debug)]
pub struct RoutingCounts {
    layers: Vec<LayerCounts>,
}

#[derive(Clone, Debug)]
struct LayerCounts {
    /// Index of the layer in the model.
    layer: usize,
    tokens: u64,
    /// Sum over tokens of H(p)/log E.
    entropy: f64,
    /// Tokens that had k experts, by k.
    k_histogram: Vec<u64>,
    /// Tokens of each class, `[classes]`, and rows of each class and expert, `[classes][E]`.
    tokens_c: Vec<u64>,
    rows_ce: Vec<Vec<u64>>,
}

impl RoutingCounts {
    /// For a model whose mixtures are the layers of these indices, `experts` wide each. Mixtures are counted from 0.
    pub fn new(layers: &[usize], experts: usize) -> Self {
        let classes = TokenClass::ALL.len();
        let layer = |layer: &usize| LayerCounts {
            layer: *layer,
            tokens: 0,
            entropy: 0.0,
            k_histogram: vec![0; experts + 1],
            tokens_c: vec![0; classes],
            rows_ce: vec![vec![0; experts]; classes],
        };
        Self { layers: layers.iter().map(layer).collect() }
    }

    /// Counts the rows of one mixture of one batch. `class_t` has the class of each of its T tokens; those without one
    /// are padding and not counted. Tokens without a row, which an expert's capacity dropped, count as k = 0.
    /// `entropy` is the mean of H(p)/log E over the batch.
    ///
    /// # Errors
    /// When the rows fit neither the model nor the tokens; nothing is counted then.
    pub fn add(
        &mut self,
        mixture: usize,
        rows: Rows<'_>,
        class_t: &[Option<TokenClass>],
        entropy: f64,
    ) -> Result<(), AnalysisError> {
        let mixtures = self.layers.len();
        let counts = self.layers.get_mut(mixture).ok_or(AnalysisError::Mixture { mixture, mixtures })?;
        check(mixture, rows, counts.rows_ce[0].len(), class_t.len())?;
        let mut k_t = vec![0usize; class_t.len()];
        for (e, span) in rows.offsets_e1.windows(2).enumerate() {
            for token in rows.token_r[span[0] as usize..span[1] as usize].iter().map(|t| *t as usize) {
                k_t[token] += 1;
                if let Some(class) = class_t[token] {
                    counts.rows_ce[class as usize][e] += 1;
                }
            }
        }
        let mut tokens = 0;
        for (k, class) in k_t.into_iter().zip(class_t) {
            let Some(class) = class else { continue };
            tokens += 1;
            counts.tokens_c[*class as usize] += 1;
            if k >= counts.k_histogram.len() {
                counts.k_histogram.resize(k + 1, 0);
            }
            counts.k_histogram[k] += 1;
        }
        counts.tokens += tokens;
        counts.entropy += entropy * tokens as f64;
        Ok(())
    }

    /// Shares and means of all that was counted; classes that no token had are left out. None where nothing was.
    pub fn finish(&self) -> Option<RoutingAnalysis> {
        let layers: Vec<LayerRouting> = self.layers.iter().filter(|l| l.tokens > 0).map(LayerCounts::finish).collect();
        (!layers.is_empty()).then_some(RoutingAnalysis { layers })
    }
}

impl LayerCounts {
    fn finish(&self) -> LayerRouting {
        let experts = self.rows_ce[0].len();
        let rows_e: Vec<u64> = (0..experts).map(|e| self.rows_ce.iter().map(|rows_e| rows_e[e]).sum()).collect();
        let utilisation_e = shares(&rows_e);
        let used = TokenClass::ALL.into_iter().filter(|class| self.tokens_c[*class as usize] > 0);
        let classes = used.map(|class| ClassRow {
            class: class.name().into(),
            tokens: self.tokens_c[class as usize],
            share_e: shares(&self.rows_ce[class as usize]),
        });
        LayerRouting {
            layer: self.layer,
            entropy: self.entropy / self.tokens as f64,
            utilisation_std: standard_deviation(&utilisation_e),
            utilisation_e,
            k_histogram: self.k_histogram.clone(),
            classes: classes.collect(),
        }
    }
}

/// Fails unless rows are sorted by expert and name tokens that are there.
fn check(mixture: usize, rows: Rows<'_>, experts: usize, tokens: usize) -> Result<(), AnalysisError> {
    let (found, expected) = (rows.offsets_e1.len(), experts + 1);
    if found != expected {
        return Err(AnalysisError::Experts { mixture, expected, found });
    }
    let mut least = 0;
    for (at, &offset) in rows.offsets_e1.iter().enumerate() {
        let due = if at == 0 { 0..=0 } else { least..=rows.token_r.len() as u32 };
        if !due.contains(&offset) || (at == experts && offset as usize != rows.token_r.len()) {
            return Err(AnalysisError::Offsets { mixture, rows: rows.token_r.len(), at, offset });
        }
        least = offset;
    }
    match rows.token_r.iter().find(|t| **t as usize >= tokens) {
        Some(&token) => Err(AnalysisError::Token { mixture, token, tokens }),
        None => Ok(()),
    }
}

/// Each count's share of all; all 0 where nothing was counted.
fn shares(counts: &[u64]) -> Vec<f64> {
    let all = counts.iter().sum::<u64>().max(1) as f64;
    counts.iter().map(|n| *n as f64 / all).collect()
}

/// Standard deviation of the experts' shares of a layer's rows, given every expert's rows, over all E of them (so divided
/// by E): 0 where all are used alike, √(E − 1)/E where one is used alone.
pub fn utilisation_std(rows_e: &[u64]) -> f64 {
    standard_deviation(&shares(rows_e))
}

fn standard_deviation(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Mean of the last `last` perplexities with a 95 % interval, mean ± t · s / √n, where t is the quantile of Student's t
/// with n − 1 degrees of freedom. None of fewer than two, or where one is no finite number (or beyond what
/// can be squared).
pub fn perplexity_interval(perplexities: &[f64], last: usize) -> Option<Interval> {
    let level = 0.95;
    let last = &perplexities[perplexities.len().saturating_sub(last)..];
    if last.len() < 2 || last.iter().any(|p| !p.is_finite()) {
        return None;
    }
    let n = last.len() as f64;
    let mean = last.iter().sum::<f64>() / n;
    let variance = last.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let half = t_quantile(0.5 + level / 2.0, last.len() - 1) * (variance / n).sqrt();
    let interval = Interval { mean, low: mean - half, high: mean + half, evaluations: last.len(), level };
    (interval.low.is_finite() && interval.high.is_finite()).then_some(interval)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_are_counted_by_expert_class_and_k() {
        let (word, digit) = (Some(TokenClass::WordStart), Some(TokenClass::Digits));
        let mut counts = RoutingCounts::new(&[1, 3], 3);
        // Token 0 has experts 0 and 1, token 1 expert 0, token 2 none; token 3 is padding.
        let rows = Rows { token_r: &[0, 1, 0, 3], offsets_e1: &[0, 2, 3, 4] };
        counts.add(1, rows, &[word, digit, digit, None], 0.5).unwrap();
        counts.add(1, Rows { token_r: &[0], offsets_e1: &[0, 0, 0, 1] }, &[word], 0.9).unwrap();
        let analysis = counts.finish().unwrap();
        assert_eq!(analysis.layers.len(), 1, "mixture 0 routed nothing");
        let layer = &analysis.layers[0];
        assert_eq!((layer.layer, &layer.k_histogram), (3, &vec![1, 2, 1, 0]));
        assert_eq!(layer.utilisation_e, [0.5, 0.25, 0.25]);
        assert!((layer.entropy - (3.0 * 0.5 + 0.9) / 4.0).abs() < 1e-12);
        let class = |class: &str, tokens, share_e| ClassRow { class: class.into(), tokens, share_e };
        assert_eq!(
            layer.classes,
            [class("word start", 2, vec![1.0 / 3.0; 3]), class("digits", 2, vec![1.0, 0.0, 0.0])]
        );
    }

    #[test]
    fn rows_that_fit_nothing_are_refused_and_not_counted() {
        let mut counts = RoutingCounts::new(&[0], 2);
        let mut add = |mixture, token_r: &[u32], offsets_e1: &[u32]| {
            counts.add(mixture, Rows { token_r, offsets_e1 }, &[Some(TokenClass::Other)], 0.0).unwrap_err()
        };
        assert_eq!(add(1, &[], &[0, 0, 0]), AnalysisError::Mixture { mixture: 1, mixtures: 1 });
        assert_eq!(add(0, &[], &[0, 0]), AnalysisError::Experts { mixture: 0, expected: 3, found: 2 });
        assert_eq!(add(0, &[0], &[0, 0, 0]), AnalysisError::Offsets { mixture: 0, rows: 1, at: 2, offset: 0 });
        assert_eq!(add(0, &[0], &[0, 2, 1]), AnalysisError::Offsets { mixture: 0, rows: 1, at: 1, offset: 2 });
        assert_eq!(add(0, &[0], &[1, 1, 1]), AnalysisError::Offsets { mixture: 0, rows: 1, at: 0, offset: 1 });
        assert_eq!(add(0, &[1], &[0, 1, 1]), AnalysisError::Token { mixture: 0, token: 1, tokens: 1 });
        assert_eq!(counts.finish(), None);
        assert_eq!(RoutingCounts::new(&[], 0).finish(), None, "a dense model");
    }

    #[test]
    fn deviation_of_utilisation_is_that_of_the_shares() {
        assert_eq!(utilisation_std(&[5, 5, 5]), 0.0);
        assert!((utilisation_std(&[8, 0, 0, 0]) - 3f64.sqrt() / 4.0).abs() < 1e-12, "one expert alone");
        assert_eq!((utilisation_std(&[0, 0]), utilisation_std(&[])), (0.0, 0.0));
    }

    #[test]
    fn an_interval_of_perplexities_is_students() {
        // Of the last five: s / √5 = 0.1767767, and t is 2.776445 with 4 degrees of freedom.
        let interval = perplexity_interval(&[90.0, 12.0, 11.5, 11.0, 11.25, 11.75], 5).unwrap();
        assert_eq!((interval.mean, interval.evaluations, interval.level), (11.5, 5, 0.95));
        assert!((interval.low - 11.009_189).abs() < 1e-6 && (interval.high - 11.990_811).abs() < 1e-6, "{interval:?}");
        assert_eq!((perplexity_interval(&[3.0], 5), perplexity_interval(&[3.0, f64::NAN], 5)), (None, None));
        assert_eq!(perplexity_interval(&[1e300, 2.0], 5), None);
        assert_eq!((perplexity_interval(&[3.0, 4.0], 1), perplexity_interval(&[], 3)), (None, None));
    }

    proptest! {
        #[test]
        fn every_token_and_row_is_counted_once(routed in proptest::collection::vec((0usize..4, 0usize..7), 1..60)) {
            // Token t goes to the first k experts.
            let class_t: Vec<_> = routed.iter().map(|(_, c)| Some(TokenClass::ALL[*c])).collect();
            let (mut token_r, mut offsets_e1) = (Vec::new(), vec![0]);
            for e in 0..3 {
                token_r.extend((0..routed.len() as u32).filter(|t| routed[*t as usize].0 > e));
                offsets_e1.push(token_r.len() as u32);
            }
            let mut counts = RoutingCounts::new(&[0], 3);
            counts.add(0, Rows { token_r: &token_r, offsets_e1: &offsets_e1 }, &class_t, 1.0).unwrap();
            let layer = counts.finish().unwrap().layers.remove(0);
            prop_assert_eq!(layer.k_histogram.iter().sum::<u64>(), routed.len() as u64);
            let rows: u64 = layer.k_histogram.iter().enumerate().map(|(k, n)| k as u64 * n).sum();
            prop_assert_eq!(rows, token_r.len() as u64);
            prop_assert_eq!(layer.classes.iter().map(|c| c.tokens).sum::<u64>(), routed.len() as u64);
            let rows_e: Vec<u64> = offsets_e1.windows(2).map(|w| u64::from(w[1] - w[0])).collect();
            prop_assert!((layer.utilisation_std - utilisation_std(&rows_e)).abs() < 1e-12);
        }
    }
}
