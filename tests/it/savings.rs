//! What each router saves on the prompts of `eval/prompts.jsonl`. Prints the README's table:
//! `cargo test --test it savings -- --nocapture`.

use crate::support::{engine, repo};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, RequestRouters};
use moe_serve::types::{DtypeChoice, GenerateRequest, Work};

#[test]
fn savings_on_the_bundled_checkpoint_are_what_the_rules_promise() {
    let request_routers = Some(RequestRouters { experts_max: Some(8), ..Default::default() });
    let config = EngineConfig { request_routers, prefix_cache: false, ..Default::default() };
    let engine = engine(&repo("models/stories"), DtypeChoice::Auto, "native", config);
    let prompts: Vec<String> = std::fs::read_to_string(repo("eval/prompts.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["prompt"].as_str().unwrap().to_string())
        .collect();
    assert!(prompts.len() >= 10);

    let run = |router: &str| -> Work {
        let submit = |prompt: &String| {
            let mut request = GenerateRequest::greedy(engine.encode(prompt, true).unwrap(), 48);
            (request.ignore_eos, request.router) = (true, Some(router.parse().unwrap()));
            engine.submit(request).unwrap()
        };
        let events: Vec<_> = prompts.iter().map(submit).collect();
        let mut total = Work::default();
        events.into_iter().for_each(|e| total += e.wait().unwrap().2.work);
        println!(
            "| `{router}` | {:.2} | {:+.1} % | {:+.1} % |",
            total.experts_per_token(),
            100.0 * total.experts.saved(),
            100.0 * total.forward.saved()
        );
        total
    };
    println!("| router | experts per token | expert FLOPs saved | forward FLOPs saved |\n|---|---|---|---|");
    assert_eq!(run("native").experts.saved(), 0.0);
    assert_eq!(run("topk:1").experts.saved(), 0.5);
    let dynk: Vec<f64> = ["dynk:0.65", "dynk:0.8", "dynk:0.95"].map(|r| run(r).experts.saved()).to_vec();
    assert!(dynk.iter().all(|s| (0.0..=0.5).contains(s)), "mass=native never costs: {dynk:?}");
    assert!(run("dynk:0.9,mass=full").experts.saved() < 0.0, "the literal rule costs on this checkpoint");
    assert!((0.0..=0.5).contains(&run("ratio:0.5").experts.saved()));
    assert!((0.0..=0.5).contains(&run("threshold:0.2").experts.saved()));
}
