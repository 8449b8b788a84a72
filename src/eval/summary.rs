//! From logged outcomes to the result of one arm on one task.

use super::lm::{Reads, Routed};
use super::log::{Log, Outcome, Said};
use super::results::{Kl, Metric, RoutingFacts, Saved, SubtaskResult, TaskResult};
use super::run::kl_rows;
use super::stats::{self, Estimate, Part, Window};
use super::suite::Task;
use super::task::Subtask;

/// How intervals are made, and on how many samples of a task KL is taken.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    pub resamples: usize,
    pub seed: u64,
    pub kl_samples: usize,
}

/// The outcomes of `arm` on `task`, in the order of its questions; those that are not there are left out.
pub fn outcomes<'a>(log: &'a Log, task: &Task, arm: &str) -> Vec<&'a Outcome> {
    task.questions.iter().filter_map(|q| log.outcomes.get(&task.key(arm, q))).collect()
}

/// What routing did to all of `outcomes`; `None` where the model does not tell.
pub fn routed(outcomes: &[&Outcome]) -> Option<Routed> {
    let mut sum = Routed::default();
    for outcome in outcomes {
        sum.add(outcome.routed.as_ref()?);
    }
    (sum.tokens > 0).then_some(sum)
}

/// The windows of a perplexity task.
pub fn windows(outcomes: &[&Outcome]) -> Vec<Window> {
    let window = |o: &&Outcome| match o.said {
        Said::Window(window) => Some(window),
        _ => None,
    };
    outcomes.iter().filter_map(window).collect()
}

/// 1 for every sample that metric `m` finds right, 0 for every other.
pub fn correct(outcomes: &[&Outcome], m: usize) -> Vec<f64> {
    outcomes.iter().map(|o| f64::from(o.judged.get(m).is_some_and(|j| j.correct))).collect()
}

/// The result of `arm` on `task`.
pub fn task_result(log: &Log, task: &Task, arm: &str, bootstrap: Bootstrap) -> TaskResult {
    let all = outcomes(log, task, arm);
    let mut routers: Vec<String> = all.iter().filter_map(|o| o.router.clone()).collect();
    routers.sort();
    routers.dedup();
    let subtasks = parts(task, &all, bootstrap, |subtask| Some(subtask.name.clone()));
    let groups = parts(task, &all, bootstrap, |subtask| subtask.group.map(String::from));
    let headline = subtasks.iter().filter_map(|s| Some(s.metrics.first()?.value)).collect::<Vec<_>>();
    let single = task.subtasks.len() < 2;
    TaskResult {
        task: task.name.clone(),
        version: task.entry.map(|entry| entry.version.into()),
        routers,
        samples: all.len(),
        cut: task.cut(),
        metrics: metrics(task, &all, bootstrap),
        macro_average: stats::mean(&headline).filter(|_| !single),
        groups,
        subtasks: if single { Vec::new() } else { subtasks },
        routing: routed(&all).map(|r| routing(&r)),
        expert_bytes: expert_bytes(log, &all, &task.name, arm),
        kl: kl(log, task, arm, bootstrap),
        seconds: seconds(&all),
    }
}

/// Results of the parts that subtasks with the same `name` make up.
fn parts(
    task: &Task,
    all: &[&Outcome],
    bootstrap: Bootstrap,
    name: impl Fn(&Subtask) -> Option<String>,
) -> Vec<SubtaskResult> {
    let mut members: Vec<(String, Vec<&Subtask>)> = Vec::new();
    for subtask in &task.subtasks {
        match name(subtask).map(|name| (members.iter().position(|m| m.0 == name), name)) {
            Some((Some(known), _)) => members[known].1.push(subtask),
            Some((None, name)) => members.push((name, vec![subtask])),
            None => {}
        }
    }
    let part = |(name, subtasks): (String, Vec<&Subtask>)| {
        let within = |o: &&&Outcome| subtasks.iter().any(|s| s.name == o.key.subtask);
        let own: Vec<&Outcome> = all.iter().filter(within).copied().collect();
        SubtaskResult {
            group: subtasks[0].group.map(String::from).filter(|group| *group != name),
            name,
            samples: own.len(),
            metrics: metrics(task, &own, bootstrap),
            mean_k: routed(&own).map(|r| r.mean_k()),
        }
    };
    members.into_iter().map(part).collect()
}

fn metrics(task: &Task, outcomes: &[&Outcome], bootstrap: Bootstrap) -> Vec<Metric> {
    let Some(entry) = task.entry else { return text_metrics(outcomes, bootstrap) };
    let metric = |(m, name): (usize, &&str)| {
        let values = correct(outcomes, m);
        let Estimate { value, low, high } = stats::mean_interval(&values, bootstrap.resamples, bootstrap.seed)?;
        let stderr = stderr(task, outcomes, m);
        Some(Metric { name: (*name).into(), value, stderr, low, high, higher_is_better: true, share: true })
    };
    entry.metrics.iter().enumerate().filter_map(metric).collect()
}

