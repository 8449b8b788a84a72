//! The dynamic policy beside static routing at the same cost, on text that neither was fitted to.

use super::measure::{Arm, Bench, Scores};
use super::{CalibrateError, Scope};
use crate::eval::LmError;
use crate::eval::stats::{Estimate, mean_difference, mean_interval, perplexity};
use crate::moe::calibration::{Contender, HeldOut, Rung};
use crate::types::{RouterSpec, TokenId};

/// What one contender came to, with intervals over windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    pub contender: Contender,
    pub kl: Estimate,
    pub perplexity: Estimate,
}

/// The outcome of the check.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    pub windows: usize,
    pub tokens: usize,
    pub native_perplexity: Estimate,
    pub dynamic: Tried,
    pub fixed: Tried,
    /// KL of the dynamic policy less that of the static one, paired by window.
    pub difference: Estimate,
}

/// Who competes.
pub(super) struct Contest<'a> {
    pub dynamic: &'a Rung,
    pub dynamic_lsq: bool,
    /// The best static allocations for all budgets, from the cheapest up.
    pub statics: &'a [Rung],
    pub static_lsq: bool,
    pub scope: Scope,
}

/// Draws of the bootstrap.
const RESAMPLES: usize = 2000;

impl Checked {
    /// Whether the dynamic policy comes closer to native routing.
    pub fn dynamic_wins(&self) -> bool {
        self.difference.value < 0.0
    }

    /// As the file has it.
    pub fn held_out(&self) -> HeldOut {
        HeldOut {
            tokens: self.tokens,
            dynamic: self.dynamic.contender.clone(),
            fixed: self.fixed.contender.clone(),
            difference: self.difference.value,
            low: self.difference.low,
            high: self.difference.high,
            winner: if self.dynamic_wins() { "dynamic" } else { "static" }.into(),
        }
    }

    /// Runs the contest on `windows`.
    ///
    /// # Errors
    /// A failure of the engine.
    pub(super) fn run(
        bench: &Bench,
        contest: &Contest<'_>,
        windows: &[Vec<TokenId>],
        seed: u64,
    ) -> Result<Self, CalibrateError> {
        let n = windows.len();
        let dynamic = Arm { rules: contest.dynamic.rules.clone(), lsq: contest.dynamic_lsq };
        let own = bench.scores(windows, &vec![bench.spec(&dynamic)?; n])?;
        // FLOPs are matched where they are counted; a window's own step reads nearly every expert, so bytes are matched
        // as they are expected of decoding.
        let mix = match contest.scope {
            Scope::Bytes => Mix::at(contest.statics, contest.dynamic.cost, |rung| rung.cost, n),
            _ => Mix::at(contest.statics, own.routed.mean_k(), |rung| rung.mean_k, n),
        };
        let fixed =
            [mix.lower, mix.upper].map(|i| Arm { rules: contest.statics[i].rules.clone(), lsq: contest.static_lsq });
        let specs = [bench.spec(&fixed[0])?, bench.spec(&fixed[1])?];
        let takes = |w: usize| usize::from(mix.takes_upper(w));
        let routers: Vec<RouterSpec> = (0..n).map(|w| specs[takes(w)].clone()).collect();
        let control = bench.scores(windows, &routers)?;
        let native = bench.scores(windows, &vec![RouterSpec::native(); n])?;
        let [lower, upper] = fixed;
        let kl = bench.kl(&[dynamic, lower, upper], windows, None, "held-out check")?;
        let control_kl: Vec<f64> = (0..n).map(|w| kl[1 + takes(w)][w]).collect();
        let pairs: Vec<[f64; 2]> = kl[0].iter().zip(&control_kl).map(|(a, b)| [*a, *b]).collect();
        Ok(Self {
            windows: n,
            tokens: windows.iter().map(Vec::len).sum(),
            native_perplexity: known(perplexity(&native.windows, RESAMPLES, seed))?,
            dynamic: tried(&own, &kl[0], seed)?,
            fixed: tried(&control, &control_kl, seed)?,
            difference: known(mean_difference(&pairs, RESAMPLES, seed))?,
        })
    }
}

fn known(estimate: Option<Estimate>) -> Result<Estimate, CalibrateError> {
    let problem = "KL or perplexity of the held-out text is no finite number: check the checkpoint and --dtype";
    estimate.ok_or_else(|| LmError(problem.into()).into())
}

fn tried(scores: &Scores, kl_w: &[f64], seed: u64) -> Result<Tried, CalibrateError> {
    let kl = known(mean_interval(kl_w, RESAMPLES, seed))?;
    let perplexity = known(perplexity(&scores.windows, RESAMPLES, seed))?;
    let share = |[ran, native]: [u64; 2]| ran as f64 / native.max(1) as f64;
    let contender = Contender {
        mean_k: scores.routed.mean_k(),
        expert_flops: share(scores.routed.expert_flops),
        forward_flops: share(scores.routed.forward_flops),
        expert_bytes: scores.reads.ran / scores.reads.native.max(1.0),
        kl: kl.value,
        perplexity: perplexity.value,
    };
    Ok(Tried { contender, kl, perplexity })
}

/// Two static allocations between which windows alternate, so that together they cost what was asked for: one alone
/// cannot have any mean k.
struct Mix {
    lower: usize,
    upper: usize,
    /// Of so many windows, so many take the upper one.
    windows: usize,
    uppers: usize,
}

impl Mix {
    /// Of `rungs`, from the cheapest up, at `wanted` on the scale of `cost`.
    fn at(rungs: &[Rung], wanted: f64, cost: impl Fn(&Rung) -> f64, windows: usize) -> Self {
        let upper = rungs.partition_point(|rung| cost(rung) < wanted).min(rungs.len() - 1);
        let lower = if cost(&rungs[upper]) <= wanted { upper } else { upper.saturating_sub(1) };
        let apart = cost(&rungs[upper]) - cost(&rungs[lower]);
        let share = if apart > 0.0 { (wanted - cost(&rungs[lower])) / apart } else { 0.0 };
        Self { lower, upper, windows, uppers: (share.clamp(0.0, 1.0) * windows as f64).round() as usize }
    }

    /// Whether window `w` takes the upper one: evenly spread.
    fn takes_upper(&self, w: usize) -> bool {
        (w + 1) * self.uppers / self.windows > w * self.uppers / self.windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_of_two_neighbours_costs_what_is_wanted() {
        let rung = |mean_k: f64| Rung { cost: mean_k / 2.0, mean_k, rules: Vec::new() };
        let rungs = [1.0, 1.25, 1.5, 2.0].map(rung);
        for (wanted, lower, upper) in
            [(1.0, 0, 0), (1.1, 0, 1), (1.25, 1, 1), (1.4, 1, 2), (1.9, 2, 3), (2.0, 3, 3), (0.5, 0, 0), (3.0, 3, 3)]
        {
            let mix = Mix::at(&rungs, wanted, |rung| rung.mean_k, 40);
            assert_eq!((mix.lower, mix.upper), (lower, upper), "{wanted}");
            let of = |w: usize| rungs[if mix.takes_upper(w) { mix.upper } else { mix.lower }].mean_k;
            let mean = (0..40).map(of).sum::<f64>() / 40.0;
            assert!((mean - wanted.clamp(1.0, 2.0)).abs() < 0.01, "{wanted} came to {mean}");
        }
    }
}
