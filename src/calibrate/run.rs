//! A calibration from the loaded model to the file.

use super::check::{Checked, Contest};
use super::correlation::Correlations;
use super::knapsack::{Item, Knapsack};
use super::measure::{Arm, Bench, bar};
use super::options::{Choice, Layer};
use super::state::{self, State};
use super::statistics::statistics;
use super::{Budget, CalibrateError, Scope, Settings, Source, Target, Trace, Windows};
use crate::engine::{EngineConfig, KvSize, Opened, RequestRouters};
use crate::eval::InProcess;
use crate::model::hash;
use crate::moe::calibration::{Calibration, FORMAT, PolicyTable, Provenance, Rung, VERSION};
use crate::moe::router::Rule;
use crate::types::{ModelShape, MoeShape, RouterSpec, TokenId, hex};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What a calibration came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub calibration: Calibration,
    pub correlations: Correlations,
    /// With a target.
    pub checked: Option<Checked>,
    /// The share that the policy in force costs on the calibration text, with its mean k and rules.
    pub rung: Option<Rung>,
}

/// Fewer tokens than this starved a published calibration.
const TOKENS_PLENTY: usize = 4096;
/// Windows that run at the same time hold distributions of at most this many bytes.
const DISTRIBUTION_BYTES: usize = 1 << 30;
const WORKERS_MAX: usize = 32;
/// Steps of the ladder of budgets.
const LADDER: f64 = 0.05;

/// Calibrates the model in `opened` on `sources` and writes the file `out`, with the state of a run that may be stopped
/// beside it.
///
/// # Errors
/// Settings, text or a model that cannot be calibrated, a target that cannot be attained, a failure of device or disk.
pub fn calibrate(
    opened: Opened,
    sources: &[Source],
    settings: &Settings,
    out: &Path,
) -> Result<Outcome, CalibrateError> {
    let shape = opened.loaded.model.shape().clone();
    refuse(&shape.moe)?;
    writable(out)?;
    let windows = Windows::draw(sources, &opened.text, opened.loaded.max_model_len, settings)?;
    if let Some(target) = settings.target.as_ref().filter(|target| target.scope != Scope::Bytes) {
        Budget::flops(&shape, target.scope, settings.window).check(target, shape.moe.layers as f64)?;
    }
    let tokens = windows.calibration.len() * settings.window;
    warn_of_little(&windows, settings);
    let passes = bar(windows.calibration.len(), "native routing");
    let trace = Trace::take(&opened.loaded.model, &windows.calibration, || passes.inc(1))?;
    passes.finish_and_clear();
    let correlations = Correlations::of(&trace, settings.seed);
    let mut calibration = Calibration {
        format: FORMAT.into(),
        version: VERSION,
        checkpoint: hash(&opened.files)?,
        experts: shape.moe.experts,
        top_k: shape.moe.top_k,
        made: Provenance {
            model: opened.name.clone(),
            program: env!("CARGO_PKG_VERSION").into(),
            text: windows.sha256.clone(),
            tokens,
            seed: settings.seed,
        },
        layers: statistics(&trace),
        policy: None,
    };
    let (mut checked, mut rung) = (None, None);
    if let Some(target) = &settings.target {
        let path = state::path(out);
        let state = State::open(&path, &key(&calibration, &opened, &windows))?;
        if state.len() > 0 {
            tracing::info!("going on with {} measurements in {}", state.len(), path.display());
        }
        let state = Mutex::new(state);
        let bench = bench(opened, &calibration, settings.window, windows.calibration.len())?;
        let job = Job { bench: &bench, trace: &trace, windows: &windows, state: &state, shape: &shape };
        let (table, found) = job.policy(target, settings)?;
        rung = Some(table.rung(target.share).clone());
        (calibration.policy, checked) = (Some(table), Some(found));
    }
    write(out, &calibration)?;
    Ok(Outcome { calibration, correlations, checked, rung })
}

/// Refuses models that there is nothing to calibrate of.
fn refuse(moe: &MoeShape) -> Result<(), CalibrateError> {
    let problem = if moe.layers == 0 {
        "--model must have mixtures; this one has none, so nothing is routed".into()
    } else if let Some(router) = &moe.router {
        format!(
            "--model must route statically; the native rule of this one is {router}, which takes as many experts as it \
             wants already"
        )
    } else if moe.top_k < 2 {
        format!("--model must take at least 2 experts per token; this one takes {}, and one is the least", moe.top_k)
    } else {
        return Ok(());
    };
    Err(CalibrateError::Asked(problem))
}