/// lm-eval's: of one subtask the sample's, of a group the pooled one.
fn stderr(task: &Task, outcomes: &[&Outcome], m: usize) -> Option<f64> {
    let part = |subtask: &Subtask| {
        let own: Vec<&Outcome> = outcomes.iter().filter(|o| o.key.subtask == subtask.name).copied().collect();
        let values = correct(&own, m);
        (!values.is_empty()).then(|| Part { samples: values.len(), stderr: stats::mean_stderr(&values) })
    };
    let parts: Vec<Part> = task.subtasks.iter().filter_map(part).collect();
    match parts.as_slice() {
        [one] => one.stderr,
        parts => stats::pooled_stderr(parts),
    }
}

fn text_metrics(outcomes: &[&Outcome], bootstrap: Bootstrap) -> Vec<Metric> {
    let windows = windows(outcomes);
    let (resamples, seed) = (bootstrap.resamples, bootstrap.seed);
    let of = |name: &str, estimate: Option<Estimate>| {
        let Estimate { value, low, high } = estimate?;
        Some(Metric { name: name.into(), value, stderr: None, low, high, higher_is_better: false, share: false })
    };
    let perplexity = of("perplexity", stats::perplexity(&windows, resamples, seed));
    let bits = of("bits_per_byte", stats::bits_per_byte(&windows, resamples, seed));
    perplexity.into_iter().chain(bits).collect()
}

fn routing(routed: &Routed) -> RoutingFacts {
    let per_token = |rows: &u64| *rows as f64 / routed.tokens as f64;
    RoutingFacts {
        tokens: routed.tokens,
        mean_k: routed.mean_k(),
        mean_k_l: routed.rows_l.iter().map(per_token).collect(),
        k_histogram: routed.k_histogram.clone(),
        expert_flops: Saved::of(routed.expert_flops),
        forward_flops: Saved::of(routed.forward_flops),
    }
}

/// None where some answers came without: work that was stopped has not told its reads.
fn expert_bytes(log: &Log, outcomes: &[&Outcome], task: &str, arm: &str) -> Option<Saved> {
    let own: Vec<_> = log.stretches.iter().filter(|s| s.task == task && s.arm == arm).collect();
    let complete = own.iter().map(|s| s.samples).sum::<usize>() == outcomes.len() && !own.is_empty();
    let sum = |of: fn(&Reads) -> f64| own.iter().map(|s| of(&s.reads)).sum::<f64>() as u64;
    complete.then(|| Saved::of([sum(|r| r.ran), sum(|r| r.native)]))
}

/// The time of the last answer of every stretch of work.
fn seconds(outcomes: &[&Outcome]) -> f64 {
    let stretches = outcomes.iter().map(|o| o.stretch + 1).max().unwrap_or(0);
    let last = |n: usize| outcomes.iter().filter(|o| o.stretch == n).map(|o| o.seconds).fold(0.0, f64::max);
    (0..stretches).map(last).sum()
}

fn kl(log: &Log, task: &Task, arm: &str, bootstrap: Bootstrap) -> Option<Kl> {
    let rows = kl_rows(task.questions.len(), bootstrap.kl_samples);
    let lines = rows.into_iter().filter_map(|i| log.kl.get(&task.key(arm, &task.questions[i])));
    let sums: Vec<[f64; 2]> = lines.map(|l| [l.nats, l.positions as f64]).collect();
    let estimate = stats::bootstrap(&sums, bootstrap.resamples, bootstrap.seed, |mean| mean[0] / mean[1])?;
    let positions = sums.iter().map(|l| l[1] as u64).sum();
    Some(Kl { mean: estimate.value, low: estimate.low, high: estimate.high, positions })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::log::{Key, Line, Stretch};

    fn answered(row: usize, stretch: usize, seconds: f64) -> Outcome {
        let key = Key { arm: "a".into(), task: "t".into(), subtask: "s".into(), row };
        let said = Said::Text(String::new());
        Outcome { key, router: None, said, judged: Vec::new(), routed: None, stretch, seconds }
    }

    #[test]
    fn the_time_of_work_that_was_stopped_is_the_sum_of_its_stretches() {
        let outcomes = [answered(0, 0, 3.0), answered(1, 0, 5.0), answered(2, 1, 20.0), answered(3, 1, 50.0)];
        assert_eq!(seconds(&outcomes.iter().collect::<Vec<_>>()), 55.0);
        assert_eq!(seconds(&[]), 0.0);
    }

    #[test]
    fn expert_bytes_are_told_only_where_all_answers_are_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(&dir.path().join("log"), &Default::default()).unwrap();
        let outcomes = [answered(0, 0, 1.0), answered(1, 0, 1.0), answered(2, 1, 1.0)];
        let outcomes: Vec<&Outcome> = outcomes.iter().collect();
        let mut stretch = |samples| {
            let reads = Reads { ran: 30.0, native: 40.0 };
            let stretch = Stretch { arm: "a".into(), task: "t".into(), samples, reads };
            log.write(Line::Stretch(stretch)).unwrap();
            expert_bytes(&log, &outcomes, "t", "a")
        };
        assert_eq!(stretch(1), None, "a first stretch was stopped before it told");
        assert_eq!(stretch(2), Some(Saved::of([60, 80])));
    }
}
