//! Keeps the cost of the served traffic at a share of native routing's: `--router budget:…`.
//!
//! A calibrated policy comes as a ladder of rungs. Requests get the rung in force when they arrive and keep it. Once
//! enough tokens have been served by it, what they really cost is compared with the target, and the rung changes by one
//! at most: a slow integral controller, which never reacts to a single request. Under load, if it is told to shed, it
//! goes down further by the number of requests that wait.

use super::lock;
use crate::moe::Policy;
use crate::moe::calibration::Calibrations;
use crate::moe::router::{BudgetScope, BudgetSpec};
use crate::types::{BudgetState, Flops, MoeShape, RouterSpec, SpecError, Work};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// Tokens served by one rung before it is judged.
const WINDOW_TOKENS: u64 = 4096;
/// Versions that requests on their way may still name.
const VERSIONS_KEPT: usize = 256;

/// The controller. Shared by those who submit requests and the engine's thread.
pub(super) struct Budget {
    target: f64,
    scope: BudgetScope,
    /// The share that is kept even when many requests wait; without it, load changes nothing.
    shed_to: Option<f64>,
    /// From the cheapest up.
    rungs: Vec<Rung>,
    state: Mutex<State>,
}

struct Rung {
    share: f64,
    policy: Arc<Policy>,
}

struct State {
    /// In force where there is no load.
    rung: usize,
    /// What that rung cost since it was last judged.
    served: Work,
    /// Share that it came to when it was last judged.
    measured: Option<f64>,
    /// What requests got last, and before.
    versions: VecDeque<(u64, usize, bool)>,
}

/// What the metrics tell of a budget.
pub(super) struct BudgetReport {
    pub target: f64,
    pub measured: Option<f64>,
    pub share: f64,
    pub version: u64,
    pub shed: bool,
}

impl Budget {
    /// The controller for `spec`, a `budget:…`, which sheds load down to a share `shed_to`.
    ///
    /// # Errors
    /// A specification or a file that does not suit the model, or a share that is not below the target.
    pub(super) fn new(
        spec: &RouterSpec,
        shape: &MoeShape,
        files: &Calibrations,
        shed_to: Option<f64>,
    ) -> Result<Self, SpecError> {
        let BudgetSpec { target, scope, file, table } = BudgetSpec::read(spec, shape, files)?;
        if let Some(share) = shed_to.filter(|share| *share >= target) {
            return Err(spec.error(format!("--load-shed must be below the budget of {target}; got {share}")));
        }
        let mut rungs = Vec::with_capacity(table.rungs.len());
        for rung in &table.rungs {
            let policy = RouterSpec {
                name: "policy".into(),
                args: vec![file.clone()],
                options: vec![("at".into(), format!("{:.4}", rung.cost.min(1.0)))],
            };
            let policy = Arc::new(Policy::build_with(&policy, shape, files)?);
            rungs.push(Rung { share: rung.cost, policy });
        }
        let rung = rungs.iter().rposition(|rung| rung.share <= target + 1e-4).unwrap_or(0);
        let versions = VecDeque::from([(0, rung, false)]);
        let state = Mutex::new(State { rung, served: Work::default(), measured: None, versions });
        Ok(Self { target, scope, shed_to, rungs, state })
    }

    /// What a request gets that arrives while so many wait, of whom `seats` can run at a time.
    pub(super) fn now(&self, waiting: usize, seats: usize) -> BudgetState {
        let mut state = lock(&self.state);
        let base = state.rung;
        let rung = self.shed_to.map_or(base, |floor| {
            let pressure = (waiting as f64 / seats.max(1) as f64).min(1.0);
            let share = self.rungs[base].share;
            let afforded = share - (share - floor).max(0.0) * pressure;
            self.rungs[..=base].iter().rposition(|rung| rung.share <= afforded + 1e-9).unwrap_or(0)
        });
        state.change(rung, rung < base);
        self.state_of(state.versions[state.versions.len() - 1])
    }

