//! What each layer can do, what it costs and what it loses.

use super::{Item, LayerTrace, Scope, Signal, Steps, Target};
use crate::moe::router::Rule;

/// A rule that a layer can have, with its mean k on the trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub rule: Rule,
    pub mean_k: f64,
    pub item: Item,
}

/// A layer's rules that are to be measured.
pub(super) struct Layer<'a> {
    trace: &'a LayerTrace,
    norms_e: &'a [f32],
    steps: Vec<Steps>,
    top_k: usize,
}

/// Measured points of a signal between one expert and k0, at most.
const POINTS_MAX: usize = 8;
/// Parts that the stretch between two measured points is cut into: their loss is interpolated.
const PARTS: usize = 4;

impl<'a> Layer<'a> {
    pub(super) fn new(trace: &'a LayerTrace, norms_e: &'a [f32]) -> Self {
        let steps = Signal::ALL.map(|signal| Steps::of(trace, signal, norms_e)).to_vec();
        Self { trace, norms_e, steps, top_k: trace.top_k }
    }

    /// The rules whose loss is measured: all static ones but k0, which loses nothing, then the grid of every signal.
    pub(super) fn measured(&self) -> Vec<Rule> {
        let fixed = (1..self.top_k).map(|k| Rule::Static { k });
        let grid = grid(self.top_k);
        let dynamic = self.steps.iter().flat_map(|steps| grid.iter().map(|mean_k| steps.rule(*mean_k)));
        fixed.chain(dynamic).collect()
    }

    /// All choices, given the `losses` of [`Self::measured`] in order: static ones first, from one expert to k0.
    pub(super) fn choices(&self, losses: &[f64], target: &Target) -> Vec<Choice> {
        let (fixed, dynamic) = losses.split_at(self.top_k - 1);
        let choice = |rule: Rule, loss: f64| {
            let used_e = self.trace.used(&rule, self.norms_e);
            let mean_k = used_e.iter().sum::<u64>() as f64 / self.trace.tokens() as f64;
            Choice { rule, mean_k, item: Item { cost: self.cost(&used_e, mean_k, target), loss } }
        };
        let loss_of = |k: usize| fixed.get(k - 1).copied().unwrap_or(0.0);
        let mut choices: Vec<Choice> = (1..=self.top_k).map(|k| choice(Rule::Static { k }, loss_of(k))).collect();
        let grid = grid(self.top_k);
        for (steps, losses) in self.steps.iter().zip(dynamic.chunks(grid.len())) {
            let ends = [(1.0, loss_of(1)), (self.top_k as f64, 0.0)];
            let inner = grid.iter().copied().zip(losses.iter().copied());
            let points: Vec<(f64, f64)> = ends[..1].iter().copied().chain(inner).chain(ends[1..].to_vec()).collect();
            let parts = points.windows(2).flat_map(|pair| between(pair[0], pair[1]));
            // The ends are static.
            choices.extend(parts.skip(1).map(|(mean_k, loss)| choice(steps.rule(mean_k), loss)));
        }
        choices
    }

    /// What one expert per token costs, and what k0 do.
    pub(super) fn span(&self, target: &Target) -> (f64, f64) {
        let cost = |k: usize| self.cost(&self.trace.used(&Rule::Static { k }, self.norms_e), k as f64, target);
        (cost(1), cost(self.top_k))
    }

    /// Experts per token, or for bytes the distinct experts that a step of the batch's tokens reads if each draws its
    /// experts by how often they are used: Σ 1 − (1 − q_e)^B.
    fn cost(&self, used_e: &[u64], mean_k: f64, target: &Target) -> f64 {
        if target.scope != Scope::Bytes {
            return mean_k;
        }
        distinct(used_e, self.trace.tokens(), target.batch.unwrap_or(1))
    }
}

/// See [`Layer::cost`].
fn distinct(used_e: &[u64], tokens: usize, batch: usize) -> f64 {
    let share = |used: &u64| *used as f64 / tokens.max(1) as f64;
    used_e.iter().map(|used| 1.0 - (1.0 - share(used)).powi(batch.min(1 << 20) as i32)).sum()
}

/// From one point up to, and without, the next.
fn between(from: (f64, f64), to: (f64, f64)) -> impl Iterator<Item = (f64, f64)> {
    (0..PARTS).map(move |part| {
        let weight = part as f64 / PARTS as f64;
        (from.0 + weight * (to.0 - from.0), from.1 + weight * (to.1 - from.1))
    })
}

/// Mean k at which signals are measured: quarters, halves or whole experts, as few as give enough.
fn grid(top_k: usize) -> Vec<f64> {
    let mut step = 0.25;
    while (top_k - 1) as f64 / step - 1.0 > POINTS_MAX as f64 {
        step *= 2.0;
    }
    let points = ((top_k - 1) as f64 / step).ceil() as usize - 1;
    (1..=points).map(|i| 1.0 + i as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_is_fine_for_few_experts_and_short_for_many() {
        assert_eq!(grid(2), [1.25, 1.5, 1.75]);
        assert_eq!(grid(4), [1.5, 2.0, 2.5, 3.0, 3.5]);
        assert_eq!(grid(8), [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(grid(22), [5.0, 9.0, 13.0, 17.0, 21.0]);
        for top_k in 2..70 {
            let grid = grid(top_k);
            assert!(!grid.is_empty() && grid.len() <= POINTS_MAX);
            assert!(grid.iter().all(|mean_k| *mean_k > 1.0 && *mean_k < top_k as f64), "{top_k}: {grid:?}");
        }
    }

    #[test]
    fn distinct_experts_are_counted_as_independent_draws_have_them() {
        // Two experts that every second token uses, one that all do.
        assert!((distinct(&[5, 5, 10, 0], 10, 1) - 2.0).abs() < 1e-12);
        assert!((distinct(&[5, 5, 10, 0], 10, 3) - (2.0 * 0.875 + 1.0)).abs() < 1e-12);
    }
}
