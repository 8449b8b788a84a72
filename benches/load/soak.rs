//! Hours of everything: all kinds of requests, clients that leave, bursts beyond the queue, pauses; and what it leaves.

use crate::client::{Client, Failure, Streamed, corrupted};
use crate::mix::{Feature, INVALID, Random, Request, prompts, valid};
use crate::observe::{Process, Series, when_idle};
use crate::report::{Faults, round};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests of all kinds for so long, then a burst, then a pause.
const PHASE: Duration = Duration::from_secs(40);
const PAUSE: Duration = Duration::from_secs(5);
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// What an idle server may take until its gauges say so.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests of a hundred whose client leaves in the middle, and that are invalid.
const LEAVE_PERCENT: usize = 20;
const INVALID_PERCENT: usize = 8;
/// Files that an idle server may have open more at the end than at the beginning.
const FILES_GROWTH_MAX: u64 = 16;

pub struct Plan {
    pub total: Duration,
    pub streams: usize,
    pub burst: usize,
    pub pid: Option<u32>,
    pub rss_growth_mib: f64,
    pub seed: u64,
    /// Whether the same greedy request must give the same text whatever runs beside it.
    pub same_always: bool,
}

/// The server at one time.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Seconds since the beginning.
    at: f64,
    process: Process,
    running: f64,
    waiting: f64,
    kv_usage: f64,
    ended: f64,
}

/// How often a kind of request ended how.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    good: usize,
    left: usize,
    refused: usize,
    bad: usize,
}

#[derive(Default)]
struct State {
    ends: BTreeMap<&'static str, Ends>,
    samples: Vec<Sample>,
    faults: Faults,
    server_errors: usize,
    stuck: usize,
    burst_refused: usize,
}

struct Soak<'a> {
    client: &'a Client,
    plan: &'a Plan,
    prompts: Vec<String>,
    features: Vec<Feature>,
    /// A greedy request's text at the beginning.
    canary: String,
    begun: Instant,
    state: Mutex<State>,
}

/// Runs the soak; whether all was well.
///
/// # Errors
/// A server that does not answer one request at a time, or a process that cannot be watched.
pub async fn run(client: &Client, plan: &Plan) -> Result<bool, String> {
    let features = Feature::probe(client).await.map_err(|e| format!("looking for what the server can do: {e}"))?;
    println!("beside plain completions: {features:?}");
    let answer = client.whole("/v1/completions", &canary()).await.map_err(|e| e.to_string())?;
    let Some(text) = answer["choices"][0]["text"].as_str() else { return Err(format!("no text in {answer}")) };
    when_idle(client, PATIENCE).await.map_err(|e| e.to_string())?;
    let process = plan.pid.map(Process::read).transpose()?;
    let (prompts, canary, begun) = (prompts(), text.to_string(), Instant::now());
    let soak = Soak { client, plan, prompts, features, canary, begun, state: Mutex::default() };
    println!(
        "{:>8} {:>9} {:>8} {:>6} {:>8} {:>8} {:>7} {:>9} {:>7}",
        "seconds", "RSS MiB", "threads", "files", "running", "waiting", "KV %", "ended", "faults"
    );
    tokio::select! {
        () = soak.phases() => {}
        never = soak.watch() => match never {},
    }
    // Connections of the clients close once they have been idle for a while.
    tokio::time::sleep(PAUSE).await;
    soak.sample().await;
    let series = when_idle(client, PATIENCE).await.map_err(|e| e.to_string())?;
    Ok(soak.report(process, &series))
}

/// The request whose text must never change.
fn canary() -> Value {
    json!({"prompt": "Once upon a time there was a little", "max_tokens": 48, "temperature": 0, "ignore_eos": true})
}