/// Says where there is less text than was asked for, or than is enough.
fn warn_of_little(windows: &Windows, settings: &Settings) {
    let tokens = windows.calibration.len() * settings.window;
    let held_out = windows.held_out.len() * settings.window;
    if tokens < settings.tokens || (settings.target.is_some() && held_out < settings.held_out_tokens) {
        tracing::warn!(
            "the text is too short for {} tokens to calibrate on and {} to check on: {tokens} and {held_out} are taken; \
             give more --data",
            settings.tokens,
            settings.held_out_tokens
        );
    }
    if tokens < TOKENS_PLENTY {
        tracing::warn!(
            "{tokens} tokens of text are little to calibrate on, {TOKENS_PLENTY} are a least: give more --data or --tokens"
        );
    }
}

/// Refuses a place that no file can be written to, before an hour is spent.
fn writable(out: &Path) -> Result<(), CalibrateError> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if out.is_dir() || out.file_name().is_none() || folder.is_some_and(|folder| !folder.is_dir()) {
        let problem = format!("--out must be a file in a folder that is there; got {}", out.display());
        return Err(CalibrateError::Asked(problem));
    }
    Ok(())
}

/// Hash of all that a measurement depends on but the policy.
fn key(calibration: &Calibration, opened: &Opened, windows: &Windows) -> String {
    let backend = opened.loaded.model.backend();
    // Without the number of threads, which changes nothing.
    let device = backend.describe();
    let device = device.split([' ', '(']).next().unwrap_or_default();
    let mut sha = Sha256::new();
    sha.update(format!("{} {device} {}\n", env!("CARGO_PKG_VERSION"), backend.describe_weights()));
    sha.update(&calibration.checkpoint);
    for window in &windows.calibration {
        sha.update(format!("{window:?}\n"));
    }
    hex(&sha.finalize())
}

/// Whole or not at all: a reader never finds half a file.
fn write(out: &Path, calibration: &Calibration) -> Result<(), CalibrateError> {
    let mut part = out.as_os_str().to_os_string();
    part.push(".part");
    let json = serde_json::to_string(calibration).map_err(std::io::Error::from);
    let written = json.and_then(|json| std::fs::write(&part, json + "\n"));
    written.and_then(|()| std::fs::rename(&part, out)).map_err(CalibrateError::file(out))
}

/// Starts the engine that `windows` windows of `window` tokens are measured on.
fn bench(opened: Opened, base: &Calibration, window: usize, windows: usize) -> Result<Bench, CalibrateError> {
    let shape: ModelShape = opened.loaded.model.shape().clone();
    // Of each window, native routing's distributions and one policy's, here and on their way.
    let each = 4 * window * shape.vocab * size_of::<f32>();
    let workers = (DISTRIBUTION_BYTES / each).clamp(1, WORKERS_MAX).min(windows);
    let config = EngineConfig {
        max_num_seqs: workers,
        max_queue: workers,
        kv_size: Some(KvSize::Blocks(workers * (window / 16 + 2))),
        // Nothing that is scored can come from a cache.
        prefix_cache: false,
        request_routers: Some(RequestRouters { names: Vec::new(), experts_max: Some(usize::MAX), files: true }),
        ..EngineConfig::default()
    };
    let launched = opened.start(&RouterSpec::native(), config)?;
    let engine = Arc::new(launched.engine);
    let lm = InProcess::new(engine.clone(), launched.text, &shape);
    Ok(Bench { engine, lm, base: base.clone(), workers })
}

/// All that a policy is made of.
struct Job<'a> {
    bench: &'a Bench,
    trace: &'a Trace,
    windows: &'a Windows,
    state: &'a Mutex<State>,
    shape: &'a ModelShape,
}

/// What every layer can do, and the best choices for all budgets.
struct Market {
    choices: Vec<Vec<Choice>>,
    knapsack: Knapsack,
}