    /// The policy of `version`, or the latest where that is not known any more.
    pub(super) fn policy(&self, version: Option<u64>) -> Arc<Policy> {
        let state = lock(&self.state);
        let named = state.versions.iter().find(|(number, ..)| Some(*number) == version);
        let rung = named.map_or(state.rung, |(_, rung, _)| *rung);
        self.rungs[rung].policy.clone()
    }

    /// Takes what a step served by `policy`; others than the rung in force say nothing about it.
    pub(super) fn served(&self, policy: &Policy, work: Work) {
        let mut state = lock(&self.state);
        if self.rungs[state.rung].policy.spec() != policy.spec() {
            return;
        }
        state.served += work;
        if state.served.tokens < WINDOW_TOKENS {
            return;
        }
        let Flops { ran, native } = match self.scope {
            BudgetScope::Experts => state.served.experts,
            BudgetScope::Forward => state.served.forward,
        };
        let share = ran as f64 / native.max(1) as f64;
        state.served = Work::default();
        state.measured = Some(share);
        let rung = state.rung;
        // What the rung above would have cost, if it differs by as much as it did in calibration.
        let above = self.rungs.get(rung + 1).map(|above| share * above.share / self.rungs[rung].share);
        if share > self.target && rung > 0 {
            state.rung = rung - 1;
        } else if above.is_some_and(|above| above <= self.target) {
            state.rung = rung + 1;
        }
        let rung = state.rung;
        state.change(rung, false);
    }

    pub(super) fn report(&self) -> BudgetReport {
        let state = lock(&self.state);
        let (version, rung, shed) = state.versions[state.versions.len() - 1];
        BudgetReport { target: self.target, measured: state.measured, share: self.rungs[rung].share, version, shed }
    }

    fn state_of(&self, (version, rung, shed): (u64, usize, bool)) -> BudgetState {
        let Rung { share, policy } = &self.rungs[rung];
        BudgetState { version, router: policy.spec().clone(), share: *share, shed }
    }
}