impl Soak<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn phases(&self) {
        let end = self.begun + self.plan.total;
        let mut phase = 0;
        while Instant::now() < end {
            let until = end.min(Instant::now() + PHASE);
            let workers = (0..self.plan.streams).map(|w| self.worker(phase * self.plan.streams + w, until));
            futures::future::join_all(workers).await;
            self.burst().await;
            self.pause().await;
            phase += 1;
        }
    }

    async fn worker(&self, number: usize, until: Instant) {
        let mut random = Random::new(self.plan.seed.wrapping_add(number as u64));
        while Instant::now() < until {
            let refused = if random.percent(INVALID_PERCENT) {
                self.invalid(&mut random).await;
                false
            } else if random.percent(5) {
                self.same().await
            } else {
                let request = valid(&mut random, &self.prompts, &self.features);
                let leave = random.percent(LEAVE_PERCENT).then(|| random.below(30));
                let result = match leave {
                    Some(after) => self.leave(&request, after).await.map(|()| true),
                    None => self.finish(&request).await.map(|()| false),
                };
                self.count(request.kind, &request.body, result)
            };
            if refused || random.percent(5) {
                tokio::time::sleep(Duration::from_millis(random.below(1500) as u64)).await;
            }
        }
    }

    /// Counts an answer, or a client that left; whether the request was refused for want of room.
    fn count(&self, kind: &'static str, body: &Value, result: Result<bool, Failure>) -> bool {
        let mut state = self.state();
        let ends = state.ends.entry(kind).or_default();
        match result {
            Ok(false) => ends.good += 1,
            Ok(true) => ends.left += 1,
            Err(Failure::Refused { hint: true }) => {
                ends.refused += 1;
                return true;
            }
            Err(failure) => {
                ends.bad += 1;
                match &failure {
                    Failure::Corrupted(_) => state.faults.corrupted += 1,
                    Failure::Status { status: 500.., .. } => state.server_errors += 1,
                    _ => state.faults.lost += 1,
                }
                // A 429 without the hint when to come back is a fault too, and no other kind gets here with one.
                let seconds = self.begun.elapsed().as_secs();
                state.faults.show(format!("at {seconds} s, {kind}: {failure}; sent {body}"));
            }
        }
        false
    }

    /// Reads an answer to its end and checks it.
    async fn finish(&self, request: &Request) -> Result<(), Failure> {
        if request.stream {
            let streamed = self.client.stream(request.path, &request.body).await?;
            check_streamed(request, &streamed)
        } else {
            check_whole(request, &self.client.whole(request.path, &request.body).await?)
        }
    }

    /// Goes away after some pieces of a stream, or some hundredths of a second.
    async fn leave(&self, request: &Request, after: usize) -> Result<(), Failure> {
        if request.stream {
            let mut events = self.client.open(request.path, &request.body).await?;
            for _ in 0..after {
                if events.next().await?.is_none() {
                    break;
                }
            }
            return Ok(());
        }
        let patience = Duration::from_millis(10 * after as u64);
        let answer = tokio::time::timeout(patience, self.client.whole(request.path, &request.body)).await;
        answer.map_or(Ok(()), |answer| answer.map(|_| ()))
    }

    /// A request that must be refused, with an error that says why.
    async fn invalid(&self, random: &mut Random) {
        let (body, wanted) = INVALID[random.below(INVALID.len())];
        let result = match self.client.post_bytes("/v1/completions", body.into()).await {
            Err(Failure::Status { status, body: text }) if status == wanted => {
                let error: Value = serde_json::from_str(&text).unwrap_or_default();
                let says = |field: &str| error["error"][field].as_str().is_some_and(|s| !s.is_empty());
                if says("message") && says("type") {
                    Ok(false)
                } else {
                    corrupted(format!("an error without words: {text}"))
                }
            }
            Ok(text) => corrupted(format!("{wanted} wanted, got {text}")),
            Err(failure) => Err(failure),
        };
        self.count("invalid", &Value::String(body.into()), result);
    }

    /// The request whose text is known.
    async fn same(&self) -> bool {
        let body = canary();
        let result = self.client.whole("/v1/completions", &body).await;
        let text = result.as_ref().ok().and_then(|a| a["choices"][0]["text"].as_str());
        if text.is_some_and(|t| t != self.canary) {
            let mut state = self.state();
            state.faults.different += 1;
            state.faults.show(format!("at first {:?}, now {text:?}", self.canary));
        }
        self.count("known text", &body, result.map(|_| false))
    }

    /// More at once than the server takes: each must be answered or refused.
    async fn burst(&self) {
        let body = json!({"prompt": self.prompts[0], "max_tokens": 8, "temperature": 0});
        let refused = |ends: &BTreeMap<_, Ends>| ends.get("burst").map_or(0, |e: &Ends| e.refused);
        let before = refused(&self.state().ends);
        let one = |_| async {
            let result = self.client.whole("/v1/completions", &body).await;
            self.count("burst", &body, result.map(|_| false));
        };
        futures::future::join_all((0..self.plan.burst).map(one)).await;
        let mut state = self.state();
        state.burst_refused += refused(&state.ends) - before;
    }

    /// Nothing is sent; the server must come to rest.
    async fn pause(&self) {
        match when_idle(self.client, PATIENCE).await {
            Ok(series) if series.idle() => {}
            Ok(series) => {
                let mut state = self.state();
                state.stuck += 1;
                state.faults.show(format!(
                    "{PATIENCE:?} after the last request: {} running, {} waiting, KV usage {}",
                    series.running(),
                    series.waiting(),
                    series.kv_usage()
                ));
            }
            Err(failure) => {
                self.count("/metrics", &Value::Null, Err(failure));
            }
        }
        tokio::time::sleep(PAUSE).await;
    }

    async fn watch(&self) -> Infallible {
        loop {
            self.sample().await;
            tokio::time::sleep(SAMPLE_EVERY).await;
        }
    }

    /// Reads the process and the series, and prints a row.
    async fn sample(&self) {
        let process = self.plan.pid.map(Process::read).transpose();
        let series = Series::fetch(self.client).await;
        let (process, series) = match (process, series) {
            (Ok(process), Ok(series)) => (process.unwrap_or_default(), series),
            (process, series) => {
                let why = process.err().or(series.err().map(|e| e.to_string())).unwrap_or_default();
                self.count("/metrics", &Value::Null, Err(Failure::Lost(why)));
                return;
            }
        };
        let sample = Sample {
            at: self.begun.elapsed().as_secs_f64(),
            process,
            running: series.running(),
            waiting: series.waiting(),
            kv_usage: series.kv_usage(),
            ended: series.sum("moe_requests_total"),
        };
        let mut state = self.state();
        let faults = state.ends.values().map(|e| e.bad).sum::<usize>() + state.faults.different + state.stuck;
        println!(
            "{:>8.0} {:>9.1} {:>8} {:>6} {:>8} {:>8} {:>7.1} {:>9} {faults:>7}",
            sample.at,
            process.rss_mib,
            process.threads,
            process.files,
            sample.running,
            sample.waiting,
            sample.kv_usage * 100.0,
            sample.ended
        );
        state.samples.push(sample);
    }

    fn report(&self, before: Option<Process>, series: &Series) -> bool {
        let state = self.state();
        println!("{:<16} {:>8} {:>8} {:>8} {:>8}", "requests", "good", "left", "refused", "bad");
        for (kind, e) in &state.ends {
            println!("{kind:<16} {:>8} {:>8} {:>8} {:>8}", e.good, e.left, e.refused, e.bad);
        }
        for (reason, count) in series.labelled("moe_requests_total") {
            println!("ended {reason} {count}");
        }
        let growth = rss_growth(&state.samples, self.plan.total.as_secs_f64());
        let last = state.samples.last().copied().unwrap_or_default().process;
        let files = before.map_or(0, |b| last.files.saturating_sub(b.files));
        let bad: usize = state.ends.values().map(|e| e.bad).sum();
        let good: usize = state.ends.values().map(|e| e.good).sum();
        let different = state.faults.different;
        let checks = [
            (format!("every answer as it must be ({bad} were not)"), bad == 0 && good > 0),
            (format!("no 5xx ({})", state.server_errors), state.server_errors == 0),
            (format!("the known text never changed ({different})"), different == 0 || !self.plan.same_always),
            (format!("at rest in every pause ({} times not)", state.stuck), state.stuck == 0),
            (format!("at rest at the end (KV usage {})", series.kv_usage()), series.idle()),
            (
                format!("memory grew by {growth:.1} of {} MiB", self.plan.rss_growth_mib),
                growth <= self.plan.rss_growth_mib,
            ),
            (format!("{files} of {FILES_GROWTH_MAX} more open files"), files <= FILES_GROWTH_MAX),
        ];
        checks.iter().for_each(|(what, fine)| println!("{} {what}", if *fine { "ok    " } else { "FAILED" }));
        println!("bursts were refused {} times", state.burst_refused);
        let passed = checks.iter().all(|(_, fine)| *fine);
        let ends = state.ends.iter().map(|(kind, e)| {
            (kind.to_string(), json!({"good": e.good, "left": e.left, "refused": e.refused, "bad": e.bad}))
        });
        let rss: Vec<Value> = state.samples.iter().map(|s| json!([round(s.at), round(s.process.rss_mib)])).collect();
        let document = json!({
            "mode": "soak", "passed": passed, "seconds": round(self.begun.elapsed().as_secs_f64()),
            "streams": self.plan.streams, "seed": self.plan.seed, "features": format!("{:?}", self.features),
            "requests": ends.collect::<serde_json::Map<_, _>>(), "server_errors": state.server_errors,
            "different": different, "stuck": state.stuck, "burst_refused": state.burst_refused,
            "idle_at_end": series.idle(), "rss_growth_mib": round(growth), "rss_mib": rss, "threads": last.threads,
            "files": last.files, "files_before": before.map(|b| b.files),
        });
        println!("{document}");
        passed
    }
}

