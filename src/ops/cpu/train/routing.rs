//! Weights of routed rows from the gate's logits `[T, E]`.
//!
//! Either rule is a softmax over some experts of the token: all of them, or those chosen for it. Rows of expert e
//! are `offsets_e1[e]..offsets_e1[e + 1]`; row r computes token `token_r[r]`.

use super::super::math::exp;
use super::chunk_rows;
use rayon::prelude::*;

/// What the weights of a token are shares of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WeightRule<'a> {
    /// The softmax over all experts.
    Raw,
    /// The softmax over the experts with a `true` in `chosen [T, E]`: what a router chose before capacity dropped
    /// any row. Every row's expert must be among them.
    Renormalised { chosen: &'a [bool] },
}

impl WeightRule<'_> {
    /// Whether the expert at `at = t·E + e` is in its token's softmax.
    fn takes(self, at: usize) -> bool {
        match self {
            Self::Raw => true,
            Self::Renormalised { chosen } => chosen[at],
        }
    }

    /// The softmax of every token over the experts the rule takes, `[T, E]`; 0 at the others.
    fn probabilities(self, logits: &[f32], experts: usize) -> Vec<f32> {
        let mut p = vec![0.0; logits.len()];
        // An exponential costs about as much as 16 additions.
        let tokens = chunk_rows(16 * experts);
        let chunks = p.par_chunks_mut(tokens * experts).zip(logits.par_chunks(tokens * experts)).enumerate();
        chunks.for_each(|(chunk, (p, logits))| {
            for (t, (p, logits)) in p.chunks_exact_mut(experts).zip(logits.chunks_exact(experts)).enumerate() {
                let at = (chunk * tokens + t) * experts;
                let taken = |e: &usize| self.takes(at + e);
                let max = (0..experts).filter(taken).fold(f32::NEG_INFINITY, |max, e| max.max(logits[e]));
                let mut sum = 0.0;
                for e in (0..experts).filter(taken) {
                    p[e] = exp(logits[e] - max);
                    sum += p[e];
                }
                if sum > 0.0 {
                    p.iter_mut().for_each(|p| *p /= sum);
                }
            }
        });
        p
    }
}

/// The expert and token of every row, as the place `t·E + e`.
fn places<'a>(token_r: &'a [u32], offsets_e1: &'a [u32]) -> impl Iterator<Item = usize> + 'a {
    let experts = offsets_e1.len() - 1;
    offsets_e1.windows(2).enumerate().flat_map(move |(e, rows)| {
        token_r[rows[0] as usize..rows[1] as usize].iter().map(move |t| *t as usize * experts + e)
    })
}

/// The weight of every row, `[R]`.
pub(crate) fn row_weights(logits: &[f32], token_r: &[u32], offsets_e1: &[u32], rule: WeightRule<'_>) -> Vec<f32> {
    let p = rule.probabilities(logits, offsets_e1.len() - 1);
    places(token_r, offsets_e1).map(|at| p[at]).collect()
}

/// The gradient of the logits, `[T, E]`, from that of the rows' weights, `d_w [R]`.
pub(crate) fn row_weights_backward(
    logits: &[f32],
    token_r: &[u32],
    offsets_e1: &[u32],
    rule: WeightRule<'_>,
    d_w: &[f32],
) -> Vec<f32> {
    let experts = offsets_e1.len() - 1;
    let p = rule.probabilities(logits, experts);
    // The gradients of the probabilities: 0 where there is no row.
    let mut d = vec![0.0; logits.len()];
    for (at, d_w) in places(token_r, offsets_e1).zip(d_w) {
        d[at] = *d_w;
    }
    let chunk = chunk_rows(experts) * experts;
    d.par_chunks_mut(chunk).zip(p.par_chunks(chunk)).for_each(|(d, p)| {
        for (d, p) in d.chunks_exact_mut(experts).zip(p.chunks_exact(experts)) {
            let mean: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
            d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean));
        }
    });
    d
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const E: usize = 5;

    /// A routing that dropped some of the chosen rows, and all rows of token 2.
    fn routing(tokens: usize) -> (Vec<u32>, Vec<u32>, Vec<bool>) {
        let chosen = |t: usize, e: usize| (t * 7 + e * 3) % 5 < 3;
        let kept = |t: usize, e: usize| chosen(t, e) && t != 2 && (t + e) % 4 != 1;
        let (mut token_r, mut offsets_e1) = (Vec::new(), vec![0]);
        for e in 0..E {
            token_r.extend((0..tokens).filter(|t| kept(*t, e)).map(|t| t as u32));
            offsets_e1.push(token_r.len() as u32);
        }
        (token_r, offsets_e1, (0..tokens * E).map(|at| chosen(at / E, at % E)).collect())
    }

    fn reference(logits: &[f64], token_r: &[u32], offsets_e1: &[u32], rule: WeightRule<'_>) -> Vec<f64> {
        let mut weights = Vec::new();
        for e in 0..E {
            for t in &token_r[offsets_e1[e] as usize..offsets_e1[e + 1] as usize] {
                let at = *t as usize * E;
                let all: f64 = logits[at..at + E].iter().map(|z| z.exp()).sum();
                let p = |e: usize| logits[at + e].exp() / all;
                let share = match rule {
                    WeightRule::Raw => 1.0,
                    WeightRule::Renormalised { chosen } => (0..E).filter(|e| chosen[at + e]).map(p).sum(),
                };
                weights.push(p(e) / share);
            }
        }
        weights
    }

    #[test]
    fn weights_and_their_gradients_match_the_reference() {
        let tokens = 9;
        let (token_r, offsets_e1, chosen) = routing(tokens);
        let logits: Vec<f32> = random(tokens * E, 1).iter().map(|z| 3.0 * z).collect();
        let d_w = random(token_r.len(), 2);
        for rule in [WeightRule::Raw, WeightRule::Renormalised { chosen: &chosen }] {
            let want = reference(&wide(&logits), &token_r, &offsets_e1, rule);
            assert_close(&row_weights(&logits, &token_r, &offsets_e1, rule), &want);
            let loss = |z: &[f64]| inner(&reference(z, &token_r, &offsets_e1, rule), &d_w);
            let got = row_weights_backward(&logits, &token_r, &offsets_e1, rule, &d_w);
            assert_close(&got, &numeric_gradient(&logits, loss));
        }
    }

    #[test]
    fn a_token_for_which_nothing_was_chosen_has_no_gradient() {
        let rule = WeightRule::Renormalised { chosen: &[false, false, true, true] };
        let d = row_weights_backward(&[1.0, 2.0, 3.0, 4.0], &[1, 1], &[0, 1, 2], rule, &[1.0, 0.0]);
        assert_eq!(d[..2], [0.0, 0.0]);
        assert!(d[2] > 0.0 && d[3] == -d[2]);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let tokens = 8_000;
        let (token_r, offsets_e1, chosen) = routing(tokens);
        let (logits, d_w) = (random(tokens * E, 1), random(token_r.len(), 2));
        let rule = WeightRule::Renormalised { chosen: &chosen };
        assert_same_bits_on_any_threads(|| {
            let mut all = row_weights(&logits, &token_r, &offsets_e1, rule);
            all.extend(row_weights_backward(&logits, &token_r, &offsets_e1, rule, &d_w));
            all
        });
    }
}
