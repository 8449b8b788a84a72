//! The loop: data → forward → losses → backward → clip → AdamW → schedule → evaluation → checkpoint → sample.

use super::analysis::{RoutingCounts, Rows, perplexity_interval, token_classes, utilisation_std};
use super::data::{Batch, Cursor, Dataset, NOT_SCORED, Prepared};
use super::export::{ExportError, Texts, export};
use super::lm::{BuildError, Forward, Mode, MoeLm};
use super::optim::{AdamW, Gradients, learning_rate};
use super::recipe::{LossSpec, PrecisionChoice, Recipe};
use super::report::{EvalLog, Log, LogLine, RoutingAnalysis, RunResults, SCHEMA, Sample, StepLog};
use super::state::{Progress, StateDir, StateError};
use crate::ops::grad::{self, Precision};
use crate::ops::on_pool;
use crate::types::split_mix;
use candle_core::{DType, Device, Tensor};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a run is.
pub struct Job<'a> {
    pub recipe: &'a Recipe,
    pub variant: Option<String>,
    pub data: &'a Prepared,
    /// Folder of the run: log.jsonl, state/, model/, results.json, report.html.
    pub out: PathBuf,
    pub device: Device,
    /// What the device is, for the results: `cpu (AVX-512, 2 threads)`.
    pub runs_on: String,
    /// Goes on from the state in `out`.
    pub resume: bool,
}

/// Who watches a run: the program's progress bar, or a test.
pub trait Watch {
    fn step(&mut self, _log: &StepLog) {}
    fn evaluated(&mut self, _log: &EvalLog) {}
    /// What the model, just written to `dir`, says to the recipe's prompts.
    fn sample(&mut self, _dir: &Path) -> Vec<Sample> {
        Vec::new()
    }
    /// Whether the run is to save and end after this step.
    fn stop(&self) -> bool {
        false
    }
}

/// Why a run ended before its end. The last state that was written is kept.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(
        "step {step}: the loss is {loss}, and the first tensor that is not finite is `{tensor}`; the state of the last \
         checkpoint is kept. A lower optim.lr or more optim.warmup_steps help"
    )]
    Loss { step: u64, loss: f64, tensor: String },
    #[error(
        "step {step}: the gradient of `{tensor}` is not finite; the state of the last checkpoint is kept. A lower \
         optim.lr or optim.clip helps"
    )]
    Gradient { step: u64, tensor: String },
    #[error("{out} holds a run of another recipe; give another --out, or --overwrite to begin anew")]
    OtherRecipe { out: PathBuf },
    #[error("{out} holds a run; give --resume to go on, --overwrite to begin anew, or another --out")]
    Exists { out: PathBuf },
    #[error("optim.seq = {seq}, but the held-out data has not one window of that many tokens")]
    NoHeldOut { seq: usize },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

/// How a run ended.
pub enum Outcome {
    Finished(Box<RunResults>),
    /// Stopped after this step, with its state written.
    Stopped(u64),
}

/// What factors of products are rounded to on `device`.
pub fn precision(choice: PrecisionChoice, device: &Device) -> Precision {
    match choice {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::Bf16 => Precision::Bf16,
        PrecisionChoice::Auto if grad::bf16_is_faster(device) => Precision::Bf16,
        PrecisionChoice::Auto => Precision::F32,
    }
}

