//! moe-bench: parse, build, run.

use anyhow::Result;
use clap::Parser;
use moe_serve::bench::{Settings, Subject, open, routers, run};
use moe_serve::model::LoadOptions;
use moe_serve::model::hub::HubOptions;
use moe_serve::ops::use_threads;
use moe_serve::telemetry::{LogFormat, init};
use moe_serve::types::{DeviceChoice, DtypeChoice, Quantization, RouterSpec, Threads};
use std::path::PathBuf;
use std::process::ExitCode;

/// Measure how fast a model runs here: prompts and decoding with one router or several, beside what the machine's memory
/// and arithmetic allow. The last line of standard output is one JSON document.
#[derive(Parser, Debug)]
#[command(name = "moe-bench", version)]
struct Cli {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Keep only the first N layers
    #[arg(long, value_name = "N", value_parser = positive)]
    layers: Option<usize>,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "R")]
    revision: Option<String>,
    /// Never touch the network (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
    /// Tokens of the prompts, each computed in one step; 0 for none
    #[arg(long, default_value = "128,512,2048", value_name = "N,…", value_delimiter = ',', value_parser = number)]
    prompt: Vec<usize>,
    /// Tokens that every sequence generates; 0 for no decoding
    #[arg(long, default_value = "32", value_name = "N", value_parser = number)]
    generate: usize,
    /// Sequences that decode at the same time
    #[arg(long, default_value = "1,4,16,64", value_name = "B,…", value_delimiter = ',', value_parser = positive)]
    batch: Vec<usize>,
    /// Tokens of every sequence in the KV cache before it decodes
    #[arg(long, default_value = "64", value_name = "N", value_parser = number)]
    context: usize,
    /// How tokens choose experts: a list, or given several times; the first is what others are compared with
    #[arg(long, default_value = "native", value_name = "SPEC,…")]
    router: Vec<String>,
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
    /// Runs that count, of every test and router, after one that does not
    #[arg(long, default_value = "3", value_name = "N", value_parser = positive)]
    repeat: usize,
    /// Seed of random weights and of the tokens
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Leave out how fast the machine reads and computes, and the shares of that
    #[arg(long)]
    no_roofline: bool,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct SubjectArgs {
    /// Hub id (allenai/OLMoE-1B-7B-0924), directory or GGUF file
    #[arg(long, value_name = "ID|DIR")]
    model: Option<String>,
    /// A config.json, the directory it is in, or a hub id: weights are made up, no checkpoint and no tokenizer is needed
    #[arg(long, value_name = "CONFIG")]
    random_weights: Option<String>,
}

/// Most tokens or sequences that can be asked for: more than any model has positions.
const NUMBER_MAX: usize = 1 << 24;

fn number(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| *n <= NUMBER_MAX);
    number.ok_or_else(|| format!("must be a whole number from 0 to {NUMBER_MAX}"))
}

fn positive(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (1..=NUMBER_MAX).contains(n));
    number.ok_or_else(|| format!("must be a whole number from 1 to {NUMBER_MAX}"))
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<()> {
    use_threads(cli.threads)?;
    init(LogFormat::Text, None)?;
    let lists = cli.router.iter().map(|list| routers(list)).collect::<Result<Vec<Vec<RouterSpec>>, _>>()?;
    let settings = Settings {
        prompts: cli.prompt.clone(),
        generate: cli.generate,
        batches: cli.batch.clone(),
        context: cli.context,
        routers: lists.concat(),
        repeat: cli.repeat,
        seed: cli.seed,
        roofline: !cli.no_roofline,
    };
    let mut hub = HubOptions { revision: cli.revision.clone(), ..HubOptions::from_env() };
    hub.offline |= cli.offline;
    let subject = match (&cli.subject.model, &cli.subject.random_weights) {
        (Some(model), _) => Subject::Model(model.clone()),
        (None, config) => Subject::RandomWeights(config.clone().unwrap_or_default()),
    };
    let options = LoadOptions {
        dtype: cli.dtype,
        device: cli.device,
        quantization: cli.quant,
        pack_cache: cli.pack_cache.clone(),
        ..LoadOptions::default()
    };
    let opened = open(&subject, &hub, options, cli.layers, &settings)?;
    let report = run(&opened, &settings, |doing| eprintln!("{doing}"))?;
    println!("{report}");
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
