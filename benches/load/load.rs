//! Many completions at the same time, each compared with the same request made alone.

use crate::client::{Client, Failure, Streamed, corrupted};
use crate::mix::prompts;
use crate::observe::{Process, Series, when_idle};
use crate::report::{Durations, Faults, round};
use serde_json::{Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const PATH: &str = "/v1/completions";
/// A 429 is tried again after this.
const PAUSE: Duration = Duration::from_millis(500);

pub struct Plan {
    pub streams: usize,
    /// How long new requests are sent; those that run then are read to their end.
    pub length: Duration,
    pub cases: usize,
    pub max_tokens: usize,
    pub pid: Option<u32>,
    pub allow_different: bool,
}

/// A request with the text it gets alone.
struct Case {
    body: Value,
    max_tokens: usize,
    text: String,
}

#[derive(Default)]
struct Tally {
    requests: usize,
    refused: usize,
    tokens: u64,
    first: Durations,
    gaps: Durations,
    total: Durations,
    faults: Faults,
    running_max: f64,
    waiting_max: f64,
    kv_max: f64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the load; whether every answer was complete and, unless allowed, the same as alone.
///
/// # Errors
/// A server that does not answer even one request at a time.
pub async fn run(client: &Client, plan: &Plan) -> Result<bool, String> {
    let cases = references(client, plan).await?;
    let before = Series::fetch(client).await.map_err(|e| e.to_string())?;
    let tally = Mutex::new(Tally::default());
    let begun = Instant::now();
    let workers = (0..plan.streams).map(|w| worker(client, &cases, &tally, w, begun + plan.length));
    let all = async {
        futures::future::join_all(workers).await;
        begun.elapsed()
    };
    let elapsed = tokio::select! {
        elapsed = all => elapsed,
        never = watch(client, &tally) => match never {},
    };
    let after = when_idle(client, Duration::from_secs(20)).await.map_err(|e| e.to_string())?;
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !after.idle() {
        tally.faults.show(format!(
            "20 s after the last answer: {} running, {} waiting, KV usage {}",
            after.running(),
            after.waiting(),
            after.kv_usage()
        ));
    }
    Ok(report(plan, &mut tally, elapsed, &before, &after))
}

/// Makes every request alone. Texts with half characters are left out, so that any in a stream is a fault.
async fn references(client: &Client, plan: &Plan) -> Result<Vec<Case>, String> {
    let begun = Instant::now();
    let mut cases = Vec::new();
    for (i, body) in bodies(plan).into_iter().enumerate() {
        let answer = client.whole(PATH, &body).await.map_err(|e| format!("request {i} alone: {e}"))?;
        let max_tokens = body["max_tokens"].as_u64().unwrap_or_default() as usize;
        let (text, reason) = (&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]);
        let Some(text) = text.as_str().filter(|_| *reason == "length") else {
            return Err(format!("request {i} alone did not run to its length: {answer}"));
        };
        if answer["usage"]["completion_tokens"] != max_tokens {
            return Err(format!("request {i} alone has not {max_tokens} tokens: {}", answer["usage"]));
        }
        if !text.contains('\u{FFFD}') {
            cases.push(Case { body, max_tokens, text: text.to_string() });
        }
    }
    println!("{} requests made alone in {:.1} s", cases.len(), begun.elapsed().as_secs_f64());
    if cases.is_empty() { Err("the model writes half characters only".into()) } else { Ok(cases) }
}

/// Requests with prompts and completions of many lengths, every third sampled with a seed, the others greedy.
fn bodies(plan: &Plan) -> Vec<Value> {
    let prompts = prompts();
    let body = |i: usize| {
        let parts = [1, 2, 1, 4, 8, 1, 16, 2][i % 8];
        let prompt: Vec<&str> = (0..parts).map(|p| prompts[(i + p) % prompts.len()].as_str()).collect();
        let max_tokens = 16 + (plan.max_tokens - 16) * (i % 5) / 4;
        let mut body = json!({"prompt": prompt.join(" "), "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": true});
        if i % 3 == 2 {
            body["temperature"] = 0.7.into();
            body["seed"] = i.into();
        }
        body
    };
    (0..plan.cases).map(body).collect()
}

/// Sends one request after another until `end`.
async fn worker(client: &Client, cases: &[Case], tally: &Mutex<Tally>, worker: usize, end: Instant) {
    let mut turn = worker;
    while Instant::now() < end {
        let case = &cases[turn % cases.len()];
        let mut body = case.body.clone();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let result = client.stream(PATH, &body).await.and_then(|s| check(case, &s).map(|same| (s, same)));
        let refused = matches!(result, Err(Failure::Refused { .. }));
        count(&mut lock(tally), case, result);
        if refused {
            tokio::time::sleep(PAUSE).await;
        } else {
            // All cases in turn, but no two workers in step.
            turn += 1 + worker % 3;
        }
    }
}

/// Whether the text is the one the request gets alone.
fn check(case: &Case, streamed: &Streamed) -> Result<bool, Failure> {
    let [choice] = &streamed.choices[..] else {
        return corrupted(format!("{} choices instead of one", streamed.choices.len()));
    };
    if choice.finish_reason.as_deref() != Some("length") {
        return corrupted(format!("finish_reason {:?} instead of length", choice.finish_reason));
    }
    let tokens = streamed.usage.as_ref().map(|u| &u["completion_tokens"]);
    if tokens.is_none_or(|t| *t != case.max_tokens) {
        return corrupted(format!("{} tokens asked for; usage {:?}", case.max_tokens, streamed.usage));
    }
    if choice.text.contains('\u{FFFD}') {
        return corrupted(format!("half a character in {:?}", choice.text));
    }
    Ok(choice.text == case.text)
}

fn count(tally: &mut Tally, case: &Case, result: Result<(Streamed, bool), Failure>) {
    match result {
        Ok((streamed, same)) => {
            tally.requests += 1;
            tally.tokens += case.max_tokens as u64;
            tally.first.add(streamed.first);
            tally.gaps.extend(&streamed.gaps);
            tally.total.add(streamed.total);
            if !same {
                tally.faults.different += 1;
                let got = &streamed.choices[0].text;
                tally.faults.show(format!("alone {:?}, now {got:?}; sent {}", case.text, case.body));
            }
        }
        Err(Failure::Refused { .. }) => tally.refused += 1,
        Err(failure) => {
            match failure {
                Failure::Corrupted(_) => tally.faults.corrupted += 1,
                _ => tally.faults.lost += 1,
            }
            tally.faults.show(format!("{failure}; sent {}", case.body));
        }
    }
}

/// Looks at the server's gauges every second, for ever.
async fn watch(client: &Client, tally: &Mutex<Tally>) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let series = Series::fetch(client).await;
        let mut tally = lock(tally);
        match series {
            Ok(series) => {
                tally.running_max = tally.running_max.max(series.running());
                tally.waiting_max = tally.waiting_max.max(series.waiting());
                tally.kv_max = tally.kv_max.max(series.kv_usage());
            }
            Err(failure) => {
                tally.faults.lost += 1;
                tally.faults.show(format!("/metrics: {failure}"));
            }
        }
    }
}