/// Trains until the recipe's last step, or until `watch` says stop.
///
/// # Errors
/// See [`TrainError`].
pub fn train(job: &Job<'_>, watch: &mut dyn Watch) -> Result<Outcome, TrainError> {
    let Job { recipe, data, .. } = job;
    let optim = &recipe.optim;
    let precision = precision(optim.precision, &job.device);
    let model = MoeLm::new(&recipe.model, data.vocab, recipe.seed, precision, &job.device)?;
    let mut adam = AdamW::new(model.params())?;
    let dirs = StateDir::new(&job.out);
    let mut now = begin(job, &dirs, &model, &mut adam)?;
    let mut log = open_log(&job.out, now.step)?;

    while now.step < optim.steps {
        let started = Instant::now();
        let Stepped { sums, lr, norm, clipped } = on_pool(|| step(job, &model, &mut adam, &mut now))?;
        let seconds = started.elapsed().as_secs_f64();
        now.seconds += seconds;
        let entry = sums.log(&now, lr, norm, clipped, seconds);
        watch.step(&entry);
        write_line(&mut log, &LogLine::Step(entry), &job.out)?;

        let last = now.step == optim.steps;
        let due = last || now.step.is_multiple_of(recipe.eval.every);
        if due {
            let windows = if last { recipe.eval.windows_last } else { Some(recipe.eval.windows) };
            let eval = evaluate(&model, &data.valid, now.step, (optim.batch, optim.seq), windows, &mut |_, _| {})?;
            check_finite(&model, now.step, eval.loss)?;
            watch.evaluated(&eval);
            write_line(&mut log, &LogLine::Eval(eval.clone()), &job.out)?;
            now.evals.push(eval);
        }
        let stop = !last && watch.stop();
        if due || stop {
            checkpoint(job, &dirs, &model, &adam, &now)?;
        }
        if stop {
            return Ok(Outcome::Stopped(now.step));
        }
    }
    let samples = watch.sample(&job.out.join("model"));
    finish(job, &model, now, samples, precision).map(|results| Outcome::Finished(Box::new(results)))
}

/// What a step of the optimiser was.
struct Stepped {
    sums: StepSums,
    lr: f64,
    /// Of all gradients together, before they were clipped.
    norm: f64,
    clipped: bool,
}

/// One step of the optimiser.
fn step(job: &Job<'_>, model: &MoeLm, adam: &mut AdamW, now: &mut Progress) -> Result<Stepped, TrainError> {
    let Job { recipe, data, .. } = job;
    let optim = &recipe.optim;
    let mut sums = StepSums::default();
    let mut grads = Gradients::default();
    for micro in 0..optim.accumulate {
        let batch = data.train.batch(&mut now.cursor, recipe.seed, optim.batch, optim.seq);
        let dropout_seed = split_mix(recipe.seed, now.step * optim.accumulate as u64 + micro as u64);
        let forward = model.forward(&batch.inputs, batch.batch, Mode::Train { dropout_seed })?;
        let share = 1.0 / optim.accumulate as f64;
        let loss = losses(model, &forward, &batch, &recipe.loss, share, &mut sums)?;
        grads.add(model.params(), &loss.backward()?)?;
        now.tokens += batch.inputs.len() as u64;
    }
    check_finite(model, now.step + 1, sums.total)?;
    let norm = grads.norm(model.params())?;
    let norm = norm.map_err(|e| TrainError::Gradient { step: now.step + 1, tensor: e.name })?;
    let scale = (optim.clip / norm.max(1e-12)).min(1.0);
    let lr = learning_rate(optim, now.step);
    adam.step(model.params(), &grads, optim, lr, scale)?;
    now.step += 1;
    Ok(Stepped { sums, lr, norm, clipped: scale < 1.0 })
}

/// Refuses a loss that is no number, with the first parameter that is none: such a state must not be written.
fn check_finite(model: &MoeLm, step: u64, loss: f64) -> Result<(), TrainError> {
    if loss.is_finite() {
        return Ok(());
    }
    for p in model.params() {
        if !grad::sum_of_squares(p.var.as_tensor())?.is_finite() {
            return Err(TrainError::Loss { step, loss, tensor: p.name.clone() });
        }
    }
    Err(TrainError::Loss { step, loss, tensor: "the logits".into() })
}

