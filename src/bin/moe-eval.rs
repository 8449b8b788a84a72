//! moe-eval: parse, build, run.

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::MultiProgress;
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, Found, KvSize, Launched, RequestRouters, Text, calibrations, default_name};
use moe_serve::eval::compare::{Arrangement, Plan, evaluate};
use moe_serve::eval::document::{RunFacts, results, write};
use moe_serve::eval::report::terminal;
use moe_serve::eval::results::{ModelFacts, MoeFacts, Settings, TaskResult};
use moe_serve::eval::task::{Place, Source, TASKS};
use moe_serve::eval::{
    Bootstrap, Http, HttpOptions, InProcess, Lm, Log, PERPLEXITY, Runner, SuiteOptions, Task, TextOptions, Workload,
    profile as run_profile, read,
};
use moe_serve::model::hub::{HubOptions, resolve_tokenizer};
use moe_serve::model::{LoadOptions, hash};
use moe_serve::moe::Policy;
use moe_serve::moe::calibration::Calibrations;
use moe_serve::moe::router::{ROUTERS, find, sweep};
use moe_serve::ops::use_threads;
use moe_serve::telemetry::{LogFormat, init};
use moe_serve::types::{DeviceChoice, DtypeChoice, MoeShape, Quantization, RouterSpec, Threads, hex};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// Measure what a router costs in quality: BBH, MMLU, GSM8K and perplexity, beside static routing at the same mean k.
#[derive(Parser, Debug)]
#[command(name = "moe-eval", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = help())]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    eval: EvalArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show tasks, their groups and subtasks
    List,
    /// Run a workload and show what it costs, part by part
    Profile(Box<ProfileArgs>),
}

/// The model, and how it runs.
#[derive(Args, Debug)]
struct ModelArgs {
    /// Hub id (mistralai/Mixtral-8x7B-v0.1), directory or GGUF file; without it, the small bundled checkpoint
    #[arg(long, env = "MOE_SERVE_MODEL", value_name = "ID|DIR")]
    model: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "R")]
    revision: Option<String>,
    /// What weights are kept in: auto (as stored), bf16, f16 or f32
    #[arg(long, default_value = "auto")]
    dtype: DtypeChoice,
    /// Quantise weights as they are loaded: none, q8_0, q4_k or q4_0; or experts=FORMAT,dense=FORMAT
    #[arg(long, default_value = "none", value_name = "FORMAT")]
    quant: Quantization,
    /// Keep packed weights in this directory, and take them from there at the next start
    #[arg(long, value_name = "DIR")]
    pack_cache: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Threads that compute; without it, RAYON_NUM_THREADS or one per core
    #[arg(long, value_name = "N")]
    threads: Option<Threads>,
    /// Longest prompt and completion together, in tokens; without it, the model's own
    #[arg(long, value_name = "N")]
    max_model_len: Option<usize>,
    /// Never touch the network (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
    /// Memory for the KV cache in GiB; without it, a quarter of what is free, at most 4
    #[arg(long, value_name = "GB")]
    kv_cache_gb: Option<f64>,
    /// Tokens computed in one step
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1048576))]
    batch_tokens: u32,
}

