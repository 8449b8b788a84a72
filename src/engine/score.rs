//! Log-probabilities of tokens.

use super::api::TokenScore;
use crate::types::TokenId;

/// Least log-probability that is told: JSON knows no infinity.
const LOGPROB_MIN: f32 = -9999.0;

impl TokenScore {
    /// Scores `id` by `logits` as the model gave them (before penalties, biases and temperature), with the `top`
    /// likeliest tokens beside it.
    pub(super) fn of(logits: &[f32], id: TokenId, top: usize) -> Self {
        let logprob = log_softmax(logits);
        let own = logits[id as usize];
        let rank = 1 + logits.iter().filter(|z| **z > own).count() as u32;
        let top = likeliest(logits, top).into_iter().map(|(id, z)| (id, logprob(z))).collect();
        Self { logprob: logprob(own), rank, top }
    }
}

/// The log-probability of a logit among `logits`.
fn log_softmax(logits: &[f32]) -> impl Fn(f32) -> f32 {
    let max = logits.iter().copied().filter(|z| z.is_finite()).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().filter(|z| z.is_finite()).map(|z| f64::from(z - max).exp()).sum();
    move |z| ((f64::from(z - max) - sum.ln()) as f32).max(LOGPROB_MIN)
}

/// The log-probabilities of the whole vocabulary.
pub(super) fn distribution(logits: &[f32]) -> Vec<f32> {
    let logprob = log_softmax(logits);
    logits.iter().map(|z| logprob(*z)).collect()
}

/// The `count` largest logits, largest first, the lower id among equals.
fn likeliest(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (id, z) in logits.iter().enumerate() {
        if z.is_finite() && count > 0 && (best.len() < count || best[count - 1].1 < *z) {
            let at = best.partition_point(|b| b.1 >= *z);
            best.insert(at, (id as TokenId, *z));
            best.truncate(count);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_the_log_softmax_and_ranks_count_from_one() {
        let logits = [0.0, 2.0, 1.0, 2.0, f32::NEG_INFINITY];
        let sum = (1.0f64 + 2.0 * 2.0f64.exp() + 1.0f64.exp()).ln();
        let score = TokenScore::of(&logits, 2, 3);
        assert!((f64::from(score.logprob) - (1.0 - sum)).abs() < 1e-6);
        assert_eq!(score.rank, 3);
        assert_eq!(score.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(score.top[2].1, score.logprob);
        assert_eq!(TokenScore::of(&logits, 4, 0), TokenScore { logprob: LOGPROB_MIN, rank: 5, top: vec![] });
        assert_eq!(TokenScore::of(&logits, 1, 20).top.len(), 4, "there are four");
    }
}
