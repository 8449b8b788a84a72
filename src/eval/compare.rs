//! Routers beside native routing and beside static routing at the same mean k.

use super::log::Log;
use super::results::{Arm, Comparison, Role, TaskResult};
use super::run::{Routes, RunError, Runner};
use super::stats;
use super::suite::Task;
use super::summary::{Bootstrap, correct, outcomes, routed, task_result, windows};
use crate::types::{MoeShape, RouterSpec};

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// None: the model's own router alone.
    pub routers: Vec<Arrangement>,
    /// Whether native routing and static controls are run beside them.
    pub compare_static: bool,
    pub bootstrap: Bootstrap,
    /// The model's mixtures; none over HTTP, where there are no controls.
    pub moe: Option<MoeShape>,
}

/// A router of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrangement {
    pub spec: RouterSpec,
    /// Whether how many experts it takes depends on the token: such a router has a static control.
    pub dynamic: bool,
    /// Options that give its control the same weights.
    pub weights: Vec<(String, String)>,
}

/// Name of the arm that routes natively.
const NATIVE: &str = "native";
/// Name of the only arm, where no router was asked for.
const OWN: &str = "the model's own";
/// Draws of the permutation test: its least p must stay small after correction for many comparisons.
const SIGN_FLIPS: usize = 100_000;
/// Share of chance findings that is tolerated.
const ALPHA: f64 = 0.05;

/// An arm on one task, before it has run.
struct Leg {
    label: String,
    role: Role,
    routes: Routes,
}

/// Runs `plan` on all of `tasks`. What was answered before is not asked again. `on_result` is told what each arm came
/// to on each task.
///
/// # Errors
/// The first failure of the model or the log.
pub fn evaluate(
    runner: &Runner<'_>,
    tasks: &[Task],
    plan: &Plan,
    mut on_result: impl FnMut(&str, &TaskResult),
) -> Result<Vec<Arm>, RunError> {
    let mut arms: Vec<Arm> = Vec::new();
    for task in tasks {
        let mut legs: Vec<Leg> = Vec::new();
        for leg in first_legs(plan) {
            run(runner, task, &leg, plan, &mut on_result)?;
            let control = match (&plan.moe, dynamic(plan, &leg)) {
                (Some(moe), Some(router)) if plan.compare_static => control(runner, task, (&leg, router), moe),
                _ => None,
            };
            legs.push(leg);
            if let Some(control) = control {
                run(runner, task, &control, plan, &mut on_result)?;
                legs.push(control);
            }
        }
        if plan.compare_static {
            let others = legs.iter().filter(|leg| leg.role != Role::Native);
            let others: Vec<(String, Routes)> = others.map(|leg| (leg.label.clone(), leg.routes.clone())).collect();
            runner.compare(task, &others, plan.bootstrap.kl_samples)?;
        }
        for leg in legs {
            let result = task_result(&runner.log(), task, &leg.label, plan.bootstrap);
            match arms.iter_mut().find(|arm| arm.label == leg.label) {
                Some(arm) => arm.tasks.push(result),
                None => arms.push(Arm { label: leg.label, role: leg.role, tasks: vec![result] }),
            }
        }
    }
    Ok(arms)
}

fn run(
    runner: &Runner<'_>,
    task: &Task,
    leg: &Leg,
    plan: &Plan,
    on_result: &mut impl FnMut(&str, &TaskResult),
) -> Result<(), RunError> {
    runner.run(task, &leg.label, &leg.routes)?;
    // Intervals are not shown yet.
    let bootstrap = Bootstrap { resamples: 1, ..plan.bootstrap };
    on_result(&leg.label, &task_result(&runner.log(), task, &leg.label, bootstrap));
    Ok(())
}

/// The arms whose routers are known from the start.
fn first_legs(plan: &Plan) -> Vec<Leg> {
    let native = RouterSpec::native();
    let mut legs = Vec::new();
    if plan.compare_static {
        legs.push(Leg { label: NATIVE.into(), role: Role::Native, routes: Routes::One(Some(native.clone())) });
    }
    for spec in plan.routers.iter().map(|r| &r.spec).filter(|spec| !plan.compare_static || **spec != native) {
        let role = if *spec == native { Role::Native } else { Role::Router };
        legs.push(Leg { label: spec.to_string(), role, routes: Routes::One(Some(spec.clone())) });
    }
    if legs.is_empty() {
        legs.push(Leg { label: OWN.into(), role: Role::Router, routes: Routes::One(None) });
    }
    legs
}

fn dynamic<'a>(plan: &'a Plan, leg: &Leg) -> Option<&'a Arrangement> {
    plan.routers.iter().find(|r| r.dynamic && r.spec.to_string() == leg.label)
}

/// Static routing at the mean k that `leg` had on `task`, under the same rule of weights; none for a model without
/// mixtures.
fn control(runner: &Runner<'_>, task: &Task, (leg, router): (&Leg, &Arrangement), moe: &MoeShape) -> Option<Leg> {
    if moe.layers == 0 {
        return None;
    }
    let log = runner.log();
    let own = outcomes(&log, task, &leg.label);
    let mean_k = routed(&own)?.mean_k();
    let role = Role::Control { of: leg.label.clone() };
    // What the control generates is not known yet: about as much as its router did.
    let tokens: Vec<u64> = own.iter().map(|o| o.routed.as_ref().map_or(0, |r| r.tokens)).collect();
    let routes = static_mix(mean_k, moe, &router.weights, &tokens);
    Some(Leg { label: format!("static control of {}", leg.label), role, routes })
}

