//! Routers that look at the whole batch, through the engine: whom they look at, what they share, what they read.
//! `cargo test --test it batch_aware -- --nocapture` prints the README's table of experts read.

use crate::support::{Series, engine, repo};
use moe_serve::engine::api::{Event, Events, Generate};
use moe_serve::engine::{Engine, EngineConfig, KvSize, RequestRouters};
use moe_serve::types::{DtypeChoice, FinishReason, GenerateRequest, SamplingParams, Usage};

fn bundled(router: &str, config: EngineConfig) -> Engine {
    let config = EngineConfig { request_routers: Some(RequestRouters::default()), ..config };
    engine(&repo("models/stories"), DtypeChoice::Auto, router, config)
}

/// `n` requests for `tokens` tokens each, drawn at temperature 1 with their own seeds.
fn requests(engine: &Engine, n: usize, tokens: usize) -> Vec<GenerateRequest> {
    let text = std::fs::read_to_string(repo("eval/prompts.jsonl")).unwrap();
    let prompts: Vec<Vec<u32>> = text
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .map(|prompt| engine.encode(prompt["prompt"].as_str().unwrap(), true).unwrap())
        .collect();
    let one = |i: usize| GenerateRequest {
        ignore_eos: true,
        sampling: SamplingParams { seed: Some(i as u64), ..Default::default() },
        ..GenerateRequest::greedy(prompts[i % prompts.len()].clone(), tokens)
    };
    (0..n).map(one).collect()
}

fn salted(requests: &[GenerateRequest], salt: impl Fn(usize) -> String) -> Vec<GenerateRequest> {
    requests.iter().enumerate().map(|(i, r)| GenerateRequest { cache_salt: salt(i), ..r.clone() }).collect()
}

fn run_together(engine: &Engine, requests: &[GenerateRequest]) -> Vec<(String, FinishReason, Usage)> {
    let events: Vec<Events> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    events.into_iter().map(|e| e.wait().unwrap()).collect()
}

fn run_alone(engine: &Engine, requests: &[GenerateRequest]) -> Vec<(String, FinishReason, Usage)> {
    requests.iter().map(|r| engine.submit(r.clone()).unwrap().wait().unwrap()).collect()
}

#[test]
fn tenants_get_what_they_get_alone_and_one_tenants_requests_look_at_one_another() {
    for router in ["oea:1", "xbudget:2"] {
        let engine = bundled(router, EngineConfig::default());
        let requests = requests(&engine, 2, 150);
        let alone = run_alone(&engine, &requests);
        let different = run_together(&engine, &salted(&requests, |i| format!("tenant {i}")));
        assert_eq!(different, alone, "{router}: another tenant in the batch was seen");
        let same = run_together(&engine, &salted(&requests, |_| "one".into()));
        assert_ne!(same, alone, "{router}: the two were never in one step, or did not look at one another");
    }
}

#[test]
fn alone_oea_is_static_in_decoding_and_native_in_the_prompt() {
    let engine = bundled("oea:1", EngineConfig::default());
    let request = requests(&engine, 1, 20).remove(0);
    let prompt = request.prompt.len() as u64;
    let work = engine.submit(request).unwrap().wait().unwrap().2.work;
    // Two experts of the native two for the prompt, one for each of the 19 tokens that were computed after it.
    assert_eq!(work.expert_rows, 6 * (2 * prompt + 19));
}

#[test]
fn who_asks_for_no_such_router_is_not_touched_by_those_who_do() {
    let engine = bundled("native", EngineConfig { prefix_cache: false, ..Default::default() });
    let plain = requests(&engine, 12, 40);
    let alone = run_alone(&engine, &plain);
    let routers = ["oea:1", "native", "xbudget:1", "dynk:0.7"];
    let mixed: Vec<_> = plain
        .iter()
        .enumerate()
        .map(|(i, r)| GenerateRequest { router: Some(routers[i % 4].parse().unwrap()), ..r.clone() })
        .collect();
    let dynk_alone = run_alone(&engine, &mixed[3..4]);
    let together = run_together(&engine, &mixed);
    for i in (1..12).step_by(4) {
        assert_eq!(together[i], alone[i], "request {i}");
    }
    assert_eq!(together[3], dynk_alone[0]);
}