#[derive(Args, Debug)]
struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tasks, groups or subtasks (bbh, mmlu, mmlu_stem, gsm8k, gsm8k_cot, perplexity, anatomy, …); see `moe-eval list`
    #[arg(long, required = true, value_name = "TASK,…", value_delimiter = ',')]
    tasks: Vec<String>,
    /// Router to evaluate; can be given several times, and `dynk:0.5,0.65,0.8` is three. Without it, the model's own
    #[arg(long, value_name = "SPEC")]
    router: Vec<RouterSpec>,
    /// Also run native routing, and for each dynamic router static routing at the same mean k
    #[arg(long)]
    compare_static: bool,
    /// Samples per subtask (windows of text), the first ones; without it, all
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Few-shot examples; without it, each task's own number. `--tasks mmlu@5` gives one task its own
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// Seed of few-shot examples that are drawn and of the bootstrap; lm-eval's by default
    #[arg(long, default_value_t = 1234, value_name = "S")]
    seed: u64,
    /// Most tokens of a completion; without it, each task's own number
    #[arg(long, value_name = "N", value_parser = positive)]
    max_gen_tokens: Option<usize>,
    /// Folder for samples.jsonl, results.json, report.md and report.html; a run that was stopped goes on from there
    #[arg(long, default_value = "results", value_name = "DIR")]
    output: PathBuf,
    /// Begin anew where the folder has the samples of an earlier run
    #[arg(long)]
    overwrite: bool,
    /// Folder with bbh/, mmlu/ and gsm8k/ as their repositories have them; without it, data sets of the Hub
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Take rows that are not the published ones
    #[arg(long)]
    unverified: bool,
    /// Text of the task perplexity
    #[arg(long, value_name = "FILE", required_if_eq("tasks", PERPLEXITY))]
    text: Option<PathBuf>,
    /// Tokens of a window of text; all but the first are scored
    #[arg(long, default_value_t = 512, value_name = "N")]
    window: usize,
    /// Tokens of text that are read; without it, all
    #[arg(long, value_name = "N", value_parser = positive)]
    text_tokens: Option<usize>,
    /// Samples per task on which next-token distributions are compared with native routing's (with --compare-static)
    #[arg(long, default_value_t = 256, value_name = "N")]
    kl_samples: usize,
    /// Resamples of the bootstrap
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = positive)]
    resamples: usize,
    /// Questions asked at the same time
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Evaluate a model behind an OpenAI-compatible server (http://host:8000/v1); --model then gives its tokenizer
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Name of the model in requests to the server; without it, that of --model
    #[arg(long, value_name = "NAME", requires = "base_url")]
    served_model_name: Option<String>,
    /// Key sent to the server
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

#[derive(Args, Debug)]
struct ProfileArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The router that is profiled
    #[arg(long, default_value = "native", value_name = "SPEC")]
    router: RouterSpec,
    /// Prompts, one JSON object with a `prompt` a line
    #[arg(long, value_name = "FILE")]
    input_file: PathBuf,
    /// Prompts that run at the same time
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch_size: u16,
    /// Tokens generated after each prompt; end tokens do not end it
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = positive)]
    max_tokens: usize,
    /// File for the figures as JSON
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be a whole number of at least 1".into())
}

fn help() -> String {
    let mut help = String::from("Routers (every one takes weights=native|renorm|keep):\n");
    for router in ROUTERS {
        help.push_str(&format!("  {}\n      {}\n", router.usage, router.summary));
    }
    help
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let model = match &cli.command {
        Some(Command::Profile(args)) => &args.model,
        _ => &cli.eval.model,
    };
    use_threads(model.threads)?;
    init(LogFormat::Text, None)?;
    match &cli.command {
        None => eval(&cli.eval),
        Some(Command::List) => {
            list();
            Ok(())
        }
        Some(Command::Profile(args)) => profile(args),
    }
}

fn list() {
    for task in TASKS {
        let subtasks = (task.subtasks)();
        let shots =
            format!("{} shots, takes {} to {}", task.shots, task.shots_allowed.start(), task.shots_allowed.end());
        println!("{:<12} {} ({shots}; version {} of lm-eval's)", task.name, task.summary, task.version);
        let mut groups: Vec<Option<&str>> = Vec::new();
        for subtask in subtasks.iter().filter(|_| subtasks.len() > 1) {
            if !groups.contains(&subtask.group) {
                groups.push(subtask.group);
            }
        }
        for group in groups {
            let names = subtasks.iter().filter(|s| s.group == group).map(|s| s.key).collect::<Vec<_>>().join(" ");
            println!("{}", wrapped(&format!("{}{names}", group.map_or_else(String::new, |g| format!("{g}: ")))));
        }
    }
    println!("{PERPLEXITY:<12} of any text (--text), over windows that do not overlap; also bits per byte");
}

