//! moe-serve: parse, build, run.

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{HumanBytes, HumanCount, MultiProgress, ProgressBar};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{Engine, EngineConfig, Text};
use moe_serve::model::hub::{HubOptions, bar_style, resolve};
use moe_serve::model::{FAMILIES, LoadOptions, Loaded, load};
use moe_serve::moe::Policy;
use moe_serve::moe::router::{ROUTERS, find};
use moe_serve::types::{DeviceChoice, DtypeChoice, RouterSpec};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Serve a pretrained Mixture-of-Experts checkpoint with a dynamic router over the OpenAI API.
#[derive(Parser, Debug)]
#[command(version, after_help = router_help())]
struct Args {
    /// Hub id (mistralai/Mixtral-8x7B-v0.1) or directory; without it, the small bundled checkpoint
    #[arg(long, env = "MOE_SERVE_MODEL", value_name = "ID|DIR")]
    model: Option<String>,
    /// How tokens choose experts; see below
    #[arg(long, default_value = "native", value_name = "SPEC")]
    router: RouterSpec,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "R")]
    revision: Option<String>,
    /// What weights are kept in: auto (as stored), bf16, f16 or f32
    #[arg(long, default_value = "auto")]
    dtype: DtypeChoice,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name that requests give; without it, the model's
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Longest prompt and completion together, in tokens; without it, what model and KV cache allow
    #[arg(long, value_name = "N")]
    max_model_len: Option<usize>,
    /// Never touch the network (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
    /// Requests that run at the same time
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_num_seqs: u32,
    /// Tokens computed in one step
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1048576))]
    max_batched_tokens: u32,
    /// Unfinished requests beyond those that run; more are refused with 429
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_queue: u32,
    /// Memory for the KV cache in GiB; without it, a quarter of what is free, at most 4
    #[arg(long, value_name = "GB", value_parser = positive, allow_negative_numbers = true)]
    kv_cache_gb: Option<f64>,
    /// Seconds that running requests get to finish after Ctrl-C or SIGTERM
    #[arg(long, default_value_t = 30, value_name = "S")]
    shutdown_timeout: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        _ => Err("must be a number above 0".into()),
    }
}

fn router_help() -> String {
    let mut help = String::from("Routers (every one takes weights=native|renorm|keep):\n");
    for router in ROUTERS {
        help.push_str(&format!("  {}\n      {}\n      {}\n", router.usage, router.summary, router.formula));
    }
    help.push_str("\nFamilies, by model_type of config.json:\n");
    for family in FAMILIES {
        help.push_str(&format!("  {:<10} {}\n", family.model_type, family.summary));
    }
    help.push_str(
        "\nEnvironment: HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE as in Python's huggingface_hub; \
         RUST_LOG for the log; RAYON_NUM_THREADS for the number of CPU threads.",
    );
    help
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args) -> Result<()> {
    find(&args.router)?;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Bound first: a taken port should not be found after minutes of loading.
    let address = format!("{}:{}", args.host, args.port);
    let listener =
        runtime.block_on(TcpListener::bind(&address)).with_context(|| format!("cannot listen on {address}"))?;
    let engine = Arc::new(build(args)?);
    println!("address    http://{}  (POST /v1/completions)", listener.local_addr()?);
    let finished = runtime.block_on(run(listener, engine.clone(), Duration::from_secs(args.shutdown_timeout)))?;
    if !finished {
        // The engine may be in the middle of a long step, which no one waits for any more.
        std::process::exit(0);
    }
    engine.stop();
    Ok(())
}

