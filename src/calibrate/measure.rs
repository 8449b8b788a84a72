//! What policies lose, measured through the engine: the pass that is measured is the one that is served.

use super::CalibrateError;
use super::state::State;
use crate::engine::Engine;
use crate::eval::stats::Window;
use crate::eval::{How, InProcess, Lm, LmError, Reads, Routed, kl_divergence};
use crate::moe::calibration::{Calibration, HeldOut, LayerStatistics, PolicyTable, Rung};
use crate::moe::router::Rule;
use crate::types::{RouterSpec, SpecError, TokenId, hex};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A policy that is measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Arm {
    /// One per MoE layer.
    pub rules: Vec<Rule>,
    pub lsq: bool,
}

impl Arm {
    /// What it is known by: equal policies by equal names, others by others.
    fn name(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_else(|_| format!("{self:?}"));
        format!("probe-{}", &hex(&Sha256::digest(text))[..24])
    }
}

/// What was counted over windows.
pub(super) struct Scores {
    pub windows: Vec<Window>,
    pub routed: Routed,
    /// Bytes of experts that were read.
    pub reads: Reads,
}

/// An engine that measures.
pub(super) struct Bench {
    pub engine: Arc<Engine>,
    pub lm: InProcess,
    /// The statistics that policies stand on.
    pub base: Calibration,
    /// Windows that run at the same time.
    pub workers: usize,
}

impl Bench {
    /// Makes `arm` known to the engine, as if it had been read from a file.
    pub(super) fn spec(&self, arm: &Arm) -> Result<RouterSpec, CalibrateError> {
        let name = arm.name();
        // A policy reads norms and scales alone.
        let slim = |layer: &LayerStatistics| LayerStatistics { quantiles: BTreeMap::new(), ..layer.clone() };
        let rung = Rung { cost: 1.0, mean_k: 0.0, rules: arm.rules.clone() };
        let policy = PolicyTable {
            scope: "experts".into(),
            target: 1.0,
            batch: None,
            lsq: arm.lsq,
            rungs: vec![rung],
            held_out: HeldOut::default(),
        };
        let layers = self.base.layers.iter().map(slim).collect();
        let calibration = Calibration { layers, policy: Some(policy), ..self.base.clone() };
        let spec: RouterSpec = format!("policy:{name}").parse()?;
        let Some(files) = self.engine.files() else {
            return Err(SpecError { spec: spec.to_string(), problem: "this engine takes no files".into() }.into());
        };
        files.insert(&name, calibration);
        Ok(spec)
    }

    /// KL(native ‖ arm) of the next token's distribution, nats per token, `[arms][windows]`. What `state` knows is not
    /// measured again.
    pub(super) fn kl(
        &self,
        arms: &[Arm],
        windows: &[Vec<TokenId>],
        state: Option<&Mutex<State>>,
        what: &str,
    ) -> Result<Vec<Vec<f64>>, CalibrateError> {
        let names: Vec<String> = arms.iter().map(Arm::name).collect();
        let specs = arms.iter().map(|arm| self.spec(arm)).collect::<Result<Vec<_>, _>>()?;
        let known = |arm: usize, window: usize| state.and_then(|state| lock(state).get(&names[arm], window));
        let found: Vec<Vec<Option<f64>>> =
            (0..arms.len()).map(|arm| (0..windows.len()).map(|window| known(arm, window)).collect()).collect();
        let bar = bar(arms.len() * windows.len(), what);
        bar.set_position(found.iter().flatten().flatten().count() as u64);
        bar.reset_eta();
        let found = Mutex::new(found);
        self.each(windows.len(), |window| {
            let open: Vec<usize> = (0..arms.len()).filter(|arm| lock(&found)[*arm][window].is_none()).collect();
            if open.is_empty() {
                return Ok(());
            }
            let native = self.distributions(&windows[window], &RouterSpec::native())?;
            for arm in open {
                let own = self.distributions(&windows[window], &specs[arm])?;
                let nats: f64 = native.iter().zip(&own).map(|(p, q)| kl_divergence(p, q)).sum();
                let kl = nats / native.len() as f64;
                lock(&found)[arm][window] = Some(kl);
                if let Some(state) = state {
                    lock(state).put(&names[arm], window, kl)?;
                }
                bar.inc(1);
            }
            Ok(())
        })?;
        bar.finish_and_clear();
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(found.into_iter().map(|kl_w| kl_w.into_iter().flatten().collect()).collect())
    }

    /// Scores windows one after the other, each in steps of its own, so that what steps read does not hang on timing.
    pub(super) fn scores(&self, windows: &[Vec<TokenId>], routers: &[RouterSpec]) -> Result<Scores, CalibrateError> {
        let before = self.reads()?;
        let mut scores = Scores { windows: Vec::new(), routed: Routed::default(), reads: Reads::default() };
        for (window, router) in windows.iter().zip(routers) {
            let scored = self.lm.score(window, &How { router: Some(router), shared: 0 })?;
            let nats = -scored.logprobs.iter().sum::<f64>();
            let bytes = self.lm.text_bytes(&window[1..]) as u64;
            scores.windows.push(Window { nats, tokens: scored.logprobs.len() as u64, bytes });
            scored.routed.iter().for_each(|routed| scores.routed.add(routed));
        }
        let after = self.reads()?;
        scores.reads = Reads { ran: after.ran - before.ran, native: after.native - before.native };
        Ok(scores)
    }

    fn reads(&self) -> Result<Reads, CalibrateError> {
        let reads = self.lm.expert_reads()?;
        Ok(reads.ok_or_else(|| LmError("the engine does not tell what it reads".into()))?)
    }

    fn distributions(&self, window: &[TokenId], router: &RouterSpec) -> Result<Vec<Vec<f32>>, CalibrateError> {
        let told = self.lm.distributions(window, 1, router)?;
        Ok(told.ok_or_else(|| LmError("the engine tells no distributions".into()))?)
    }

    /// Does `work` for 0..n by many workers; the first failure ends it.
    fn each(&self, n: usize, work: impl Fn(usize) -> Result<(), CalibrateError> + Sync) -> Result<(), CalibrateError> {
        let (next, failed, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        std::thread::scope(|scope| {
            for _ in 0..self.workers.clamp(1, n.max(1)) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        if i >= n {
                            return;
                        }
                        if let Err(error) = work(i) {
                            failed.store(true, Ordering::Relaxed);
                            lock(&failure).get_or_insert(error);
                        }
                    }
                });
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bar over `total` things.
pub(super) fn bar(total: usize, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:28} {wide_bar} {pos}/{len} {per_sec} {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total as u64).with_style(style).with_message(what.to_string())
}
