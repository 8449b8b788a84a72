//! moe-train: parse, build, run.

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, Found, Launched};
use moe_serve::model::LoadOptions;
use moe_serve::model::hub::HubOptions;
use moe_serve::ops::{Backend, use_threads};
use moe_serve::telemetry::{LogFormat, init};
use moe_serve::train::data::{DataSpec, Prepared, Progress as Reading, TokenizerSpec, prepare, synthetic};
use moe_serve::train::recipe::{Recipe, RecipeFile, SampleSpec};
use moe_serve::train::report::{
    EvalLog, RunResults, Sample, StepLog, compare_markdown, compare_terminal, html, summary,
};
use moe_serve::train::{Job, Outcome, Watch, read_log, train};
use moe_serve::types::{DeviceChoice, DtypeChoice, GenerateRequest, RouterSpec, SamplingParams, Threads};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Train a small Mixture-of-Experts language model from a recipe, and write it so that moe-serve serves it.
#[derive(Parser, Debug)]
#[command(name = "moe-train", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Set finished runs beside each other
    Compare(CompareArgs),
    /// Let a trained model continue a prompt
    Sample(SampleArgs),
}

#[derive(Args, Debug)]
struct TrainArgs {
    /// The recipe, TOML; the ones of this repository are models/*/recipe.toml
    #[arg(long, required = true, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Variant of the recipe; can be given several times
    #[arg(long, value_name = "NAME", conflicts_with = "all_variants")]
    variant: Vec<String>,
    /// Every variant of the recipe, one after the other
    #[arg(long)]
    all_variants: bool,
    /// Training text in the place of the recipe's: files or folders
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Held-out text in the place of the recipe's; with --data alone, a share of that is held out
    #[arg(long, value_name = "PATH", num_args = 1..)]
    valid: Vec<PathBuf>,
    /// Tokenizer (tokenizer.json) in the place of the recipe's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Train on generated text: for a first try without data
    #[arg(long, conflicts_with_all = ["data", "valid", "tokenizer"])]
    synthetic: bool,
    /// Steps, and the length of the learning rate's schedule, in the place of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Seed in the place of the recipe's
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Folder of the run; variants get folders in it. Without it, runs/NAME
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Threads that compute; without it, RAYON_NUM_THREADS or one per core
    #[arg(long, value_name = "N")]
    threads: Option<Threads>,
    /// Go on where the run in the folder stopped
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Begin anew where the folder has a run
    #[arg(long)]
    overwrite: bool,
}

#[derive(Args, Debug)]
struct CompareArgs {
    /// Folders of finished runs, or folders of such folders
    #[arg(required = true, value_name = "DIR")]
    runs: Vec<PathBuf>,
    /// Also write the table as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct SampleArgs {
    /// A checkpoint: the folder model/ of a run, or any model that moe-serve takes
    #[arg(long, value_name = "ID|DIR")]
    model: String,
    /// Text to continue; can be given several times
    #[arg(long, required = true, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Most tokens of a continuation
    #[arg(long, default_value_t = 128, value_name = "N")]
    tokens: usize,
    /// 0 takes the likeliest token always
    #[arg(long, default_value_t = 0.8, value_name = "T")]
    temperature: f32,
    /// Draw among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Router in the place of the checkpoint's own
    #[arg(long, default_value = "native", value_name = "SPEC")]
    router: RouterSpec,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Threads that compute; without it, RAYON_NUM_THREADS or one per core
    #[arg(long, value_name = "N")]
    threads: Option<Threads>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moe-train: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: &Cli) -> Result<()> {
    let threads = match &cli.command {
        Some(Command::Compare(_)) => None,
        Some(Command::Sample(args)) => args.threads,
        None => cli.train.threads,
    };
    use_threads(threads)?;
    init(LogFormat::Text, None)?;
    match &cli.command {
        Some(Command::Compare(args)) => compare_runs(args),
        Some(Command::Sample(args)) => sample(args),
        None => run(&cli.train),
    }
}

