//! `/metrics`: the names others read, and totals that agree with what answers say.

use crate::support::{Series, Server, ServerOptions};
use moe_serve::wire::UsageBody;
use serde_json::json;

const LAYERS: usize = 6;
const EXPERTS: usize = 8;

/// A total over all its labels.
fn total(series: &Series, name: &str) -> f64 {
    series.sum(name, &[])
}

/// (token, layer) pairs that passed the experts: all but the last token of each completion pass the model.
fn visits(usage: &UsageBody, requests: usize) -> f64 {
    ((usage.total_tokens - requests) * LAYERS) as f64
}

async fn ask(server: &Server) -> UsageBody {
    let prompts = ["Once upon a time", "The cat and the dog went to"];
    server.complete(json!({"prompt": prompts, "max_tokens": 12, "seed": 3, "ignore_eos": true})).await.usage
}

#[tokio::test]
async fn every_promised_series_is_there_with_its_type_after_one_request() {
    let server = Server::native();
    ask(&server).await;
    server.series_when("counted", |s| total(s, "moe_step_tokens_count") >= 12.0).await;
    let response = server.get("/metrics").await;
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    for (name, kind) in [
        ("moe_experts_per_token", "histogram"),
        ("moe_expert_tokens_total", "counter"),
        ("moe_flops_total", "counter"),
        ("moe_flops_native_total", "counter"),
        ("moe_flops_saved_ratio", "gauge"),
        ("moe_unique_experts_per_step", "histogram"),
        ("moe_router_entropy", "gauge"),
        ("vllm:num_requests_waiting", "gauge"),
        ("vllm:num_requests_running", "gauge"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:gpu_cache_usage_perc", "gauge"),
        ("vllm:cache_config_info", "gauge"),
        ("vllm:num_preemptions_total", "counter"),
        ("vllm:time_to_first_token_seconds", "histogram"),
        ("vllm:inter_token_latency_seconds", "histogram"),
        ("vllm:e2e_request_latency_seconds", "histogram"),
        ("vllm:request_queue_time_seconds", "histogram"),
        ("vllm:prompt_tokens_total", "counter"),
        ("vllm:generation_tokens_total", "counter"),
        ("vllm:request_success_total", "counter"),
    ] {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind} in\n{text}");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
        let series = Series::read(&text);
        let of = if kind == "histogram" { format!("{name}_count") } else { name.to_string() };
        assert!(series.count(&of) > 0, "{name} has no series");
        if name.starts_with("vllm:") {
            assert!(series.labels(&of).iter().all(|l| l.contains("model_name=\"stories\"")), "{name} names no model");
        }
    }
}

#[tokio::test]
async fn series_have_a_label_for_every_layer_expert_and_scope() {
    let server = Server::native();
    ask(&server).await;
    let series = server.series_when("counted", |s| total(s, "moe_step_tokens_count") >= 12.0).await;
    assert_eq!(series.count("moe_expert_tokens_total"), LAYERS * EXPERTS);
    for (layer, expert) in (0..LAYERS).flat_map(|l| (0..EXPERTS).map(move |e| (l, e))) {
        let labels = series.labels("moe_expert_tokens_total");
        assert!(labels.contains(&format!("{{expert=\"{expert}\",layer=\"{layer}\"}}").as_str()), "{labels:?}");
    }
    for name in ["moe_flops_total", "moe_flops_native_total", "moe_flops_saved_ratio"] {
        assert_eq!(series.labels(name), ["{scope=\"experts\"}", "{scope=\"forward\"}"], "{name}");
    }
    for layer in 0..LAYERS {
        let entropy = series.sum("moe_router_entropy", &[&format!("layer=\"{layer}\"")]);
        assert!(entropy > 0.0 && entropy <= 1.0, "entropy of layer {layer} is {entropy}");
    }
    let info = series.labels("vllm:cache_config_info");
    assert!(
        info.len() == 1 && info[0].contains("block_size=\"16\"") && info[0].contains("num_gpu_blocks="),
        "{info:?}"
    );
    assert_eq!(total(&series, "vllm:cache_config_info"), 1.0);
}

#[tokio::test]
async fn totals_grow_by_what_the_usage_of_answers_says() {
    for router in ["native", "dynk:0.8", "topk:4"] {
        let server = Server::start(ServerOptions { router, ..Default::default() });
        ask(&server).await;
        let first_visits = |s: &Series| total(s, "moe_experts_per_token_count");
        let before = server.series_when("idle", |s| total(s, "vllm:num_requests_running") == 0.0).await;
        let usage = ask(&server).await;
        let visits = visits(&usage, 2);
        let after = server.series_when("counted", |s| first_visits(s) - first_visits(&before) >= visits).await;
        let grew = |name: &str, labels: &[&str]| after.sum(name, labels) - before.sum(name, labels);

        assert_eq!(grew("moe_experts_per_token_count", &[]), visits, "{router}");
        assert_eq!(grew("vllm:prompt_tokens_total", &[]), usage.prompt_tokens as f64, "{router}");
        assert_eq!(grew("vllm:generation_tokens_total", &[]), usage.completion_tokens as f64, "{router}");
        assert_eq!(grew("vllm:request_success_total", &["finished_reason=\"length\""]), 2.0, "{router}");
        assert_eq!(grew("vllm:time_to_first_token_seconds_count", &[]), 2.0, "{router}");
        assert_eq!(
            grew("vllm:inter_token_latency_seconds_count", &[]),
            (usage.completion_tokens - 2) as f64,
            "{router}"
        );
        assert_eq!(grew("vllm:e2e_request_latency_seconds_count", &[]), 2.0, "{router}");
        for name in ["prompt_tokens_total", "generation_tokens_total"] {
            assert_eq!(grew(&format!("moe_{name}"), &[]), grew(&format!("vllm:{name}"), &[]), "{router}: {name}");
        }

        let rows = grew("moe_expert_tokens_total", &[]);
        assert_eq!(rows, grew("moe_experts_per_token_sum", &[]), "{router}: rows counted by expert and by token");
        assert!((rows / visits - usage.moe.experts_per_token).abs() < 1e-12, "{router}: {rows} rows, {usage:?}");
        for (scope, saved) in [("experts", usage.moe.expert_flops_saved), ("forward", usage.moe.forward_flops_saved)] {
            let label = format!("scope=\"{scope}\"");
            let (ran, native) = (grew("moe_flops_total", &[&label]), grew("moe_flops_native_total", &[&label]));
            assert!((1.0 - ran / native - saved).abs() < 1e-12, "{router}, {scope}: {ran} of {native} ran, {usage:?}");
        }
    }
}

#[tokio::test]
async fn the_saved_ratio_is_that_of_the_totals_and_negative_for_a_cost() {
    for (router, want) in [("native", 0.0), ("topk:1", 0.5), ("topk:4", -1.0)] {
        let server = Server::start(ServerOptions { router, ..Default::default() });
        ask(&server).await;
        let series = server.series_when("idle", |s| total(s, "vllm:num_requests_running") == 0.0).await;
        assert_eq!(series.sum("moe_flops_saved_ratio", &["scope=\"experts\""]), want, "{router}");
        let forward = ["scope=\"forward\""];
        let ratio = 1.0 - series.sum("moe_flops_total", &forward) / series.sum("moe_flops_native_total", &forward);
        assert_eq!(series.sum("moe_flops_saved_ratio", &forward), ratio, "{router}");
    }
}