/// Where the run stands: at its beginning, or where the state in its folder says.
fn begin(job: &Job<'_>, dirs: &StateDir, model: &MoeLm, adam: &mut AdamW) -> Result<Progress, TrainError> {
    if job.data.valid.scored(job.recipe.optim.seq) == 0 {
        return Err(TrainError::NoHeldOut { seq: job.recipe.optim.seq });
    }
    let recipe = job.recipe.to_toml();
    let out = || job.out.clone();
    match dirs.progress()? {
        Some(_) if !job.resume => Err(TrainError::Exists { out: out() }),
        Some(found) if found.recipe != recipe => Err(TrainError::OtherRecipe { out: out() }),
        Some(found) => {
            dirs.restore(model, adam, found.step)?;
            Ok(found)
        }
        None => {
            std::fs::create_dir_all(&job.out).map_err(|source| TrainError::Io { path: out(), source })?;
            Ok(Progress {
                recipe,
                step: 0,
                tokens: 0,
                seconds: 0.0,
                cursor: Cursor::default(),
                started: jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
                evals: Vec::new(),
            })
        }
    }
}

/// Sums over the micro-batches of a step; losses are already shares of their mean.
#[derive(Default)]
struct StepSums {
    loss: f64,
    total: f64,
    balance: f64,
    z_loss: f64,
    entropy: f64,
    rows: u64,
    rows_dropped: u64,
    visits: u64,
    tokens: u64,
    experts: usize,
    entropy_l: Vec<f64>,
    expert_rows: Vec<u64>,
}

/// Cross-entropy plus weighted auxiliary losses, times `share`; what is logged goes to `sums`.
fn losses(
    model: &MoeLm,
    forward: &Forward,
    batch: &Batch,
    weights: &LossSpec,
    share: f64,
    sums: &mut StepSums,
) -> candle_core::Result<Tensor> {
    let scored = batch.targets.iter().filter(|t| **t != NOT_SCORED).count().max(1);
    let scale = share / scored as f64;
    let cross_entropy = grad::cross_entropy(&forward.hidden, model.head(), &batch.targets, scale, model.precision)?;
    let scalar = |t: &Tensor| Ok::<_, candle_core::Error>(f64::from(t.to_dtype(DType::F32)?.to_scalar::<f32>()?));
    sums.loss += scalar(&cross_entropy)?;
    let mut total = cross_entropy;
    let mixtures = forward.aux_l.len().max(1) as f64;
    for aux in &forward.aux_l {
        let parts = [
            (&aux.balance, weights.balance, &mut sums.balance),
            (&aux.z_loss, weights.z_loss, &mut sums.z_loss),
            // The floor is log E − H: its constant has no gradient.
            (&aux.entropy, weights.dynk_entropy - weights.entropy_floor, &mut sums.entropy),
        ];
        for (loss, weight, sum) in parts {
            *sum += scalar(loss)? * share / mixtures;
            if weight != 0.0 {
                total = (total + (loss * (weight * share / mixtures))?)?;
            }
        }
    }
    sums.total += scalar(&total)? + weights.entropy_floor * share * (model.moe_shape().experts as f64).ln();
    sums.count(model, forward, batch.inputs.len() as u64, share);
    Ok(total)
}

impl StepSums {
    fn count(&mut self, model: &MoeLm, forward: &Forward, tokens: u64, share: f64) {
        self.experts = model.moe_shape().experts;
        self.tokens += tokens;
        self.visits += tokens * forward.routing_l.len() as u64;
        self.rows += forward.routing_l.iter().map(|r| r.rows() as u64).sum::<u64>();
        self.rows_dropped += forward.rows_dropped as u64;
        add(&mut self.entropy_l, forward.trace.entropy_l.iter().map(|h| h * share));
        add(&mut self.expert_rows, forward.trace.expert_tokens.iter().copied());
    }

    fn utilisation_std_l(&self) -> Vec<f64> {
        self.expert_rows.chunks(self.experts.max(1)).map(utilisation_std).collect()
    }

