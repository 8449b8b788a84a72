//! moe-calibrate: parse, build, run.

use anyhow::{Context, Result};
use clap::Parser;
use moe_serve::calibrate::{Scope, Settings, Target, bundled, calibrate, correlations, read, summary};
use moe_serve::engine::Found;
use moe_serve::model::LoadOptions;
use moe_serve::model::hub::HubOptions;
use moe_serve::ops::use_threads;
use moe_serve::telemetry::{LogFormat, init};
use moe_serve::types::{DeviceChoice, DtypeChoice, Quantization, Threads};
use std::path::PathBuf;
use std::process::ExitCode;

/// Fit a checkpoint's routing to a budget: measure what its layers lose with fewer experts, choose the best rule for each,
/// check the whole beside static routing on held-out text, and write a file for `--router policy:FILE`.
#[derive(Parser, Debug)]
#[command(name = "moe-calibrate", version)]
struct Cli {
    /// Hub id (allenai/OLMoE-1B-7B-0924), directory or GGUF file; without it, the small bundled checkpoint
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
    /// Never touch the network (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
    /// Plain text files, mixed evenly: text, maths, code, as they will be served. Without it, a short sample
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Share of native routing's FLOPs, in (0, 1]; without a target, statistics alone are written
    #[arg(long, value_name = "SHARE")]
    target_flops: Option<f64>,
    /// Share of the bytes of distinct experts that native routing reads in a decode step (with --batch-size)
    #[arg(long, value_name = "SHARE")]
    target_bytes: Option<f64>,
    /// Sequences that decode at the same time (for --target-bytes)
    #[arg(long, value_name = "B")]
    batch_size: Option<usize>,
    /// Whose FLOPs --target-flops counts: experts (the default) or forward
    #[arg(long, value_name = "SCOPE")]
    scope: Option<Scope>,
    /// Tokens to calibrate on
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = positive)]
    tokens: usize,
    /// Tokens to check the policy on
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = positive)]
    held_out_tokens: usize,
    /// Tokens of a window
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// Seed of the windows that are drawn and of intervals
    #[arg(long, default_value_t = 1234, value_name = "S")]
    seed: u64,
    /// The file that is written; a run that was stopped goes on from FILE.state beside it
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// File for the correlations of estimators with the true loss, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be a whole number of at least 1".into())
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
    use_threads(cli.threads)?;
    init(LogFormat::Text, None)?;
    // What can be wrong without a model is found before it is loaded.
    let settings = Settings {
        target: Target::asked(cli.target_flops, cli.target_bytes, cli.batch_size, cli.scope)?,
        tokens: cli.tokens,
        held_out_tokens: cli.held_out_tokens,
        window: cli.window,
        seed: cli.seed,
    };
    let sources = if cli.data.is_empty() { vec![bundled()] } else { read(&cli.data)? };
    let mut hub = HubOptions { revision: cli.revision.clone(), ..HubOptions::from_env() };
    hub.offline |= cli.offline;
    let options = LoadOptions {
        dtype: cli.dtype,
        device: cli.device,
        max_model_len: None,
        quantization: cli.quant,
        pack_cache: cli.pack_cache.clone(),
    };
    let opened = Found::find(cli.model.as_deref(), &hub)?.load(&options)?;
    let outcome = calibrate(opened, &sources, &settings, &cli.out)?;
    print!("{}", correlations(&outcome.correlations));
    if let Some(path) = &cli.report {
        let json = serde_json::to_string_pretty(&outcome.correlations)?;
        std::fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
    }
    print!("{}", summary(&outcome, cli.model.as_deref(), &cli.out));
    Ok(())
}
