//! Draws the next token.
//!
//! Order of the rules: penalties, biases, what is forbidden, temperature, min-p, top-k, top-p, draw.

use super::grammar::Grammar;
use crate::ops;
use crate::types::{SamplingParams, TokenId};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

thread_local! {
    /// A thread's, so that no token needs memory of its own. Taken while in use: a thread may begin another draw.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

#[derive(Default)]
struct Scratch {
    /// Logits, then weights.
    weights: Vec<f32>,
    candidates: Vec<(TokenId, f64)>,
}

/// One request's sampling state. Its draws depend on its own seed and tokens alone.
#[derive(Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// How often each token was generated.
    generated: HashMap<TokenId, u32>,
    /// Tokens of prompt or output, for the repetition penalty.
    seen: Vec<TokenId>,
}

impl Sampler {
    pub(super) fn new(params: SamplingParams, prompt: &[TokenId]) -> Self {
        let seed = params.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let mut seen = Vec::new();
        if params.repetition_penalty != 1.0 {
            seen.extend(prompt);
            seen.sort_unstable();
            seen.dedup();
        }
        Self { params, rng: ChaCha8Rng::seed_from_u64(seed), generated: HashMap::new(), seen }
    }

    /// Draws from `logits`; tokens of `forbidden`, and those that `grammar` has no place for, are never drawn.
    ///
    /// # Errors
    /// Nothing is left to draw, or the grammar failed; the message says which.
    pub(super) fn sample(
        &mut self,
        logits: &[f32],
        forbidden: &[TokenId],
        grammar: Option<&mut Grammar>,
    ) -> Result<TokenId, String> {
        let mut scratch = SCRATCH.take();
        scratch.weights.clear();
        scratch.weights.extend_from_slice(logits);
        let sampled = self.sample_in(&mut scratch, forbidden, grammar);
        SCRATCH.set(scratch);
        sampled
    }

    fn sample_in(
        &mut self,
        scratch: &mut Scratch,
        forbidden: &[TokenId],
        grammar: Option<&mut Grammar>,
    ) -> Result<TokenId, String> {
        let Scratch { weights: logits, candidates } = scratch;
        self.penalise(logits);
        for id in forbidden {
            logits[*id as usize] = f32::NEG_INFINITY;
        }
        if let Some(grammar) = grammar {
            grammar.mask(logits).map_err(|error| error.to_string())?;
        }
        let drawn = if self.params.temperature == 0.0 { greedy(logits) } else { self.draw(logits, candidates) };
        let id = drawn.ok_or("the model gave no finite logit for a token that is allowed")?;
        *self.generated.entry(id).or_default() += 1;
        if self.params.repetition_penalty != 1.0
            && let Err(at) = self.seen.binary_search(&id)
        {
            self.seen.insert(at, id);
        }
        Ok(id)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let p = &self.params;
        for id in &self.seen {
            let logit = &mut logits[*id as usize];
            *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
        }
        if p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            for (id, count) in &self.generated {
                logits[*id as usize] -= p.presence_penalty + p.frequency_penalty * *count as f32;
            }
        }
        for (id, bias) in &p.logit_bias {
            logits[*id as usize] += bias;
        }
    }

    /// Draws from `logits`, which become weights.
    fn draw(&mut self, logits: &mut [f32], candidates: &mut Vec<(TokenId, f64)>) -> Option<TokenId> {
        let p = &self.params;
        let max = logits[greedy(logits)? as usize];
        for logit in logits.iter_mut().filter(|logit| !logit.is_finite()) {
            *logit = f32::NEG_INFINITY;
        }
        // e^((logit − max) / temperature) is the probability up to a factor; min-p is a floor on it.
        let inverse = (1.0 / p.temperature).min(f32::MAX);
        ops::exponentiate(logits, max, inverse);
        let weights = &*logits;
        let possible = |weight: f32| weight > 0.0 && weight >= p.min_p;
        let weighty = (0..).zip(weights).filter(|(_, weight)| possible(**weight));
        let weighty = weighty.map(|(id, weight)| (id, f64::from(*weight)));
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let vocab = weights.len();
        let top_k = if p.top_k > 0 { p.top_k as usize } else { vocab };
        if top_k >= vocab && p.top_p >= 1.0 {
            return pick(weighty, uniform);
        }
        candidates.clear();
        candidates.extend(weighty);
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_weight);
            candidates.truncate(top_k);
        }
        if p.top_p < 1.0 {
            keep_top_p(candidates, f64::from(p.top_p));
        }
        // In order of ids, so that the draw does not hang on how candidates were selected.
        candidates.sort_unstable_by_key(|c| c.0);
        pick(candidates.iter().copied(), uniform)
    }
}