    fn log(&self, now: &Progress, lr: f64, grad_norm: f64, clipped: bool, seconds: f64) -> StepLog {
        let moe = (self.visits > 0).then_some(());
        StepLog {
            step: now.step,
            tokens: now.tokens,
            seconds: now.seconds,
            lr,
            loss: self.loss,
            perplexity: self.loss.exp(),
            balance: moe.map(|()| self.balance),
            z_loss: moe.map(|()| self.z_loss),
            entropy_floor: moe.map(|()| (self.experts as f64).ln() - self.entropy),
            dynk_entropy: moe.map(|()| self.entropy),
            total: self.total,
            grad_norm,
            clipped,
            tokens_per_second: self.tokens as f64 / seconds.max(1e-9),
            experts_per_token: self.rows as f64 / self.visits.max(1) as f64,
            dropped_share: self.rows_dropped as f64 / self.rows.max(1) as f64,
            entropy_l: self.entropy_l.clone(),
            utilisation_std_l: self.utilisation_std_l(),
        }
    }
}

fn add<T: Copy + std::ops::AddAssign>(sums: &mut Vec<T>, values: impl Iterator<Item = T>) {
    for (i, value) in values.enumerate() {
        match sums.get_mut(i) {
            Some(sum) => *sum += value,
            None => sums.push(value),
        }
    }
}

/// Scores held-out windows: the first `windows`, or all. `each` is shown every batch with its forward pass.
///
/// # Errors
/// A failure of the device.
pub fn evaluate(
    model: &MoeLm,
    data: &Dataset,
    step: u64,
    (batch, seq): (usize, usize),
    windows: Option<usize>,
    each: &mut dyn FnMut(&Batch, &Forward),
) -> candle_core::Result<EvalLog> {
    let total = data.windows(seq).min(windows.unwrap_or(usize::MAX) as u64) as usize;
    let (mut loss, mut scored, mut top1, mut top3) = (0.0, 0u64, 0u64, 0u64);
    let mut sums = StepSums::default();
    let mut left = total;
    for mut part in data.in_order(batch, seq) {
        part.truncate(left);
        if part.batch == 0 {
            break;
        }
        left -= part.batch;
        let forward = model.forward(&part.inputs, part.batch, Mode::Eval)?;
        for (score, target) in
            grad::scores(&forward.hidden, model.head(), &part.targets, model.precision)?.iter().zip(&part.targets)
        {
            if *target != NOT_SCORED {
                loss += f64::from(score.nll);
                scored += 1;
                top1 += u64::from(score.rank < 1);
                top3 += u64::from(score.rank < 3);
            }
        }
        sums.count(model, &forward, part.inputs.len() as u64, part.batch as f64 / total as f64);
        each(&part, &forward);
    }
    let mean = loss / scored.max(1) as f64;
    let share = |n: u64| n as f64 / scored.max(1) as f64;
    Ok(EvalLog {
        step,
        tokens_scored: scored,
        loss: mean,
        perplexity: mean.exp(),
        top1: share(top1),
        top3: share(top3),
        experts_per_token: sums.rows as f64 / sums.visits.max(1) as f64,
        utilisation_std_l: sums.utilisation_std_l(),
        entropy_l: sums.entropy_l,
    })
}

/// Writes the model in Hugging Face layout, then the state.
fn checkpoint(job: &Job<'_>, dirs: &StateDir, model: &MoeLm, adam: &AdamW, now: &Progress) -> Result<(), TrainError> {
    let data = job.data;
    let texts = Texts { tokenizer: &data.tokenizer_json, bos: Some(data.bos), eos: Some(data.eos) };
    export(model, &texts, DType::BF16, &job.out.join("model"))?;
    dirs.write(model, adam, now)?;
    Ok(())
}