/// How much more memory the last fifth took at most than the second fifth did: like is compared with like, and what
/// the first requests make the server allocate once is left out.
fn rss_growth(samples: &[Sample], total: f64) -> f64 {
    let most = |from: f64, to: f64| {
        let within = samples.iter().filter(|s| s.at >= from * total && s.at <= to * total);
        within.map(|s| s.process.rss_mib).max_by(f64::total_cmp)
    };
    match (most(0.2, 0.4), most(0.8, f64::INFINITY)) {
        (Some(early), Some(late)) => late - early,
        _ => 0.0,
    }
}

fn check_streamed(request: &Request, streamed: &Streamed) -> Result<(), Failure> {
    if streamed.choices.len() != request.choices {
        return corrupted(format!("{} choices instead of {}", streamed.choices.len(), request.choices));
    }
    let usage_wanted = request.body["stream_options"]["include_usage"] == true;
    if streamed.usage.is_some() != usage_wanted {
        return corrupted(format!("usage asked for: {usage_wanted}; got {:?}", streamed.usage));
    }
    if let Some(usage) = &streamed.usage {
        check_usage(request, usage)?;
    }
    streamed.choices.iter().try_for_each(|c| check_text(request, &c.text, c.finish_reason.as_deref()))
}

fn check_whole(request: &Request, answer: &Value) -> Result<(), Failure> {
    check_usage(request, &answer["usage"])?;
    let Some(choices) = answer["choices"].as_array().filter(|c| c.len() == request.choices) else {
        return corrupted(format!("{} choices wanted: {answer}", request.choices));
    };
    for (i, choice) in choices.iter().enumerate() {
        let Some(text) = choice["text"].as_str().or(choice["message"]["content"].as_str()) else {
            return corrupted(format!("no text in {choice}"));
        };
        if choice["index"] != i {
            return corrupted(format!("choice {i} has index {}", choice["index"]));
        }
        check_text(request, text, choice["finish_reason"].as_str())?;
        check_logprobs(request, choice)?;
    }
    Ok(())
}

