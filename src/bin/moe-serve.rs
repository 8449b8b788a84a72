//! moe-serve: parse, build, run.

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::HumanBytes;
use moe_serve::chat::ChatTemplates;
use moe_serve::engine::api::Generate;
use moe_serve::engine::{Engine, EngineConfig, Found, KvSize, RequestRouters};
use moe_serve::http::{ApiKeys, Service, ServiceOptions, Switch, Tls, Transport, app, cors, wrap};
use moe_serve::model::hub::{Files, HubOptions};
use moe_serve::model::{FAMILIES, LoadOptions};
use moe_serve::moe::router::{ESTIMATORS, ROUTERS, find};
use moe_serve::ops::use_threads;
use moe_serve::telemetry::{LogFormat, init};
use moe_serve::types::{DeviceChoice, DtypeChoice, Quantization, RouterSpec, Threads};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

/// Serve a pretrained Mixture-of-Experts checkpoint with a dynamic router over the OpenAI API.
#[derive(Parser, Debug)]
#[command(version, after_help = router_help())]
struct Args {
    /// Hub id (mistralai/Mixtral-8x7B-v0.1), directory or GGUF file; without it, the small bundled checkpoint
    #[arg(long, env = "MOE_SERVE_MODEL", value_name = "ID|DIR")]
    model: Option<String>,
    /// How tokens choose experts; see below
    #[arg(long, default_value = "native", value_name = "SPEC")]
    router: RouterSpec,
    /// Least experts of a complexity router, as a share of the checkpoint's own number (its option min-ratio)
    #[arg(long, value_name = "R")]
    min_experts_ratio: Option<f64>,
    /// Most experts of a complexity router, as a share of the checkpoint's own number (its option max-ratio)
    #[arg(long, value_name = "R")]
    max_experts_ratio: Option<f64>,
    /// Spend less while requests wait: the share of native routing's cost that a budget router goes down to
    #[arg(long, value_name = "SHARE", value_parser = share)]
    load_shed: Option<f64>,
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
    /// KV cache in blocks of 16 positions, instead of --kv-cache-gb
    #[arg(long, value_name = "N", conflicts_with = "kv_cache_gb", value_parser = clap::value_parser!(u32).range(1..))]
    num_blocks: Option<u32>,
    /// Compute every prompt anew, also where an earlier one began alike
    #[arg(long)]
    no_prefix_cache: bool,
    /// Let requests choose their router: all, or those named
    #[arg(long, value_name = "NAME,…", num_args = 0.., value_delimiter = ',', value_parser = router_name)]
    allow_request_router: Option<Vec<String>>,
    /// Most experts per token that a request's router may use; without it, the checkpoint's own number
    #[arg(long, value_name = "K", requires = "allow_request_router")]
    request_experts_max: Option<u32>,
    /// Let requests ask for the experts used per token and layer
    #[arg(long)]
    allow_moe_trace: bool,
    /// Jinja template that turns chat messages into prompts, instead of the checkpoint's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Key that requests must send as `Authorization: Bearer KEY`; can be given several times
    #[arg(long, value_name = "KEY", env = "MOE_SERVE_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// File with such keys, one per line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Web origin (https://app.example) whose pages may use the API, or *; can be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Certificate chain in PEM: serve HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// How lines of the log look: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// OpenTelemetry collector (http://host:4318) that gets a trace of every request
    #[cfg(feature = "otel")]
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
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

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
        _ => Err("must be a number above 0 and below 1".into()),
    }
}

/// The router as asked for, with the flags that are options of it.
fn router(args: &Args) -> RouterSpec {
    let ratios = [("min-ratio", args.min_experts_ratio), ("max-ratio", args.max_experts_ratio)];
    let ratios = ratios.into_iter().filter_map(|(key, ratio)| Some((key.to_string(), ratio?.to_string())));
    let options = args.router.options.iter().cloned().chain(ratios).collect();
    RouterSpec { options, ..args.router.clone() }
}

fn router_name(text: &str) -> Result<String, String> {
    let bare = RouterSpec { name: text.into(), args: Vec::new(), options: Vec::new() };
    find(&bare).map(|router| router.name.to_string()).map_err(|e| e.to_string())
}