/// The two static mixes of layers next to `mean_k`, and which samples, of so many `tokens` each, take the larger one, so
/// that together they have this mean k. Samples are taken evenly spread, whatever they ask.
fn static_mix(mean_k: f64, moe: &MoeShape, options: &[(String, String)], tokens: &[u64]) -> Routes {
    let rows_max = moe.layers * moe.experts;
    let rows = (mean_k * moe.layers as f64).clamp(moe.layers as f64, rows_max as f64);
    let lower = rows.floor() as usize;
    let spec = |rows: usize| RouterSpec {
        name: "layers".into(),
        args: spread(rows, moe.layers).iter().map(usize::to_string).collect(),
        options: options.to_vec(),
    };
    let (share, mut owed) = (rows - lower as f64, 0.0);
    let takes = |tokens: &u64| {
        owed += share * *tokens as f64;
        let takes = owed > *tokens as f64 / 2.0;
        owed -= if takes { *tokens as f64 } else { 0.0 };
        takes
    };
    let takes_upper = tokens.iter().map(takes).collect();
    Routes::Mixed { lower: spec(lower), upper: spec((lower + 1).min(rows_max)), takes_upper }
}

/// `rows` experts over `layers` layers as evenly as can be, those with one more spread over the depth.
fn spread(rows: usize, layers: usize) -> Vec<usize> {
    (0..layers).map(|l| (l + 1) * rows / layers - l * rows / layers).collect()
}

/// Every router beside native and beside its control, every control beside native, on the headline metric.
pub fn comparisons(log: &Log, tasks: &[Task], arms: &[Arm], bootstrap: Bootstrap) -> Vec<Comparison> {
    let mut found = Vec::new();
    for task in tasks {
        for arm in arms {
            let native = arms.iter().find(|a| a.role == Role::Native && a.label != arm.label);
            let control = arms.iter().find(|a| a.role == Role::Control { of: arm.label.clone() });
            for against in native.into_iter().chain(control) {
                found.extend(comparison(log, task, &arm.label, &against.label, bootstrap));
            }
        }
    }
    let p_holm = stats::holm(&found.iter().map(|c| c.p).collect::<Vec<_>>());
    for (comparison, p_holm) in found.iter_mut().zip(p_holm) {
        comparison.p_holm = p_holm;
        comparison.significant = p_holm < ALPHA;
    }
    found
}

fn comparison(log: &Log, task: &Task, arm: &str, against: &str, bootstrap: Bootstrap) -> Option<Comparison> {
    let (ours, theirs) = (outcomes(log, task, arm), outcomes(log, task, against));
    let (resamples, seed) = (bootstrap.resamples, bootstrap.seed);
    let counted = |n: usize| Some(n as u64);
    let (metric, estimate, p, only_arm, only_against) = match task.entry {
        Some(entry) => {
            let pairs = paired(&correct(&ours, 0), &correct(&theirs, 0));
            let only = |first: f64| pairs.iter().filter(|[a, b]| *a == first && *b != first).count();
            let (b, c) = (only(1.0), only(0.0));
            let p = stats::mcnemar(b as u64, c as u64);
            (*entry.metrics.first()?, stats::mean_difference(&pairs, resamples, seed)?, p, counted(b), counted(c))
        }
        None => {
            let pairs = paired(&windows(&ours), &windows(&theirs));
            let nats: Vec<f64> = pairs.iter().map(|[a, b]| a.nats - b.nats).collect();
            let p = stats::sign_flip(&nats, SIGN_FLIPS, seed);
            ("perplexity", stats::perplexity_difference(&pairs, resamples, seed)?, p, None, None)
        }
    };
    Some(Comparison {
        task: task.name.clone(),
        metric: metric.into(),
        arm: arm.into(),
        against: against.into(),
        difference: estimate.value,
        low: estimate.low,
        high: estimate.high,
        p,
        p_holm: p,
        only_arm,
        only_against,
        significant: false,
    })
}

fn paired<T: Copy>(a: &[T], b: &[T]) -> Vec<[T; 2]> {
    a.iter().zip(b).map(|(a, b)| [*a, *b]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moe(layers: usize) -> MoeShape {
        MoeShape { experts: 8, top_k: 2, expert_width: 4, shared_width: None, renormalise: true, layers, router: None }
    }

    #[test]
    fn a_static_mix_has_the_mean_k_asked_for() {
        for (layers, mean_k) in [(4, 1.29), (4, 1.0), (4, 2.0), (16, 5.37), (4, 8.0), (3, 7.99)] {
            let tokens: Vec<u64> = (0..1000).map(|i| 5 + i * 7919 % 300).collect();
            let routes = static_mix(mean_k, &moe(layers), &[], &tokens);
            let rows = |spec: &RouterSpec| spec.args.iter().map(|k| k.parse::<usize>().unwrap()).sum::<usize>();
            let all: usize = tokens.iter().enumerate().map(|(i, n)| *n as usize * rows(routes.of(i).unwrap())).sum();
            let got = all as f64 / (tokens.iter().sum::<u64>() as usize * layers) as f64;
            assert!((got - mean_k).abs() < 1e-3, "{mean_k} over {layers} layers came to {got}");
        }
    }

    #[test]
    fn experts_are_spread_over_the_depth() {
        assert_eq!(spread(6, 4), [1, 2, 1, 2]);
        assert_eq!(spread(5, 4), [1, 1, 1, 2]);
        assert_eq!(spread(8, 4), [2, 2, 2, 2]);
    }

    #[test]
    fn a_control_keeps_the_rule_of_weights() {
        let routes = static_mix(1.5, &moe(4), &[("weights".into(), "keep".into())], &[10]);
        assert_eq!(routes.of(0).unwrap().to_string(), "layers:1,2,1,2,weights=keep");
    }
}
