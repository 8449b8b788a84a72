//! Runs questions through a model: many at a time, each answer logged as soon as it is there.

use super::lm::{How, Lm, LmError, Reads, Routed};
use super::log::{KlLine, Line, Log, LogError, Outcome, Said, Stretch};
use super::question::{Question, TokenAsk};
use super::stats::Window;
use super::suite::Task;
use super::task::Answer;
use crate::types::RouterSpec;
use indicatif::{ProgressBar, ProgressStyle};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Why a run ended early. What is in the log stays there: the same command goes on from it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{task}, row {row}: {problem}; what was answered is kept, and the same command goes on from there")]
    Lm { task: String, row: usize, problem: LmError },
    #[error(transparent)]
    Log(#[from] LogError),
}

/// What routes a task's samples.
#[derive(Clone, Debug, PartialEq)]
pub enum Routes {
    /// One router for all; the model's own without it.
    One(Option<RouterSpec>),
    /// Two static mixes between which samples alternate; the second one, where `takes_upper` says so.
    Mixed { lower: RouterSpec, upper: RouterSpec, takes_upper: Vec<bool> },
}

impl Routes {
    /// The router of the `i`th question of a task.
    pub fn of(&self, i: usize) -> Option<&RouterSpec> {
        match self {
            Self::One(router) => router.as_ref(),
            Self::Mixed { lower, upper, takes_upper } => Some(if takes_upper[i] { upper } else { lower }),
        }
    }
}

/// Tokens that prompts must share for one to go ahead: a block of the cache.
const LEAD_MIN: usize = 16;

/// Positions at the end of a window where distributions are compared: each takes the size of the vocabulary in memory,
/// for as many windows as there are workers.
const KL_POSITIONS: usize = 16;

/// Runs things on a model, and logs what comes of them.
pub struct Runner<'a> {
    pub lm: &'a dyn Lm,
    pub log: Mutex<Log>,
    /// Questions that are asked at the same time.
    pub workers: usize,
}