fn kv_size(args: &Args) -> Option<KvSize> {
    let bytes = args.kv_cache_gb.map(|gb| KvSize::Bytes((gb * f64::from(1 << 30)) as u64));
    bytes.or(args.num_blocks.map(|n| KvSize::Blocks(n as usize)))
}

fn request_routers(args: &Args) -> Option<RequestRouters> {
    let names = args.allow_request_router.clone()?;
    let experts_max = args.request_experts_max.map(|k| k as usize);
    Some(RequestRouters { names, experts_max, files: false })
}

fn router_help() -> String {
    let mut help = String::from("Routers (every one takes weights=native|renorm|keep|lsq):\n");
    for router in ROUTERS {
        help.push_str(&format!("  {}\n      {}\n      {}\n", router.usage, router.summary, router.formula));
    }
    help.push_str("\nEstimators of complexity (s is calibrated by cal=FILE, else c):\n");
    for estimator in ESTIMATORS {
        help.push_str(&format!("  {}\n      {}\n", estimator.usage, estimator.formula));
    }
    help.push_str("\nFamilies, by model_type of config.json:\n");
    for family in FAMILIES {
        help.push_str(&format!("  {:<10} {}\n", family.model_type, family.summary));
    }
    help.push_str(
        "\nEnvironment: HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE as in Python's huggingface_hub; \
         RUST_LOG for the log; RAYON_NUM_THREADS for the number of CPU threads where --threads does not give it.",
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
    use_threads(args.threads)?;
    find(&args.router)?;
    let end_telemetry = start_telemetry(args)?;
    // What can be wrong without a model is found before it is loaded.
    let keys = ApiKeys::gather(&args.api_key, args.api_key_file.as_deref())?;
    let cors = cors(&args.cors_origin)?;
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => Some(Tls::read(cert, key)?),
        _ => None,
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let address = format!("{}:{}", args.host, args.port);
    let listener =
        runtime.block_on(TcpListener::bind(&address)).with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr()?;
    // Answers from now on, at first that the model is being loaded.
    let switch = Switch::new();
    let routes = wrap(switch.router(), keys, cors);
    let (stop, stopped) = oneshot::channel::<()>();
    let transport = Transport { tls, ..Default::default() };
    let server = runtime.spawn(moe_serve::http::serve(listener, routes, transport, async {
        let _ = stopped.await;
    }));
    let (counted, signals) = watch::channel(0);
    runtime.spawn(count_signals(counted));
    let loading = runtime.spawn(exit_on_signal(signals.clone()));
    let (engine, chat) = build(args)?;
    let engine = Arc::new(engine);
    let options = ServiceOptions { moe_trace: args.allow_moe_trace };
    switch.open(app(Service { generate: engine.clone(), chat, options }));
    loading.abort();
    println!("address    {scheme}://{address}  (POST /v1/completions, /v1/chat/completions; a playground at /)");
    let timeout = Duration::from_secs(args.shutdown_timeout);
    let finished = runtime.block_on(async {
        let left = drained(&engine, &switch, timeout, signals).await?;
        let _ = stop.send(());
        // What is answered still has to reach the clients.
        tokio::time::timeout(left, server).await.ok()
    });
    let finished = finished.is_some();
    if finished {
        engine.stop();
    }
    end_telemetry();
    if !finished {
        // The engine may be in the middle of a long step, which no one waits for any more.
        std::process::exit(0);
    }
    Ok(())
}

/// Counts interrupts and terminations, from the first moment on, so that none is lost between two that wait for one.
async fn count_signals(count: watch::Sender<u32>) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::warn!("signals cannot be caught: they end the server at once");
        return;
    };
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        count.send_modify(|n| *n += 1);
    }
}