fn run(args: &TrainArgs) -> Result<()> {
    moe_serve::ops::grad::keep_freed_memory();
    let path = args.recipe.as_deref().context("--recipe is missing")?;
    let file = RecipeFile::read(path)?;
    let variants: Vec<Option<String>> = match args.all_variants {
        true => file.variants().map(|v| Some(v.to_string())).collect(),
        false if args.variant.is_empty() => vec![None],
        false => args.variant.iter().cloned().map(Some).collect(),
    };
    if variants.is_empty() {
        bail!("{} has no variants; leave --all-variants out", path.display());
    }
    let recipes = variants.iter().map(|v| recipe(args, &file, v.as_deref())).collect::<Result<Vec<_>>>()?;
    let backend = Backend::select(args.device, DtypeChoice::F32, candle_core::DType::F32)?;
    let stop = Arc::new(AtomicBool::new(false));
    on_signal(stop.clone())?;
    let mut prepared: Option<(DataSpec, Prepared)> = None;
    let mut finished = Vec::new();
    for (recipe, variant) in recipes.iter().zip(variants) {
        let base = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.name));
        let out = variant.as_ref().map_or_else(|| base.clone(), |v| base.join(v));
        // Variants mostly share their data.
        if prepared.as_ref().is_none_or(|(spec, _)| *spec != recipe.data) {
            prepared = Some((recipe.data.clone(), data(args, recipe, &base.join("data"))?));
        }
        let Some((_, data)) = &prepared else { bail!("no data") };
        if args.overwrite && out.join("log.jsonl").exists() {
            std::fs::remove_dir_all(&out).with_context(|| out.display().to_string())?;
        }
        let bar = ProgressBar::new(recipe.optim.steps).with_style(bar_style());
        bar.set_prefix(variant.as_ref().map_or_else(|| recipe.name.clone(), |v| format!("{} {v}", recipe.name)));
        let mut watch = Progress { bar, sample: &recipe.sample, stop: stop.clone(), device: args.device };
        let job = Job {
            recipe,
            variant,
            data,
            out: out.clone(),
            device: backend.device().clone(),
            runs_on: backend.describe(),
            resume: args.resume,
        };
        match train(&job, &mut watch)? {
            Outcome::Stopped(step) => {
                watch.bar.abandon();
                println!("stopped after step {step}; the same command with --resume goes on");
                return Ok(());
            }
            Outcome::Finished(results) => {
                watch.bar.finish_and_clear();
                document(&out, &results)?;
                print!("{}", summary(&results));
                println!("written    {}", out.display());
                finished.push(*results);
            }
        }
    }
    if finished.len() > 1 {
        print!("\n{}", compare_terminal(&finished));
    }
    Ok(())
}

/// The recipe with what the command line says in its place.
fn recipe(args: &TrainArgs, file: &RecipeFile, variant: Option<&str>) -> Result<Recipe> {
    let mut recipe = file.resolve(variant)?;
    if !args.data.is_empty() {
        recipe.data.train.clone_from(&args.data);
        recipe.data.valid.clone_from(&args.valid);
    } else if !args.valid.is_empty() {
        recipe.data.valid.clone_from(&args.valid);
    }
    if let Some(path) = &args.tokenizer {
        recipe.data.tokenizer = TokenizerSpec::File(path.clone());
    }
    recipe.optim.steps = args.steps.unwrap_or(recipe.optim.steps);
    recipe.seed = args.seed.unwrap_or(recipe.seed);
    recipe.check()?;
    Ok(recipe)
}

fn data(args: &TrainArgs, recipe: &Recipe, cache: &Path) -> Result<Prepared> {
    let mut spec = recipe.data.clone();
    if args.synthetic {
        eprintln!("training on GENERATED text (--synthetic): the model learns a made-up grammar, no language");
        spec = synthetic(&spec, cache, SYNTHETIC_DOCUMENTS, recipe.seed)?;
    }
    let bar = ProgressBar::new(0).with_style(reading_style());
    let prepared = prepare(&spec, cache, &|reading: Reading| {
        bar.set_message(format!("{:?}", reading.stage).to_lowercase());
        bar.set_length(reading.total);
        bar.set_position(reading.done);
    })?;
    bar.finish_and_clear();
    let f = &prepared.facts;
    eprintln!(
        "data       {} documents, {} tokens to train on, {} held out, vocabulary {}",
        f.documents, f.train_tokens, f.valid_tokens, f.vocab
    );
    Ok(prepared)
}

/// Stories of --synthetic: enough that a short run does not see them twice.
const SYNTHETIC_DOCUMENTS: usize = 4000;

fn reading_style() -> ProgressStyle {
    ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} [{elapsed_precise} ETA {eta_precise}]")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// What a person sees of a run.
struct Progress<'a> {
    bar: ProgressBar,
    sample: &'a SampleSpec,
    stop: Arc<AtomicBool>,
    device: DeviceChoice,
}