#[test]
fn nothing_of_theirs_is_in_the_prefix_cache_and_nothing_in_it_is_theirs() {
    let engine = bundled("native", EngineConfig::default());
    let text = "Once upon a time there was a king who had three sons and a garden full of golden apples. ".repeat(3);
    let prompt = engine.encode(&text, true).unwrap();
    let cached = |router: &str| {
        let request =
            GenerateRequest { router: Some(router.parse().unwrap()), ..GenerateRequest::greedy(prompt.clone(), 4) };
        engine.submit(request).unwrap().wait().unwrap().2.cached_tokens
    };
    for router in ["oea:1", "xbudget:2", "oea:1,scope=all"] {
        assert_eq!((cached(router), cached(router)), (0, 0), "{router}");
    }
    assert_eq!(cached("native"), 0);
    assert!(cached("native") >= 16, "the cache is on");
    assert_eq!((cached("oea:1"), cached("xbudget:2")), (0, 0));
}

#[test]
fn forks_and_preemptions_end_as_they_should() {
    let block_bytes = 2 * 6 * 16 * 2 * 32 * 2;
    let kv_size = Some(KvSize::Bytes(12 * block_bytes));
    let engine = bundled("oea:1", EngineConfig { kv_size, max_batched_tokens: 64, ..Default::default() });
    let requests: Vec<_> = requests(&engine, 8, 60).into_iter().map(|r| GenerateRequest { n: 3, ..r }).collect();
    let events: Vec<Events> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    for mut events in events {
        let ends: Vec<_> = std::iter::from_fn(|| events.blocking_next())
            .filter_map(|event| match event {
                Event::Done { reason, usage, .. } => Some((reason, usage.completion_tokens)),
                Event::Failed(error) => panic!("{error}"),
                _ => None,
            })
            .collect();
        assert_eq!(ends, [(FinishReason::Length, 60); 3]);
    }
    engine.stop();
    let series = Series::read(&engine.metrics());
    assert!(series.sum("moe_preemptions_total", &[]) > 0.0, "nothing was preempted: the test proves nothing");
    assert_eq!(series.sum("moe_kv_cache_usage_ratio", &[]), 0.0);
}

/// Distinct experts read per step and layer, and the bytes saved of native routing's, over `batch` requests together.
fn reads(router: &str, batch: usize) -> (f64, f64) {
    let engine = bundled(router, EngineConfig { prefix_cache: false, ..Default::default() });
    run_together(&engine, &requests(&engine, batch, 32));
    engine.stop();
    let series = Series::read(&engine.metrics());
    let sum = |name: &str| series.sum(name, &[]);
    let per_step = sum("moe_unique_experts_per_step_sum") / sum("moe_unique_experts_per_step_count") / 6.0;
    (per_step, 1.0 - sum("moe_expert_read_bytes_total") / sum("moe_expert_read_bytes_native_total"))
}

#[test]
fn fewer_experts_are_read_in_a_batch() {
    println!("| batch | `native` reads | `oea:1` reads | bytes saved | `xbudget:4` reads | bytes saved |");
    println!("|---|---|---|---|---|---|");
    for batch in [1, 4, 8, 16, 64] {
        let (native, zero) = reads("native", batch);
        let (oea, oea_saved) = reads("oea:1", batch);
        let (budget, budget_saved) = reads("xbudget:4", batch);
        println!(
            "| {batch} | {native:.2} | {oea:.2} | {:.0} % | {budget:.2} | {:.0} % |",
            100.0 * oea_saved,
            100.0 * budget_saved
        );
        assert_eq!(zero, 0.0);
        if batch == 8 {
            assert!(oea < native && oea_saved > 0.0, "{oea} of {native}");
            assert!(budget < native && budget_saved > 0.0, "{budget} of {native}");
        }
    }
}