/// Which experts compute which tokens of held-out text; none of a dense model.
fn analyse(job: &Job<'_>, model: &MoeLm, step: u64) -> Result<Option<RoutingAnalysis>, TrainError> {
    let Job { recipe, data, .. } = job;
    let mut counts = RoutingCounts::new(&recipe.model.moe_layers(), model.moe_shape().experts);
    let texts: Vec<String> =
        (0..data.vocab as u32).map(|id| data.tokenizer.decode(&[id], true).unwrap_or_default()).collect();
    let shape = (recipe.optim.batch, recipe.optim.seq);
    let mut result = Ok(());
    evaluate(model, &data.valid, step, shape, Some(recipe.eval.windows), &mut |batch, forward| {
        let windows = batch.inputs.chunks(batch.seq);
        let classes = windows.flat_map(|w| token_classes(w.iter().map(|id| texts[*id as usize].as_str())));
        let scored = batch.targets.iter().map(|t| *t != NOT_SCORED);
        let class_t: Vec<_> = classes.zip(scored).map(|(class, scored)| scored.then_some(class)).collect();
        for (i, (routing, entropy)) in forward.routing_l.iter().zip(&forward.trace.entropy_l).enumerate() {
            let rows = Rows { token_r: routing.token_r(), offsets_e1: routing.offsets_e1() };
            if let Err(e) = counts.add(i, rows, &class_t, *entropy) {
                result = Err(candle_core::Error::wrap(e));
            }
        }
    })?;
    result?;
    Ok(counts.finish())
}

fn finish(
    job: &Job<'_>,
    model: &MoeLm,
    now: Progress,
    samples: Vec<Sample>,
    precision: Precision,
) -> Result<RunResults, TrainError> {
    let Job { recipe, data, .. } = job;
    let experts_per_token = now.evals.last().map_or(0.0, |e| e.experts_per_token);
    let (parameters, parameters_active) = model.parameters(experts_per_token);
    let perplexities: Vec<f64> = now.evals.iter().map(|e| e.perplexity).collect();
    Ok(RunResults {
        schema: SCHEMA,
        name: recipe.name.clone(),
        variant: job.variant.clone(),
        recipe: now.recipe,
        seed: recipe.seed,
        device: job.runs_on.clone(),
        precision: format!("{precision:?}").to_lowercase(),
        version: env!("CARGO_PKG_VERSION").into(),
        started: now.started,
        train_seconds: now.seconds,
        steps: now.step,
        tokens: now.tokens,
        parameters,
        parameters_active,
        peak_memory_bytes: peak_memory_bytes(),
        data: serde_json::to_value(&data.facts).unwrap_or_default(),
        final_eval: now.evals.last().cloned(),
        perplexity_interval: perplexity_interval(&perplexities, recipe.eval.interval_over),
        evals: now.evals,
        routing: analyse(job, model, now.step)?,
        samples,
    })
}

/// The most memory this process had resident, where the system tells.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// log.jsonl, with what came after `step` cut off: steps that will be taken again.
fn open_log(out: &Path, step: u64) -> Result<File, TrainError> {
    let path = out.join("log.jsonl");
    let fail = |source| TrainError::Io { path: path.clone(), source };
    let read = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        other => other.map_err(fail)?,
    };
    let is_kept = |line: &&str| match serde_json::from_str(line) {
        Ok(LogLine::Step(entry)) => entry.step <= step,
        Ok(LogLine::Eval(entry)) => entry.step <= step,
        Err(_) => false,
    };
    let kept: String = read.split_inclusive('\n').take_while(is_kept).collect();
    std::fs::write(&path, kept).map_err(fail)?;
    File::options().append(true).open(&path).map_err(fail)
}

fn write_line(log: &mut File, line: &LogLine, out: &Path) -> Result<(), TrainError> {
    let fail = |source| TrainError::Io { path: out.join("log.jsonl"), source };
    let text = serde_json::to_string(line).map_err(|e| fail(e.into()))?;
    writeln!(log, "{text}").map_err(fail)
}

/// The log of the run in `out`.
///
/// # Errors
/// A log that cannot be read.
pub fn read_log(out: &Path) -> Result<Log, TrainError> {
    let path = out.join("log.jsonl");
    let fail = |source| TrainError::Io { path: path.clone(), source };
    let text = std::fs::read_to_string(&path).map_err(fail)?;
    Log::parse(&text).map_err(|e| fail(std::io::Error::other(e)))
}