impl Watch for Progress<'_> {
    fn step(&mut self, log: &StepLog) {
        self.bar.set_position(log.step);
        let k = if log.entropy_l.is_empty() { String::new() } else { format!(", k {:.2}", log.experts_per_token) };
        self.bar.set_message(format!(
            "loss {:.3}, perplexity {:.1}, {:.0} tok/s{k}",
            log.loss, log.perplexity, log.tokens_per_second
        ));
    }

    fn evaluated(&mut self, log: &EvalLog) {
        let k = if log.entropy_l.is_empty() { String::new() } else { format!(", k {:.3}", log.experts_per_token) };
        // Not through the bar, which says nothing where there is no terminal.
        self.bar.suspend(|| {
            eprintln!(
                "step {:>6}: held-out loss {:.4}, perplexity {:.3}, top-1 {:.3}, top-3 {:.3}{k}",
                log.step, log.loss, log.perplexity, log.top1, log.top3
            );
        });
    }

    fn sample(&mut self, dir: &Path) -> Vec<Sample> {
        if self.sample.prompts.is_empty() {
            return Vec::new();
        }
        let ask = Ask {
            tokens: self.sample.tokens,
            temperature: self.sample.temperature,
            top_k: self.sample.top_k,
            seed: 0,
            router: RouterSpec::native(),
            device: self.device,
        };
        // A model that says nothing must not cost the run.
        continuations(&dir.display().to_string(), &self.sample.prompts, &ask).unwrap_or_else(|e| {
            eprintln!("no samples: {e:#}");
            Vec::new()
        })
    }

    fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The first Ctrl-C or SIGTERM asks the run to save and end, the second ends the program.
fn on_signal(stop: Arc<AtomicBool>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let Ok(mut term) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
                return;
            };
            loop {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => {}
                    _ = term.recv() => {}
                }
                if stop.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("saving after this step; once more to end at once");
            }
        });
    })?;
    Ok(())
}

/// Writes results.json and report.html.
fn document(out: &Path, results: &RunResults) -> Result<()> {
    let log = read_log(out)?;
    let write = |name: &str, text: String| {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    };
    write("results.json", serde_json::to_string_pretty(results)? + "\n")?;
    write("report.html", html(results, &log.steps))
}

fn compare_runs(args: &CompareArgs) -> Result<()> {
    let mut runs = Vec::new();
    for dir in &args.runs {
        let mut paths = vec![dir.join("results.json")];
        if !paths[0].is_file() {
            let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
            paths = entries.filter_map(|e| e.ok()).map(|e| e.path().join("results.json")).collect();
            paths.retain(|p| p.is_file());
            paths.sort();
        }
        if paths.is_empty() {
            bail!("{} holds no finished run: there is no results.json in it or its folders", dir.display());
        }
        for path in paths {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            runs.push(RunResults::parse(&text).with_context(|| path.display().to_string())?);
        }
    }
    print!("{}", compare_terminal(&runs));
    if let Some(path) = &args.markdown {
        std::fs::write(path, compare_markdown(&runs)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// How a model is asked.
struct Ask {
    tokens: usize,
    temperature: f32,
    top_k: Option<usize>,
    seed: u64,
    router: RouterSpec,
    device: DeviceChoice,
}

fn sample(args: &SampleArgs) -> Result<()> {
    let ask = Ask {
        tokens: args.tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
        router: args.router.clone(),
        device: args.device,
    };
    for sample in continuations(&args.model, &args.prompt, &ask)? {
        println!("{}{}\n", sample.prompt, sample.text);
    }
    Ok(())
}

/// What the model says to the prompts, through the engine that serves it.
fn continuations(model: &str, prompts: &[String], ask: &Ask) -> Result<Vec<Sample>> {
    let options = LoadOptions { device: ask.device, ..LoadOptions::default() };
    let config = EngineConfig { max_num_seqs: prompts.len(), max_queue: prompts.len(), ..EngineConfig::default() };
    let Launched { engine, .. } =
        Found::find(Some(model), &HubOptions::default())?.launch(&options, &ask.router, config)?;
    let limits = engine.info().limits;
    let submit = |prompt: &String| {
        let ids = engine.encode(prompt, true).map_err(anyhow::Error::msg)?;
        let sampling = SamplingParams {
            temperature: ask.temperature,
            top_k: ask.top_k.unwrap_or(0) as u32,
            seed: Some(ask.seed),
            ..SamplingParams::default()
        };
        let max_tokens = ask.tokens.min(limits.max_model_len.saturating_sub(ids.len()));
        Ok(engine.submit(GenerateRequest { sampling, ..GenerateRequest::greedy(ids, max_tokens) })?)
    };
    let events = prompts.iter().map(submit).collect::<Result<Vec<_>>>()?;
    let mut samples = Vec::with_capacity(prompts.len());
    for (prompt, events) in prompts.iter().zip(events) {
        let (text, ..) = events.wait().map_err(anyhow::Error::msg)?;
        samples.push(Sample { prompt: prompt.clone(), text });
    }
    Ok(samples)
}