fn check_usage(request: &Request, usage: &Value) -> Result<(), Failure> {
    let count = |field: &str| usage[field].as_u64().ok_or_else(|| Failure::Corrupted(format!("no {field} in {usage}")));
    let (prompt, completion) = (count("prompt_tokens")?, count("completion_tokens")?);
    if prompt + completion != count("total_tokens")? {
        return corrupted(format!("the total is not the sum: {usage}"));
    }
    match request.experts_per_token {
        Some(wanted) if usage["moe"]["experts_per_token"] != wanted => {
            corrupted(format!("{wanted} experts per token wanted: {usage}"))
        }
        _ => Ok(()),
    }
}

fn check_text(request: &Request, text: &str, reason: Option<&str>) -> Result<(), Failure> {
    if !matches!(reason, Some("stop" | "length")) {
        return corrupted(format!("finish_reason {reason:?}"));
    }
    let echo = request.body["echo"] == true;
    if let Some(stop) = request.stops.iter().find(|s| !echo && text.contains(**s)) {
        return corrupted(format!("the stop string {stop:?} is in {text:?}"));
    }
    if request.kind == "json_schema" && reason == Some("stop") && request.stops.is_empty() {
        let named = serde_json::from_str::<Value>(text).is_ok_and(|v| v["name"].is_string());
        return if named { Ok(()) } else { corrupted(format!("not what the schema asks for: {text:?}")) };
    }
    Ok(())
}

fn check_logprobs(request: &Request, choice: &Value) -> Result<(), Failure> {
    if request.body["logprobs"].is_null() {
        return Ok(());
    }
    let logprobs = &choice["logprobs"];
    let count = |field: &str| logprobs[field].as_array().map(Vec::len);
    let tokens = count("tokens");
    let fields = ["token_logprobs", "top_logprobs", "text_offset"];
    if tokens.is_none() || fields.iter().any(|f| count(f) != tokens) {
        return corrupted(format!("logprobs of different lengths: {logprobs}"));
    }
    Ok(())
}