impl Job<'_> {
    /// The policy for `target`: dynamic if that is what held-out text says.
    fn policy(&self, target: &Target, settings: &Settings) -> Result<(PolicyTable, Checked), CalibrateError> {
        let norms_l: Vec<&[f32]> = self.bench.base.layers.iter().map(|layer| &layer.expert_norms_e[..]).collect();
        let layers: Vec<Layer<'_>> =
            self.trace.layers.iter().zip(norms_l).map(|(layer, norms_e)| Layer::new(layer, norms_e)).collect();
        let (cheapest, budget) = self.budget(&layers, target, settings.window);
        budget.check(target, cheapest)?;
        let losses = self.losses(&layers)?;
        let choices: Vec<Vec<Choice>> =
            layers.iter().zip(&losses).map(|(layer, losses)| layer.choices(losses, target)).collect();
        let top_k = self.shape.moe.top_k;
        // Static choices come first.
        let fixed = Market::new(choices.iter().map(|layer| layer[..top_k].to_vec()).collect());
        let dynamic = Market::new(choices);
        let rung = |market: &Market| market.rung(&market.knapsack.solve(budget.cost(target.share)), &budget);
        let (best, best_fixed) = (rung(&dynamic), rung(&fixed));
        let [dynamic_lsq, static_lsq] = self.lsq([&best.rules, &best_fixed.rules])?;
        let statics: Vec<Rung> = fixed.knapsack.frontier().iter().map(|items| fixed.rung(items, &budget)).collect();
        let scope = target.scope;
        let contest = Contest { dynamic: &best, dynamic_lsq, statics: &statics, static_lsq, scope };
        let checked = Checked::run(self.bench, &contest, &self.windows.held_out, settings.seed)?;
        let (market, lsq) = if checked.dynamic_wins() { (&dynamic, dynamic_lsq) } else { (&fixed, static_lsq) };
        let table = PolicyTable {
            scope: scope.to_string(),
            target: target.share,
            batch: target.batch,
            lsq,
            rungs: market.ladder(&budget, target.share, top_k),
            held_out: checked.held_out(),
        };
        Ok((table, checked))
    }

    /// The cheapest cost there is, and what native routing costs.
    fn budget(&self, layers: &[Layer<'_>], target: &Target, window: usize) -> (f64, Budget) {
        let spans = layers.iter().map(|layer| layer.span(target));
        let (cheapest, native) = spans.fold((0.0, 0.0), |(low, high), span| (low + span.0, high + span.1));
        match target.scope {
            Scope::Bytes => (cheapest, Budget { native, other: 0.0 }),
            scope => (cheapest, Budget::flops(self.shape, scope, window)),
        }
    }

    /// KL of every rule of [`Layer::measured`] with all other layers native, per layer.
    fn losses(&self, layers: &[Layer<'_>]) -> Result<Vec<Vec<f64>>, CalibrateError> {
        let native = vec![Rule::Static { k: self.shape.moe.top_k }; layers.len()];
        let measured: Vec<Vec<Rule>> = layers.iter().map(Layer::measured).collect();
        let mut arms = Vec::new();
        for (l, rules) in measured.iter().enumerate() {
            for rule in rules {
                let mut all = native.clone();
                all[l] = *rule;
                arms.push(Arm { rules: all, lsq: false });
            }
        }
        let mut means = self.means(&arms, "options of each layer")?.into_iter();
        Ok(measured.iter().map(|rules| means.by_ref().take(rules.len()).collect()).collect())
    }

    /// Whether scaled outputs come closer to native routing on the calibration text, for each of two policies.
    fn lsq(&self, policies: [&Vec<Rule>; 2]) -> Result<[bool; 2], CalibrateError> {
        let arm = |rules: &Vec<Rule>, lsq: bool| Arm { rules: rules.clone(), lsq };
        let arms: Vec<Arm> = policies.iter().flat_map(|rules| [arm(rules, false), arm(rules, true)]).collect();
        let means = self.means(&arms, "scaled outputs")?;
        Ok([means[1] < means[0], means[3] < means[2]])
    }

    fn means(&self, arms: &[Arm], what: &str) -> Result<Vec<f64>, CalibrateError> {
        let windows: &[Vec<TokenId>] = &self.windows.calibration;
        let kl = self.bench.kl(arms, windows, Some(self.state), what)?;
        Ok(kl.iter().map(|kl_w| kl_w.iter().sum::<f64>() / kl_w.len() as f64).collect())
    }
}

impl Market {
    fn new(choices: Vec<Vec<Choice>>) -> Self {
        let items: Vec<Vec<Item>> = choices.iter().map(|layer| layer.iter().map(|c| c.item).collect()).collect();
        Self { choices, knapsack: Knapsack::new(&items) }
    }

    fn rung(&self, items: &[usize], budget: &Budget) -> Rung {
        let chosen: Vec<&Choice> = self.choices.iter().zip(items).map(|(layer, i)| &layer[*i]).collect();
        let cost = chosen.iter().map(|c| c.item.cost).sum();
        Rung {
            cost: budget.share(cost),
            mean_k: chosen.iter().map(|c| c.mean_k).sum::<f64>() / chosen.len() as f64,
            rules: chosen.iter().map(|c| c.rule).collect(),
        }
    }

    /// The best rungs for the least that is attainable, for every step of the ladder above it, for `target` and for native
    /// routing's cost, from the cheapest up.
    fn ladder(&self, budget: &Budget, target: f64, top_k: usize) -> Vec<Rung> {
        let least = self.rung(&self.knapsack.solve(0.0), budget);
        let steps = (1..).map(|i| f64::from(i) * LADDER).take_while(|share| *share < 1.0 - 1e-9);
        let shares = steps.chain([target]).filter(|share| *share > least.cost);
        let mut rungs: Vec<Rung> =
            shares.map(|share| self.rung(&self.knapsack.solve(budget.cost(share)), budget)).collect();
        rungs.push(least);
        // All of the most probable k0 in every layer: static choices come first.
        rungs.push(self.rung(&vec![top_k - 1; self.choices.len()], budget));
        rungs.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        rungs.dedup_by(|a, b| a.rules == b.rules);
        rungs
    }
}