/// The candidate at share `uniform`, from 0 to 1, of the weight of all.
fn pick(candidates: impl Iterator<Item = (TokenId, f64)> + Clone, uniform: f64) -> Option<TokenId> {
    let mut left = uniform * candidates.clone().map(|c| c.1).sum::<f64>();
    let mut last = None;
    for (id, weight) in candidates {
        last = Some(id);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Heaviest first, the lower id among equals.
fn by_weight(a: &(TokenId, f64), b: &(TokenId, f64)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the fewest heaviest candidates that hold a share `top_p` of the weight. Sorts only as far as needed.
fn keep_top_p(candidates: &mut Vec<(TokenId, f64)>, top_p: f64) {
    let goal = top_p * candidates.iter().map(|c| c.1).sum::<f64>();
    let (mut sorted, mut gathered, mut step) = (0, 0.0, 64);
    while sorted < candidates.len() {
        let end = candidates.len().min(sorted + step);
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, by_weight);
        }
        candidates[sorted..end].sort_unstable_by(by_weight);
        for at in sorted..end {
            gathered += candidates[at].1;
            if gathered >= goal {
                candidates.truncate(at + 1);
                return;
            }
        }
        sorted = end;
        step *= 4;
    }
}

/// The largest logit, the first of equals; not-a-numbers never win.
fn greedy(logits: &[f32]) -> Option<TokenId> {
    let mut best = None;
    for (id, logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, max)| *logit > max) {
            best = Some((id as TokenId, *logit));
        }
    }
    best.map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(edit: impl FnOnce(&mut SamplingParams)) -> Sampler {
        let mut params = SamplingParams { seed: Some(7), ..Default::default() };
        edit(&mut params);
        Sampler::new(params, &[1])
    }

    /// How often each of 5 tokens is drawn from these logits in 4000 draws.
    fn shares(logits: [f32; 5], edit: impl FnOnce(&mut SamplingParams)) -> [f64; 5] {
        let mut sampler = sampler(edit);
        let mut counts = [0.0; 5];
        for _ in 0..4000 {
            counts[sampler.sample(&logits, &[], None).unwrap() as usize] += 1.0 / 4000.0;
        }
        counts
    }

    const LOGITS: [f32; 5] = [0.0, 1.0, 2.0, 3.0, -1.0];

    #[test]
    fn draws_follow_the_softmax_and_its_temperature() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|z| f64::from(z / temperature).exp());
            let total: f64 = weights.iter().sum();
            let got = shares(LOGITS, |p| p.temperature = temperature);
            for (g, w) in got.iter().zip(weights) {
                assert!((g - w / total).abs() < 0.03, "{got:?} at temperature {temperature}");
            }
        }
    }

    #[test]
    fn filters_leave_what_they_should() {
        let drawn = |edit: fn(&mut SamplingParams)| -> Vec<usize> {
            let shares = shares(LOGITS, edit);
            (0..5).filter(|i| shares[*i] > 0.0).collect()
        };
        assert_eq!(drawn(|p| p.temperature = 0.0), [3]);
        assert_eq!(drawn(|p| p.top_k = 1), [3]);
        assert_eq!(drawn(|p| p.top_k = 2), [2, 3]);
        assert_eq!(drawn(|p| p.top_p = 0.6), [3]); // 3 alone has .636
        assert_eq!(drawn(|p| p.top_p = 0.7), [2, 3]);
        assert_eq!(drawn(|p| p.min_p = 0.2), [2, 3]); // e^-1 = .37, e^-2 = .14
        assert_eq!(sampler(|p| p.temperature = 0.0).sample(&LOGITS, &[3], None), Ok(2));
    }

    #[test]
    fn biases_are_added() {
        let mut biased = sampler(|p| (p.temperature, p.logit_bias) = (0.0, vec![(4, 5.0), (3, -100.0)]));
        assert_eq!(biased.sample(&LOGITS, &[], None), Ok(4));
    }

    #[test]
    fn penalties_push_tokens_down() {
        let mut presence = sampler(|p| (p.temperature, p.presence_penalty) = (0.0, 1.5));
        assert_eq!([0, 1].map(|_| presence.sample(&LOGITS, &[], None).unwrap()), [3, 2]);
        let mut frequency = sampler(|p| (p.temperature, p.frequency_penalty) = (0.0, 0.6));
        assert_eq!([0, 1, 2].map(|_| frequency.sample(&LOGITS, &[], None).unwrap()), [3, 3, 2]);
        let mut repetition =
            Sampler::new(SamplingParams { temperature: 0.0, repetition_penalty: 2.0, ..Default::default() }, &[3]);
        assert_eq!(repetition.sample(&LOGITS, &[], None), Ok(2));
    }

    #[test]
    fn not_a_number_is_never_drawn() {
        let nan = f32::NAN;
        for temperature in [0.0, 1.0] {
            let mut s = sampler(|p| p.temperature = temperature);
            assert_eq!(s.sample(&[nan, 1.0, nan], &[], None), Ok(1));
            assert_eq!(s.sample(&[nan, f32::INFINITY, f32::NEG_INFINITY], &[], None).ok(), None);
        }
    }

    #[test]
    fn the_lowest_temperatures_draw_the_largest_logit() {
        for temperature in [1e-3, 1e-20, 1e-40] {
            let mut s = sampler(|p| p.temperature = temperature);
            assert_eq!(s.sample(&[1.0, 3.0, 2.9], &[], None), Ok(1), "{temperature}");
        }
    }

    #[test]
    fn a_seed_fixes_the_draws_and_no_seed_does_not() {
        let run = |seed| {
            let mut s = Sampler::new(SamplingParams { seed, ..Default::default() }, &[]);
            (0..40).map(|_| s.sample(&[0.0; 50], &[], None).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(Some(1)), run(Some(1)));
        assert_ne!(run(Some(1)), run(Some(2)));
        assert_ne!(run(None), run(None));
    }

    proptest! {
        #[test]
        fn partial_sorting_keeps_the_same_nucleus_as_full_sorting(
            weights in proptest::collection::vec(0.001f64..1.0, 1..400), top_p in 0.01f64..1.0
        ) {
            let mut all: Vec<(TokenId, f64)> = weights.iter().enumerate().map(|(i, w)| (i as u32, *w)).collect();
            let mut kept = all.clone();
            keep_top_p(&mut kept, top_p);
            all.sort_unstable_by(by_weight);
            let goal = top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let n = all.iter().position(|c| { sum += c.1; sum >= goal }).unwrap_or(all.len() - 1) + 1;
            prop_assert_eq!(&kept[..], &all[..n]);
        }
    }
}