/// Words in lines of at most 100 columns, indented.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::from("   ")];
    for word in text.split(' ') {
        if lines.last().is_some_and(|line| line.len() + word.len() > 100) {
            lines.push(String::from("   "));
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines.join("\n")
}

fn hub_options(args: &ModelArgs) -> HubOptions {
    let mut hub = HubOptions { revision: args.revision.clone(), ..HubOptions::from_env() };
    hub.offline |= args.offline;
    hub
}

/// Loads the model and starts an engine that runs up to `workers` sequences and lets requests choose any router.
fn launch(args: &ModelArgs, workers: usize, profile: bool) -> Result<Launched> {
    let options = LoadOptions {
        dtype: args.dtype,
        device: args.device,
        max_model_len: args.max_model_len,
        quantization: args.quant,
        pack_cache: args.pack_cache.clone(),
    };
    let config = EngineConfig {
        max_num_seqs: workers,
        max_batched_tokens: args.batch_tokens as usize,
        max_queue: workers,
        request_routers: Some(RequestRouters { names: Vec::new(), experts_max: Some(usize::MAX), files: true }),
        kv_size: args.kv_cache_gb.map(|gb| KvSize::Bytes((gb * f64::from(1 << 30)) as u64)),
        // Prompts that lose tokens because memory is short would be other prompts.
        cut_context: false,
        profile,
        ..EngineConfig::default()
    };
    Ok(Found::find(args.model.as_deref(), &hub_options(args))?.launch(&options, &RouterSpec::native(), config)?)
}

/// The model that is evaluated, with what documents and logs say of it.
struct Opened {
    lm: Box<dyn Lm>,
    facts: ModelFacts,
    moe: Option<MoeShape>,
    /// That routers may name.
    calibrations: Option<Calibrations>,
    /// Device and dtype: what the bits of answers may depend on.
    device: String,
}

fn open(args: &EvalArgs) -> Result<Opened> {
    match &args.base_url {
        Some(url) => connect(args, url),
        None => {
            let launched = launch(&args.model, args.workers.into(), false)?;
            eprintln!("{}", launched.describe());
            let moe = launched.shape.moe.clone();
            // Without the number of threads, which changes nothing.
            let device = launched.runs_on.split([' ', '(']).next().unwrap_or_default();
            let device = format!("{device}, {}", launched.dtype);
            let facts = ModelFacts {
                name: launched.engine.info().name.clone(),
                hash: Some(hash(&launched.files)?),
                runs_on: launched.runs_on,
                parameters: Some(launched.shape.parameters as u64),
                moe: (moe.layers > 0).then_some(MoeFacts {
                    layers: moe.layers,
                    experts: moe.experts,
                    top_k: moe.top_k,
                }),
            };
            let calibrations = Some(calibrations(&launched.files));
            let lm = Box::new(InProcess::new(Arc::new(launched.engine), launched.text, &launched.shape));
            Ok(Opened { lm, facts, moe: Some(moe), calibrations, device })
        }
    }
}

fn connect(args: &EvalArgs, url: &str) -> Result<Opened> {
    if args.compare_static {
        bail!("--compare-static needs the experts per token, which servers do not tell; leave out --base-url or it");
    }
    let model =
        args.model.model.as_deref().context("--base-url needs --model for its tokenizer: a hub id or directory")?;
    let (config, tokenizer) = resolve_tokenizer(model, &hub_options(&args.model), &MultiProgress::new())?;
    let read = std::fs::read_to_string(&config).with_context(|| config.display().to_string())?;
    let config: Value = serde_json::from_str(&read).with_context(|| config.display().to_string())?;
    let field = |name: &str| config[name].as_u64().with_context(|| format!("config.json has no whole number `{name}`"));
    let text = Text::read(&tokenizer, field("vocab_size")? as usize)?;
    let options = HttpOptions {
        base_url: url.into(),
        model: args.served_model_name.clone().unwrap_or_else(|| default_name(model)),
        api_key: args.api_key.clone(),
        max_length: args
            .model
            .max_model_len
            .map_or_else(|| field("max_position_embeddings").map(|n| n as usize), Ok)?,
    };
    let name = options.model.clone();
    let lm = Box::new(Http::connect(options, text)?);
    let facts = ModelFacts { name, hash: None, runs_on: url.into(), parameters: None, moe: None };
    Ok(Opened { lm, facts, moe: None, calibrations: None, device: "a server".into() })
}

fn eval(args: &EvalArgs) -> Result<()> {
    // What can be wrong without a model is found before it is loaded.
    let mut routers = arrangements(&args.router)?;
    let place = match &args.data_dir {
        Some(dir) => Place::Directory(dir.clone()),
        None => Place::Hub(hub_options(&args.model)),
    };
    let source = Source { place, unverified: args.unverified, bars: MultiProgress::new() };
    let material = read(&args.tasks, &source, &suite_options(args))?;
    let opened = open(args)?;
    if let (Some(moe), Some(files)) = (&opened.moe, &opened.calibrations) {
        for router in &mut routers {
            router.weights = Policy::build_with(&router.spec, moe, files)?.weight_options();
        }
    }
    let tasks = material.into_iter().map(|m| m.encode(&*opened.lm)).collect::<Result<Vec<_>, _>>()?;
    let log = log(args, &opened, &tasks)?;
    let runner = Runner { lm: &*opened.lm, log: Mutex::new(log), workers: args.workers.into() };
    let plan = Plan {
        routers,
        compare_static: args.compare_static,
        bootstrap: Bootstrap { resamples: args.resamples, seed: args.seed, kl_samples: args.kl_samples },
        moe: opened.moe,
    };
    let arms = evaluate(&runner, &tasks, &plan, progress)?;
    let facts = RunFacts {
        command: command(),
        finished: jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
        settings: settings(args, &*opened.lm),
        model: opened.facts,
    };
    let results = results(facts, &runner.log(), &tasks, arms, &plan);
    print!("{}", terminal(&results));
    let paths = write(&args.output, &results).with_context(|| args.output.display().to_string())?;
    println!("written    {}", paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "));
    Ok(())
}

/// The command line as a shell takes it, without the key.
fn command() -> String {
    let mut words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(program) = words.first_mut() {
        *program = "moe-eval".into();
    }
    for i in 1..words.len() {
        if words[i - 1] == "--api-key" {
            words[i] = "…".into();
        } else if words[i].starts_with("--api-key=") {
            words[i] = "--api-key=…".into();
        }
    }
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=@+…".contains(c);
    let quoted = |word: String| match word.chars().all(plain) && !word.is_empty() {
        true => word,
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}

fn suite_options(args: &EvalArgs) -> SuiteOptions {
    let perplexity =
        TextOptions { text: args.text.clone().unwrap_or_default(), window: args.window, tokens_max: args.text_tokens };
    SuiteOptions {
        shots: args.shots,
        limit: args.limit,
        seed: args.seed,
        max_gen_tokens: args.max_gen_tokens,
        perplexity,
    }
}

/// One per router asked for: sweeps are taken apart.
fn arrangements(specs: &[RouterSpec]) -> Result<Vec<Arrangement>> {
    let mut found: Vec<Arrangement> = Vec::new();
    for spec in specs {
        let dynamic = find(spec)?.dynamic;
        for spec in sweep(spec)? {
            if found.iter().all(|known| known.spec != spec) {
                found.push(Arrangement { spec, dynamic, weights: Vec::new() });
            }
        }
    }
    Ok(found)
}

/// A line for every arm and task that is done.
fn progress(arm: &str, result: &TaskResult) {
    let metric = result.metrics.first().map_or_else(String::new, |m| {
        let value = if m.share { format!("{:.2} %", 100.0 * m.value) } else { format!("{:.3}", m.value) };
        format!("{} {value}", m.name)
    });
    let k = result.routing.as_ref().map_or_else(String::new, |r| format!(", {:.3} experts per token", r.mean_k));
    eprintln!("{}: {arm}: {} samples, {metric}{k}, {:.1} s", result.task, result.samples, result.seconds);
}

fn settings(args: &EvalArgs, lm: &dyn Lm) -> Settings {
    Settings {
        tasks: args.tasks.clone(),
        shots: args.shots,
        limit: args.limit,
        seed: args.seed,
        max_gen_tokens: args.max_gen_tokens,
        window: args.window,
        text_tokens: args.text_tokens,
        kl_samples: args.kl_samples,
        max_length: lm.max_length(),
        bootstrap_resamples: args.resamples,
    }
}

/// The log to go on with, or a new one. It holds all that answers depend on beside the routers.
fn log(args: &EvalArgs, opened: &Opened, tasks: &[Task]) -> Result<Log> {
    let data: BTreeMap<&str, &str> =
        tasks.iter().flat_map(|task| &task.data).map(|d| (d.name.as_str(), d.sha256.as_str())).collect();
    let settings = json!({
        "model": opened.facts.hash.clone().unwrap_or_else(|| format!("{} at {}", opened.facts.name, opened.facts.runs_on)),
        "program": env!("CARGO_PKG_VERSION"),
        "runs_on": opened.device,
        "data": data,
        "shots": args.shots,
        "limit": args.limit,
        "seed": args.seed,
        "max_gen_tokens": args.max_gen_tokens,
        "max_length": opened.lm.max_length(),
        "text": args.text.as_ref().map(|_| [Some(args.window), args.text_tokens]),
        "calibrations": calibration_sums(&args.router)?,
    });
    let Value::Object(settings) = settings else { bail!("settings are an object") };
    std::fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    let path = args.output.join("samples.jsonl");
    if args.overwrite && path.exists() {
        std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
    }
    let log = Log::open(&path, &settings.into_iter().collect())?;
    if !log.outcomes.is_empty() {
        eprintln!("going on with {} answers in {}", log.outcomes.len(), path.display());
    }
    Ok(log)
}

/// SHA-256 sums of the files that routers name: with others, answers would be others.
fn calibration_sums(routers: &[RouterSpec]) -> Result<BTreeMap<&str, String>> {
    let words = routers.iter().flat_map(|spec| spec.args.iter().chain(spec.options.iter().map(|(_, value)| value)));
    let files = words.filter(|word| Path::new(word).is_file());
    let sum = |path: &str| std::fs::read(path).map(|bytes| hex(&Sha256::digest(bytes))).context(path.to_string());
    files.map(|path| Ok((path.as_str(), sum(path)?))).collect()
}

/// The prompts of a JSONL file.
fn prompts(text: &str) -> Result<Vec<String>> {
    let prompt = |(i, line): (usize, &str)| {
        let row: Value = serde_json::from_str(line).with_context(|| format!("line {} is not JSON", i + 1))?;
        let prompt = row["prompt"].as_str().map(String::from);
        prompt.with_context(|| format!("line {} has no string `prompt`: {line}", i + 1))
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(prompt).collect::<Result<Vec<_>>>()?;
    if prompts.is_empty() {
        bail!("holds no prompts; one JSON object with a string `prompt` a line was expected");
    }
    Ok(prompts)
}

fn profile(args: &ProfileArgs) -> Result<()> {
    find(&args.router)?;
    let read = std::fs::read_to_string(&args.input_file).with_context(|| args.input_file.display().to_string())?;
    let prompts = prompts(&read).with_context(|| args.input_file.display().to_string())?;
    let launched = launch(&args.model, args.batch_size.into(), true)?;
    println!("{}", launched.describe());
    let workload = Workload {
        prompts,
        max_tokens: args.max_tokens,
        batch_size: args.batch_size.into(),
        router: args.router.clone(),
    };
    let report = run_profile(Arc::new(launched.engine), launched.text, &launched.shape, &workload)?;
    print!("{report}");
    if let Some(path) = &args.output {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(())
}