/// Waits for the `n`th signal; for ever, where none can be caught.
async fn nth(signals: &mut watch::Receiver<u32>, n: u32) {
    if signals.wait_for(|count| *count >= n).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Before there is an engine there is nothing to finish.
async fn exit_on_signal(mut signals: watch::Receiver<u32>) {
    nth(&mut signals, 1).await;
    tracing::info!("ended while the model was being loaded");
    std::process::exit(0);
}

/// Starts the log, and traces if there is a collector; what it gives sends the last of them.
#[cfg(feature = "otel")]
fn start_telemetry(args: &Args) -> Result<impl FnOnce()> {
    let traces = args.otlp_endpoint.as_deref().map(moe_serve::telemetry::otel::Traces::start).transpose()?;
    init(args.log_format, traces.as_ref().map(|traces| traces.layer()))?;
    Ok(move || {
        if let Some(traces) = traces {
            traces.stop();
        }
    })
}

/// Starts the log; without the feature `otel` there are no traces to end.
#[cfg(not(feature = "otel"))]
fn start_telemetry(args: &Args) -> Result<impl FnOnce()> {
    init(args.log_format, None)?;
    Ok(|| {})
}

/// Loads the model, starts the engine, and says what is served.
fn build(args: &Args) -> Result<(Engine, Option<ChatTemplates>)> {
    let started = Instant::now();
    let mut hub = HubOptions { revision: args.revision.clone(), ..HubOptions::from_env() };
    hub.offline |= args.offline;
    let mut found = Found::find(args.model.as_deref(), &hub)?;
    let chat = chat_templates(args, &found.files)?;
    if let Some(name) = &args.served_model_name {
        found.name.clone_from(name);
    }
    let options = LoadOptions {
        dtype: args.dtype,
        device: args.device,
        max_model_len: args.max_model_len,
        quantization: args.quant,
        pack_cache: args.pack_cache.clone(),
    };
    let config = EngineConfig {
        max_num_seqs: args.max_num_seqs as usize,
        max_batched_tokens: args.max_batched_tokens as usize,
        max_queue: args.max_queue as usize,
        kv_size: kv_size(args),
        prefix_cache: !args.no_prefix_cache,
        request_routers: request_routers(args),
        cut_context: args.max_model_len.is_none(),
        profile: false,
        load_shed: args.load_shed,
    };
    let launched = found.launch(&options, &router(args), config)?;
    let (engine, max_positions) = (&launched.engine, launched.shape.max_positions);
    println!("{}", launched.describe());
    println!("router     {}: {}", engine.info().router, engine.info().router_means);
    println!("memory     {} weights, {} KV cache", HumanBytes(launched.weight_bytes), HumanBytes(engine.kv_bytes()));
    let len = engine.info().limits.max_model_len;
    let cut = if args.max_model_len.is_none() && len < max_positions {
        format!(" of {max_positions} (what the KV cache holds; --kv-cache-gb raises it)")
    } else {
        String::new()
    };
    println!("context    {len} tokens{cut}; loaded in {:.1} s", started.elapsed().as_secs_f64());
    Ok((launched.engine, chat))
}

/// The template that turns messages into prompts: the operator's, or the checkpoint's own.
fn chat_templates(args: &Args, files: &Files) -> Result<Option<ChatTemplates>> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let config = files.tokenizer_config.as_deref().map(read).transpose()?;
    let jinja = args.chat_template.as_deref().or(files.chat_template.as_deref());
    let source = jinja.map(read).transpose()?;
    ChatTemplates::load(config.as_deref(), source.as_deref()).with_context(|| {
        jinja.or(files.tokenizer_config.as_deref()).map_or_else(String::new, |p| p.display().to_string())
    })
}

/// Waits for a signal, then lets running requests finish for as long as `timeout` allows; gives the time that is left
/// of it, or nothing if it is over.
async fn drained(
    engine: &Engine,
    switch: &Switch,
    timeout: Duration,
    mut signals: watch::Receiver<u32>,
) -> Option<Duration> {
    nth(&mut signals, 1).await;
    let seconds = timeout.as_secs();
    tracing::info!("shutting down: running requests have {seconds} s to finish; a second signal ends at once");
    let began = Instant::now();
    switch.drain();
    engine.drain();
    tokio::select! {
        () = switch.idle() => return Some(timeout.saturating_sub(began.elapsed())),
        () = tokio::time::sleep(timeout) => tracing::warn!("some requests did not finish in time and are cut off"),
        () = nth(&mut signals, 2) => tracing::warn!("second signal: ending now"),
    }
    None
}