impl State {
    /// Puts `rung` in force, under a new version if it is another one.
    fn change(&mut self, rung: usize, shed: bool) {
        let (version, now, now_shed) = self.versions[self.versions.len() - 1];
        if (now, now_shed) == (rung, shed) {
            return;
        }
        self.versions.push_back((version + 1, rung, shed));
        if self.versions.len() > VERSIONS_KEPT {
            self.versions.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::calibration::{Calibration, HeldOut, PolicyTable};
    use crate::moe::router::Rule;

    fn shape() -> MoeShape {
        MoeShape {
            experts: 8,
            top_k: 4,
            expert_width: 8,
            shared_width: None,
            renormalise: true,
            layers: 2,
            router: None,
        }
    }

    /// A budget on rungs of 1, 2, 3 and 4 experts in both layers.
    fn budget(spec: &str, shed_to: Option<f64>) -> Result<Budget, SpecError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.json");
        let rung = |k: usize| crate::moe::calibration::Rung {
            cost: k as f64 / 4.0,
            mean_k: k as f64,
            rules: vec![Rule::Static { k }; 2],
        };
        let mut calibration = Calibration::uninformed(&shape(), "hash");
        calibration.policy = Some(PolicyTable {
            scope: "experts".into(),
            target: 0.75,
            batch: None,
            lsq: false,
            rungs: (1..=4).map(rung).collect(),
            held_out: HeldOut::default(),
        });
        std::fs::write(&path, serde_json::to_string(&calibration).unwrap()).unwrap();
        let spec = spec.replace("FILE", &path.display().to_string());
        Budget::new(&spec.parse().unwrap(), &shape(), &Calibrations::new(|| Ok("hash".into())), shed_to)
    }

    /// A window of traffic that came to `share` of native routing.
    fn window(share: f64) -> Work {
        let native = 1_000_000;
        let flops = Flops { ran: (share * native as f64) as u64, native };
        Work { tokens: WINDOW_TOKENS, experts: flops, forward: Flops { ran: native, native }, ..Default::default() }
    }

    fn in_force(budget: &Budget) -> f64 {
        budget.now(0, 1).share
    }

    #[test]
    fn traffic_that_costs_too_much_goes_down_a_rung_and_back_up_when_it_is_cheap() {
        let budget = budget("budget:0.75,policy=FILE", None).unwrap();
        assert_eq!(in_force(&budget), 0.75);
        let serve = |share: f64| budget.served(&budget.policy(None), window(share));
        serve(0.75);
        assert_eq!(in_force(&budget), 0.75, "on target");
        serve(0.8);
        assert_eq!(in_force(&budget), 0.5);
        serve(0.55);
        assert_eq!(in_force(&budget), 0.5, "the rung above would come to 0.825");
        serve(0.45);
        assert_eq!(in_force(&budget), 0.75);
        for _ in 0..5 {
            serve(0.9);
        }
        assert_eq!(in_force(&budget), 0.25, "there is nothing cheaper");
        assert_eq!(budget.report().measured, Some(0.9));
    }

    #[test]
    fn a_few_tokens_or_those_of_another_policy_change_nothing() {
        let budget = budget("budget:0.75,policy=FILE", None).unwrap();
        budget.served(&budget.policy(None), Work { tokens: WINDOW_TOKENS - 1, ..window(1.0) });
        let other = Policy::build(&"topk:1".parse().unwrap(), &shape()).unwrap();
        budget.served(&other, window(1.0));
        assert_eq!((in_force(&budget), budget.report().version), (0.75, 0));
    }

    #[test]
    fn a_request_keeps_its_version() {
        let budget = budget("budget:0.75,policy=FILE", None).unwrap();
        let first = budget.now(0, 1);
        budget.served(&budget.policy(None), window(1.0));
        let second = budget.now(0, 1);
        assert_eq!((first.version, second.version), (0, 1));
        assert_eq!(budget.policy(Some(0)).spec(), &first.router);
        assert_eq!(budget.policy(Some(1)).spec(), &second.router);
        assert_eq!(budget.policy(Some(99)).spec(), &second.router);
        assert_ne!(first.router, second.router);
    }

    #[test]
    fn load_is_shed_by_the_share_of_seats_that_others_wait_for() {
        let shedding = budget("budget:1,policy=FILE", Some(0.25)).unwrap();
        for (waiting, share) in [(0, 1.0), (1, 0.75), (2, 0.5), (4, 0.25), (40, 0.25)] {
            let state = shedding.now(waiting, 4);
            assert_eq!((state.share, state.shed), (share, share < 1.0), "{waiting} wait");
        }
        let state = budget("budget:1,policy=FILE", None).unwrap().now(40, 4);
        assert_eq!((state.share, state.shed), (1.0, false), "unless it is not asked to");
    }

    #[test]
    fn scopes_are_judged_by_their_own_flops() {
        let budget = budget("budget:0.75,policy=FILE,scope=forward", None).unwrap();
        budget.served(&budget.policy(None), window(0.1));
        assert_eq!(in_force(&budget), 0.5, "the forward pass of that window cost as much as native routing's");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (spec, shed_to, want) in [
            ("budget:0,policy=FILE", None, "(0, 1]; got 0"),
            ("budget:0.5", None, "needs policy=FILE"),
            ("budget:0.5,policy=FILE,scope=bytes", None, "one of experts, forward; got bytes"),
            ("budget:0.5,policy=FILE", Some(0.5), "--load-shed must be below the budget of 0.5; got 0.5"),
        ] {
            let error = budget(spec, shed_to).err().unwrap().to_string();
            assert!(error.contains(want), "{spec}: {error}");
        }
    }
}
