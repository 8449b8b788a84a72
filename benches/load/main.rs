//! Puts a running server under load and checks every answer.
//!
//! ```console
//! $ cargo bench --bench load -- --url http://127.0.0.1:8000 --streams 200 --seconds 120
//! $ cargo bench --bench load -- --url http://127.0.0.1:8000 --soak-minutes 30 --pid $(pgrep -x moe-serve)
//! ```
//!
//! The first keeps N completions streaming and compares each with the same request made alone; the second mixes all
//! kinds of requests with clients that leave, bursts and pauses, and watches the server's memory. Both print a table
//! and, as their last line, one JSON document, and exit 1 if anything was wrong. This program needs processor time
//! too: where it shares a machine with the server, its figures are those of both.

mod client;
mod load;
mod mix;
mod observe;
mod report;
mod soak;

use clap::Parser;
use client::Client;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "load: nothing to do without --url; for instance\n  \
    cargo bench --bench load -- --url http://127.0.0.1:8000 --streams 200 --seconds 120\n  \
    cargo bench --bench load -- --url http://127.0.0.1:8000 --soak-minutes 30 --pid PID";

/// Puts a running server under load and checks every answer
#[derive(Parser)]
#[command(name = "load")]
struct Args {
    /// Address of the server
    #[arg(long)]
    url: String,
    /// Key of a server that was started with one
    #[arg(long, env = "MOE_SERVE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests at the same time
    #[arg(long, default_value_t = 32)]
    streams: usize,
    /// How long new requests are sent
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Different requests; each is first made alone
    #[arg(long, default_value_t = 24)]
    cases: usize,
    /// Most tokens asked for; at least 16
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Only count texts that differ from those of the request made alone: for devices on which sums depend on the batch
    #[arg(long)]
    allow_different: bool,
    /// Instead of the load: mix all kinds of requests for so long
    #[arg(long)]
    soak_minutes: Option<f64>,
    /// The server's process, whose memory, threads and files are watched
    #[arg(long)]
    pid: Option<u32>,
    /// Requests sent at once between two phases of a soak, to overrun the server's queue; 0 for none
    #[arg(long, default_value_t = 400)]
    burst: usize,
    /// Growth of the server's memory that a soak allows, in MiB
    #[arg(long, default_value_t = 64.0)]
    rss_growth_mib: f64,
    /// Of the order in which a soak mixes requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds after which an answer counts as lost
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// What cargo gives to every bench
    #[arg(long, hide = true)]
    bench: bool,
    /// Filters for other benches
    #[arg(hide = true)]
    filters: Vec<String>,
}

fn main() -> ExitCode {
    // `cargo bench` runs every bench, with arguments meant for another one: those are not looked at.
    let asked =
        std::env::args().skip(1).any(|a| ["--url", "--help", "-h"].contains(&a.as_str()) || a.starts_with("--url="));
    if !asked {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime.map_err(|e| e.to_string()).and_then(|r| r.block_on(run(&args)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("load: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was well.
async fn run(args: &Args) -> Result<bool, String> {
    let timeout = Duration::from_secs(args.timeout);
    let client = Client::new(&args.url, args.api_key.as_deref(), args.streams.max(args.burst), timeout)?;
    let model = client.model().await.map_err(|e| format!("{} does not answer as expected: {e}", args.url))?;
    println!("{} at {}", model, args.url);
    if let Some(minutes) = args.soak_minutes {
        let plan = soak::Plan {
            total: Duration::from_secs_f64(minutes.max(0.1) * 60.0),
            streams: args.streams,
            burst: args.burst,
            pid: args.pid,
            rss_growth_mib: args.rss_growth_mib,
            seed: args.seed,
            same_always: !args.allow_different,
        };
        return soak::run(&client, &plan).await;
    }
    let plan = load::Plan {
        streams: args.streams,
        length: Duration::from_secs(args.seconds),
        cases: args.cases.max(1),
        max_tokens: args.max_tokens.max(16),
        pid: args.pid,
        allow_different: args.allow_different,
    };
    load::run(&client, &plan).await
}