/// Loads the model, starts the engine, and says what is served.
fn build(args: &Args) -> Result<Engine> {
    let model = args.model.clone().map_or_else(bundled, Ok)?;
    let started = Instant::now();
    let bars = MultiProgress::new();
    let mut hub = HubOptions { revision: args.revision.clone(), ..HubOptions::from_env() };
    hub.offline |= args.offline;
    let files = resolve(&model, &hub, &bars)?;
    let options = LoadOptions { dtype: args.dtype, device: args.device, max_model_len: args.max_model_len };
    let bar = bars.add(ProgressBar::new(0).with_style(bar_style()).with_message("loading weights"));
    let loaded = load(&files, &options, {
        let bar = bar.clone();
        move |read, total| {
            bar.set_length(total);
            bar.set_position(read);
        }
    })?;
    bar.finish_and_clear();
    for field in &loaded.unread_config {
        tracing::warn!("config.json has a field `{field}` that this server does not know; it was ignored");
    }
    let shape = loaded.model.shape().clone();
    let text = Text::read(&files.tokenizer, shape.vocab)?;
    let policy = Policy::build(&args.router, &shape.moe)?;
    let name = args.served_model_name.clone().unwrap_or_else(|| default_name(&model));
    let config = EngineConfig {
        max_num_seqs: args.max_num_seqs as usize,
        max_batched_tokens: args.max_batched_tokens as usize,
        max_queue: args.max_queue as usize,
        kv_bytes: args.kv_cache_gb.map(|gb| (gb * f64::from(1 << 30)) as u64),
        cut_context: args.max_model_len.is_none(),
    };
    let weights = loaded.model.bytes() as u64;
    let model_lines = model_lines(&name, &loaded);
    let max_positions = shape.max_positions;
    let engine = Engine::start(name, loaded, text, policy, config)?;
    println!("{model_lines}");
    println!("router     {}", engine.info().router);
    println!("memory     {} weights, {} KV cache", HumanBytes(weights), HumanBytes(engine.kv_bytes()));
    let len = engine.info().limits.max_model_len;
    let cut = if args.max_model_len.is_none() && len < max_positions {
        format!(" of {max_positions} (what the KV cache holds; --kv-cache-gb raises it)")
    } else {
        String::new()
    };
    println!("context    {len} tokens{cut}; loaded in {:.1} s", started.elapsed().as_secs_f64());
    Ok(engine)
}

fn model_lines(name: &str, loaded: &Loaded) -> String {
    let (shape, backend) = (loaded.model.shape(), loaded.model.backend());
    let shared = if shape.moe.shared_width.is_some() { " and a shared one" } else { "" };
    format!(
        "model      {name}: {} parameters, {} layers, {} of them mixtures of {} experts{shared}\n\
         runs on    {} with {} weights",
        HumanCount(shape.parameters as u64),
        shape.layers.len(),
        shape.moe.layers,
        shape.moe.experts,
        backend.describe(),
        format!("{:?}", backend.dtype()).to_lowercase(),
    )
}

/// The checkpoint that comes with the source.
fn bundled() -> Result<String> {
    const BUNDLED: &str = "models/stories-mixtral";
    let places = [PathBuf::from(BUNDLED), Path::new(env!("CARGO_MANIFEST_DIR")).join(BUNDLED)];
    let found = places.iter().find(|p| p.is_dir());
    let found = found.context("the bundled checkpoint models/stories-mixtral is not here; give --model ID|DIR")?;
    Ok(found.display().to_string())
}

/// A directory's last part, or the hub id as it is.
fn default_name(model: &str) -> String {
    let path = Path::new(model);
    match path.canonicalize().ok().filter(|p| p.is_dir()) {
        Some(dir) => dir.file_name().map_or_else(|| model.into(), |n| n.to_string_lossy().into_owned()),
        None => model.into(),
    }
}

/// Serves until a signal, then lets running requests finish for as long as `timeout` allows; tells whether they did.
async fn run(listener: TcpListener, engine: Arc<Engine>, timeout: Duration) -> Result<bool> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let app = moe_serve::http::app(engine.clone());
    let mut server = tokio::spawn(moe_serve::http::serve(listener, app, async {
        let _ = stopped.await;
    }));
    tokio::select! {
        result = &mut server => return result?.map(|()| true).context("serving"),
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    let seconds = timeout.as_secs();
    tracing::info!("shutting down: running requests have {seconds} s to finish; a second signal ends at once");
    engine.drain();
    let _ = stop.send(());
    tokio::select! {
        result = &mut server => return result?.map(|()| true).context("serving"),
        () = tokio::time::sleep(timeout) => tracing::warn!("some requests did not finish in time and are cut off"),
        _ = interrupt.recv() => tracing::warn!("second signal: ending now"),
        _ = terminate.recv() => tracing::warn!("second signal: ending now"),
    }
    Ok(false)
}