impl Runner<'_> {
    pub fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the questions of `task` that `arm` has not answered yet.
    ///
    /// # Errors
    /// The first failure of the model or the log, which ends the run.
    pub fn run(&self, task: &Task, arm: &str, routes: &Routes) -> Result<(), RunError> {
        let key = |q: &Question| task.key(arm, q);
        let (open, stretch) = {
            let log = self.log();
            let outcome = |i: usize| log.outcomes.get(&key(&task.questions[i]));
            let open: Vec<usize> = (0..task.questions.len()).filter(|i| outcome(*i).is_none()).collect();
            let stretches = (0..task.questions.len()).filter_map(outcome).map(|o| o.stretch + 1);
            (open, stretches.max().unwrap_or(0))
        };
        if open.is_empty() {
            return Ok(());
        }
        let before = self.reads(task)?;
        let started = Instant::now();
        let bar = bar(task.questions.len(), open.len(), format!("{} · {arm}", task.name));
        let order = order(&open, &task.questions, routes);
        self.each(task, &order, |i| {
            let question = &task.questions[i];
            let router = routes.of(i);
            let how = How { router, shared: question.shared };
            let (said, routed) = self.ask(&question.ask, &how)?;
            let judged = task.judge(question, &answer(&said));
            let router = router.map(RouterSpec::to_string);
            let seconds = started.elapsed().as_secs_f64();
            bar.inc(1);
            Ok(vec![Line::Outcome(Outcome { key: key(question), router, said, judged, routed, stretch, seconds })])
        })?;
        bar.finish_and_clear();
        if let Some((now, then)) = self.reads(task)?.zip(before) {
            let reads = Reads { ran: now.ran - then.ran, native: now.native - then.native };
            let (arm, task) = (arm.into(), task.name.clone());
            self.log().write(Line::Stretch(Stretch { arm, task, samples: open.len(), reads }))?;
        }
        Ok(())
    }

    fn reads(&self, task: &Task) -> Result<Option<Reads>, RunError> {
        self.lm.expert_reads().map_err(|problem| RunError::Lm { task: task.name.clone(), row: 0, problem })
    }

    fn ask(&self, ask: &TokenAsk, how: &How<'_>) -> Result<(Said, Option<Routed>), LmError> {
        Ok(match ask {
            TokenAsk::Choose { context, continuations } => {
                let chosen = self.lm.choose(context, continuations, how)?;
                (Said::LogLikelihoods(chosen.log_likelihoods), chosen.routed)
            }
            TokenAsk::Generate { prompt, until, max_tokens } => {
                let generated = self.lm.generate(prompt, until, *max_tokens, how)?;
                (Said::Text(generated.text), generated.routed)
            }
            TokenAsk::Window { tokens, bytes } => {
                let scored = self.lm.score(tokens, how)?;
                let nats = -scored.logprobs.iter().sum::<f64>();
                let (tokens, bytes) = (scored.logprobs.len() as u64, *bytes as u64);
                (Said::Window(Window { nats, tokens, bytes }), scored.routed)
            }
        })
    }

    /// KL(native ‖ arm) of next-token distributions for every arm of `arms`, on up to `samples_max` samples spread over the
    /// task: after the prompt, and after each of the last tokens of a window. Nothing, where the model does not tell.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn compare(&self, task: &Task, arms: &[(String, Routes)], samples_max: usize) -> Result<(), RunError> {
        let key = |arm: &str, i: usize| task.key(arm, &task.questions[i]);
        let missing = |i: usize| {
            let log = self.log();
            arms.iter().filter(|(arm, _)| !log.kl.contains_key(&key(arm, i))).collect::<Vec<_>>()
        };
        let rows = kl_rows(task.questions.len(), samples_max);
        let open: Vec<(usize, Option<usize>)> =
            rows.iter().filter(|i| !missing(**i).is_empty()).map(|i| (*i, None)).collect();
        let bar = bar(rows.len(), open.len(), format!("{} · KL to native", task.name));
        let native = RouterSpec::native();
        self.each(task, &open, |i| {
            let ask = &task.questions[i].ask;
            let prompt = ask.prompt();
            let positions = if matches!(ask, TokenAsk::Window { .. }) { KL_POSITIONS } else { 1 };
            let from = (prompt.len() + 1).saturating_sub(positions).max(1);
            let Some(p) = self.lm.distributions(prompt, from, &native)? else { return Ok(Vec::new()) };
            let mut lines = Vec::new();
            for (arm, routes) in missing(i) {
                let q = self.lm.distributions(prompt, from, routes.of(i).unwrap_or(&native))?;
                let q = q.filter(|q| q.len() == p.len());
                let q = q.ok_or_else(|| LmError(format!("{arm} told fewer distributions than native routing")))?;
                let nats = p.iter().zip(&q).map(|(p, q)| kl_divergence(p, q)).sum();
                lines.push(Line::Kl(KlLine { key: key(arm, i), nats, positions: p.len() }));
            }
            bar.inc(1);
            Ok(lines)
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    /// Does `work` for every entry of `order`, by many workers at a time; an entry waits for the one it names.
    fn each(
        &self,
        task: &Task,
        order: &[(usize, Option<usize>)],
        work: impl Fn(usize) -> Result<Vec<Line>, LmError> + Sync,
    ) -> Result<(), RunError> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let done = (Mutex::new(vec![false; task.questions.len()]), Condvar::new());
        let failure = Mutex::new(None);
        let lock = |()| done.0.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = || {
            loop {
                let Some((i, after)) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { return Ok(()) };
                if let Some(after) = after {
                    let waits = |done: &mut Vec<bool>| !done[*after] && !failed.load(Ordering::Relaxed);
                    drop(done.1.wait_while(lock(()), waits).unwrap_or_else(PoisonError::into_inner));
                }
                if failed.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let row = task.questions[*i].row;
                // Others may wait for this one: a panic must not leave them waiting.
                let lines = catch_unwind(AssertUnwindSafe(|| work(*i)));
                let lines = lines.unwrap_or_else(|_| Err(LmError("a worker panicked: this is a bug".into())));
                let lines = lines.map_err(|problem| RunError::Lm { task: task.name.clone(), row, problem })?;
                for line in lines {
                    self.log().write(line)?;
                }
                lock(())[*i] = true;
                done.1.notify_all();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.workers.clamp(1, order.len().max(1)) {
                scope.spawn(|| {
                    if let Err(error) = turn() {
                        failed.store(true, Ordering::Relaxed);
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        // Under the lock, so that no one begins to wait in between.
                        drop(lock(()));
                        done.1.notify_all();
                    }
                });
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// What a judge looks at: the likeliest choice, the first of equals, or the text.
fn answer(said: &Said) -> Answer {
    match said {
        Said::LogLikelihoods(values) => {
            let better = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
            Answer::Choice((1..values.len()).fold(0, better))
        }
        Said::Text(text) => Answer::Text(text.clone()),
        Said::Window(_) => Answer::Text(String::new()),
    }
}

/// Rows of `n` on which distributions are compared: at most `samples_max`, evenly spread.
pub(super) fn kl_rows(n: usize, samples_max: usize) -> Vec<usize> {
    let count = samples_max.min(n);
    (0..count).map(|i| i * n / count).collect()
}

/// The order of asking. Where the prompts of a subtask begin alike for more than a block of the cache, the first one of
/// each router goes ahead, while the subtask before is still being asked; the others wait for it and then find the
/// prefix in the cache, which keeps routers apart.
fn order(open: &[usize], questions: &[Question], routes: &Routes) -> Vec<(usize, Option<usize>)> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &i in open {
        match groups.last_mut().filter(|g| questions[g[0]].subtask == questions[i].subtask) {
            Some(group) => group.push(i),
            None => groups.push(vec![i]),
        }
    }
    let leader = |group: &[usize], i: usize| group.iter().copied().find(|l| routes.of(*l) == routes.of(i));
    let leaders =
        |group: &[usize]| -> Vec<usize> { group.iter().copied().filter(|i| leader(group, *i) == Some(*i)).collect() };
    let mut order = Vec::with_capacity(open.len());
    order.extend(groups.first().into_iter().flat_map(|g| leaders(g)).map(|i| (i, None)));
    for (g, group) in groups.iter().enumerate() {
        order.extend(groups.get(g + 1).into_iter().flat_map(|g| leaders(g)).map(|i| (i, None)));
        let leading = leaders(group);
        for &i in group.iter().filter(|i| !leading.contains(i)) {
            order.push((i, leader(group, i).filter(|_| questions[i].shared >= LEAD_MIN)));
        }
    }
    order
}

/// Σ p (ln p − ln q) over the vocabulary, of log-probabilities.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let term = |(p, q): (&f32, &f32)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q));
    p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(term).sum()
}

/// A bar over `total` samples of which `open` are left.
fn bar(total: usize, open: usize, message: String) -> ProgressBar {
    let template = "{msg:40!} {wide_bar} {pos}/{len} {per_sec} {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total as u64).with_style(style).with_message(message);
    bar.set_position((total - open) as u64);
    bar.reset_eta();
    bar
}