fn report(plan: &Plan, tally: &mut Tally, elapsed: Duration, before: &Series, after: &Series) -> bool {
    let seconds = elapsed.as_secs_f64();
    let rate = tally.tokens as f64 / seconds;
    println!(
        "{} streams, {} requests, {} tokens in {seconds:.1} s: {rate:.1} tokens/s, {:.2} requests/s",
        plan.streams,
        tally.requests,
        tally.tokens,
        tally.requests as f64 / seconds
    );
    Durations::head();
    let first = tally.first.row("time to first token");
    let gaps = tally.gaps.row("between tokens");
    let total = tally.total.row("whole request");
    let preemptions = after.sum("moe_preemptions_total") - before.sum("moe_preemptions_total");
    println!(
        "server: at most {} running, {} waiting, {:.0} % of the KV blocks; {preemptions} preemptions",
        tally.running_max,
        tally.waiting_max,
        tally.kv_max * 100.0
    );
    let Faults { lost, corrupted, different, .. } = tally.faults;
    println!("{lost} lost, {corrupted} corrupted, {different} different, {} refused with 429", tally.refused);
    let none = lost + corrupted == 0 && tally.requests > 0;
    let passed = none && (plan.allow_different || different == 0) && after.idle();
    println!("{}", if passed { "passed" } else { "FAILED" });
    let rss = plan.pid.and_then(|pid| Process::read(pid).ok()).map(|p| round(p.rss_mib));
    let document = json!({
        "mode": "load", "passed": passed, "streams": plan.streams, "seconds": round(seconds), "requests": tally.requests,
        "tokens": tally.tokens, "tokens_per_second": round(rate), "lost": lost, "corrupted": corrupted,
        "different": different, "refused": tally.refused, "time_to_first_token": first, "between_tokens": gaps,
        "whole_request": total, "running_max": tally.running_max, "waiting_max": tally.waiting_max,
        "kv_usage_max": round(tally.kv_max), "preemptions": preemptions, "idle_after": after.idle(), "rss_mib": rss,
    });
    println!("{document}");
    passed
}
