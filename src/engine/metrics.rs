//! The Prometheus series of one engine, under our names and the `vllm:` names that routers and autoscalers read.
//!
//! Everything is counted from values that are on the host anyway; nothing waits for a device.

use super::budget::BudgetReport;
use crate::moe::StepTrace;
use crate::moe::cost::ExpertReads;
use crate::ops::profile::Profile;
use crate::types::{FinishReason, ModelShape, Usage, Work};
use prometheus::core::{Atomic, GenericCounterVec, GenericGaugeVec};
use prometheus::{
    Counter, CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};
use std::time::Duration;

/// Upper bounds of latency buckets, in seconds.
const LATENCY_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// How completions end.
const FINISHED: [&str; 4] = ["stop", "length", "abort", "error"];
/// Why requests are not queued.
const REJECTED: [&str; 3] = ["queue_full", "grammar_busy", "stopping"];

/// Series of the engine. Cloning is cheap and shares them.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    moe: MoeSeries,
    waiting: [IntGauge; 2],
    running: [IntGauge; 2],
    kv_usage: [Gauge; 3],
    preemptions: [IntCounter; 2],
    prompt_tokens: [IntCounter; 2],
    generation_tokens: [IntCounter; 2],
    /// Looked up, and found.
    prefix: [[IntCounter; 3]; 2],
    first_token: [Histogram; 2],
    inter_token: [Histogram; 2],
    latency: [Histogram; 2],
    queue_time: [Histogram; 2],
    requests: [IntCounterVec; 2],
    rejected: IntCounterVec,
    step_seconds: Histogram,
    step_parts: CounterVec,
    step_tokens: Histogram,
    budget: GaugeVec,
}

/// What routing did.
#[derive(Clone)]
struct MoeSeries {
    experts_per_token: Histogram,
    expert_tokens: IntCounterVec,
    flops: CounterVec,
    flops_native: CounterVec,
    flops_saved: GaugeVec,
    unique_experts: Histogram,
    expert_bytes: Counter,
    expert_bytes_native: Counter,
    router_entropy: GaugeVec,
}

/// Names of the expert counter's series, made once: layer and expert as text.
pub(super) struct ExpertSeries(Vec<IntCounter>);

/// Makes series and registers them under one or several names; names are constants, so failures are bugs.
struct Maker<'a> {
    registry: &'a Registry,
    model: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        let opts = Opts::new(name, help);
        // vLLM's series carry the model's name; dashboards filter by it.
        if name.starts_with("vllm:") { opts.const_label("model_name", self.model) } else { opts }
    }

    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("the series' name and labels are valid");
        self.registry.register(Box::new(collector.clone())).expect("the series' name is unique");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(self.opts(name, help)))
    }

    fn float_counter(&self, name: &str, help: &str) -> Counter {
        self.register(Counter::with_opts(self.opts(name, help)))
    }

    fn counters<P: Atomic + 'static>(&self, name: &str, help: &str, labels: &[&str]) -> GenericCounterVec<P> {
        self.register(GenericCounterVec::new(self.opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(self.opts(name, help)))
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(self.opts(name, help)))
    }

    fn gauges<P: Atomic + 'static>(&self, name: &str, help: &str, labels: &[&str]) -> GenericGaugeVec<P> {
        self.register(GenericGaugeVec::new(self.opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts { common_opts: self.opts(name, help), buckets: buckets.to_vec() };
        self.register(Histogram::with_opts(opts))
    }
}

impl Metrics {
    /// Series of a model called `model`, with `blocks` KV blocks of `block_size` positions.
    pub fn new(model: &str, shape: &ModelShape, blocks: usize, block_size: usize) -> Self {
        let registry = Registry::new();
        let m = Maker { registry: &registry, model };
        let info = m.gauges::<prometheus::core::AtomicI64>(
            "vllm:cache_config_info",
            "KV cache configuration; the value is always 1",
            &["block_size", "num_gpu_blocks"],
        );
        info.with_label_values(&[block_size.to_string(), blocks.to_string()]).set(1);
        let kv = "Share of KV cache blocks in use, 0 to 1";
        let ttft = "Seconds from arrival to the first token";
        let itl = "Seconds between tokens of one request";
        let e2e = "Seconds from arrival to the end of a request";
        let queue = "Seconds a request waited for admission";
        let ended = "Completions that ended, by reason";
        let latency = |names: [&str; 2], help: &str| names.map(|n| m.histogram(n, help, LATENCY_BUCKETS));
        let series = Self {
            moe: MoeSeries::new(&m, shape),
            waiting: ["moe_requests_waiting", "vllm:num_requests_waiting"]
                .map(|n| m.int_gauge(n, "Requests waiting for admission")),
            running: ["moe_requests_running", "vllm:num_requests_running"]
                .map(|n| m.int_gauge(n, "Requests in the running batch")),
            kv_usage: ["moe_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]
                .map(|n| m.gauge(n, kv)),
            preemptions: ["moe_preemptions_total", "vllm:num_preemptions_total"]
                .map(|n| m.counter(n, "Sequences that lost their KV blocks and were recomputed")),
            prompt_tokens: ["moe_prompt_tokens_total", "vllm:prompt_tokens_total"]
                .map(|n| m.counter(n, "Prompt tokens of finished requests")),
            generation_tokens: ["moe_generation_tokens_total", "vllm:generation_tokens_total"]
                .map(|n| m.counter(n, "Tokens generated")),
            prefix: [
                ("queries_total", "Prompt tokens looked up in the prefix cache"),
                ("hits_total", "Prompt tokens found in the prefix cache"),
            ]
            .map(|(what, help)| {
                ["moe_prefix_cache", "vllm:prefix_cache", "vllm:gpu_prefix_cache"]
                    .map(|n| m.counter(&format!("{n}_{what}"), help))
            }),
            first_token: latency(["moe_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"], ttft),
            inter_token: latency(["moe_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"], itl),
            latency: latency(["moe_request_latency_seconds", "vllm:e2e_request_latency_seconds"], e2e),
            queue_time: latency(["moe_request_queue_seconds", "vllm:request_queue_time_seconds"], queue),
            requests: [
                m.counters("moe_requests_total", ended, &["finished_reason"]),
                m.counters("vllm:request_success_total", ended, &["finished_reason"]),
            ],
            rejected: m.counters(
                "moe_requests_rejected_total",
                "Valid requests that were not queued, by reason",
                &["reason"],
            ),
            step_seconds: m.histogram("moe_step_seconds", "Seconds of one engine step", LATENCY_BUCKETS),
            step_parts: m.counters(
                "moe_step_part_seconds_total",
                "Seconds of the parts of steps, where these are profiled",
                &["part", "layer"],
            ),
            step_tokens: m.histogram(
                "moe_step_tokens",
                "Tokens computed in one engine step",
                &powers_of_two(1, 8192).collect::<Vec<_>>(),
            ),
            budget: m.gauges(
                "moe_budget",
                "A router that keeps a budget: its target, the share of native FLOPs last measured, the calibrated share of the \
                 policy in force, its version, and 1 where load is shed",
                &["what"],
            ),
            registry,
        };
        // From zero on: a rate over a series that begins at one misses the one.
        for reason in FINISHED {
            series.requests.iter().for_each(|c| drop(c.with_label_values(&[reason])));
        }
        REJECTED.iter().for_each(|reason| drop(series.rejected.with_label_values(&[reason])));
        series
    }

    /// All series in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut out = Vec::new();
        // Writing to memory cannot fail, and the encoder writes UTF-8.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        String::from_utf8(out).unwrap_or_default()
    }

    pub(super) fn expert_series(&self, shape: &ModelShape) -> ExpertSeries {
        let pairs = (0..shape.moe.layers).flat_map(|l| (0..shape.moe.experts).map(move |e| (l, e)));
        ExpertSeries(
            pairs.map(|(l, e)| self.moe.expert_tokens.with_label_values(&[l.to_string(), e.to_string()])).collect(),
        )
    }

    pub(super) fn routed(&self, trace: &StepTrace, work: &Work, reads: &ExpertReads, experts: &ExpertSeries) {
        self.moe.routed(trace, work, reads, experts);
        self.step_tokens.observe(work.tokens as f64);
    }

    pub(super) fn step(&self, took: Duration) {
        self.step_seconds.observe(took.as_secs_f64());
    }

    /// Counts where the time of a step went.
    pub fn profiled(&self, profile: &Profile) {
        for ((part, layer), time) in &profile.parts {
            self.step_parts.with_label_values(&[part.name(), &layer.to_string()]).inc_by(time.as_secs_f64());
        }
    }

    pub(super) fn load(&self, waiting: usize, running: usize, (used, blocks): (usize, usize)) {
        self.waiting.iter().for_each(|g| g.set(waiting as i64));
        self.running.iter().for_each(|g| g.set(running as i64));
        self.kv_usage.iter().for_each(|g| g.set(used as f64 / blocks.max(1) as f64));
    }

    /// Shows the state of a budget; servers without one have no such series.
    pub(super) fn budget(&self, report: &BudgetReport) {
        let BudgetReport { target, measured, share, version, shed } = *report;
        let set = |what: &str, value: f64| self.budget.with_label_values(&[what]).set(value);
        set("target", target);
        set("policy", share);
        set("version", version as f64);
        set("shed", f64::from(u8::from(shed)));
        if let Some(measured) = measured {
            set("measured", measured);
        }
    }

    pub(super) fn preempted(&self, count: usize) {
        self.preemptions.iter().for_each(|c| c.inc_by(count as u64));
    }

    pub(super) fn admitted(&self, waited: Duration) {
        self.queue_time.iter().for_each(|h| h.observe(waited.as_secs_f64()));
    }

    pub(super) fn prefix_looked_up(&self, tokens: usize, found: usize) {
        for (series, count) in self.prefix.iter().zip([tokens, found]) {
            series.iter().for_each(|c| c.inc_by(count as u64));
        }
    }

    pub(super) fn first_token(&self, since_arrival: Duration) {
        self.first_token.iter().for_each(|h| h.observe(since_arrival.as_secs_f64()));
        self.generation_tokens.iter().for_each(IntCounter::inc);
    }

    pub(super) fn next_token(&self, since_last: Duration) {
        self.inter_token.iter().for_each(|h| h.observe(since_last.as_secs_f64()));
        self.generation_tokens.iter().for_each(IntCounter::inc);
    }

    pub(super) fn finished(&self, reason: FinishReason, usage: &Usage, since_arrival: Duration) {
        self.ended(reason.as_str());
        self.prompt_tokens.iter().for_each(|c| c.inc_by(usage.prompt_tokens as u64));
        self.latency.iter().for_each(|h| h.observe(since_arrival.as_secs_f64()));
    }

    /// A request that ended without an answer in full: `abort` or `error`.
    pub(super) fn ended(&self, reason: &str) {
        self.requests.iter().for_each(|c| c.with_label_values(&[reason]).inc());
    }

    pub(super) fn rejected(&self, reason: &str) {
        self.rejected.with_label_values(&[reason]).inc();
    }
}

impl MoeSeries {
    fn new(m: &Maker<'_>, shape: &ModelShape) -> Self {
        let (experts, layers) = (shape.moe.experts, shape.moe.layers);
        let by_k: Vec<f64> = (1..=experts.min(16)).map(|k| k as f64).chain(powers_of_two(32, experts)).collect();
        let by_pairs: Vec<f64> = powers_of_two(1, (layers * experts).max(1)).collect();
        Self {
            experts_per_token: m.histogram("moe_experts_per_token", "Experts used by a token in one MoE layer", &by_k),
            expert_tokens: m.counters(
                "moe_expert_tokens_total",
                "Tokens computed by each expert",
                &["layer", "expert"],
            ),
            flops: m.counters(
                "moe_flops_total",
                "FLOPs that ran, by scope: experts, or all matrix products (forward)",
                &["scope"],
            ),
            flops_native: m.counters(
                "moe_flops_native_total",
                "FLOPs that native routing of the same tokens would have run",
                &["scope"],
            ),
            flops_saved: m.gauges(
                "moe_flops_saved_ratio",
                "1 - moe_flops_total / moe_flops_native_total; below 0 is a cost",
                &["scope"],
            ),
            unique_experts: m.histogram(
                "moe_unique_experts_per_step",
                "(layer, expert) pairs whose weights a step read",
                &by_pairs,
            ),
            expert_bytes: m
                .float_counter("moe_expert_read_bytes_total", "Bytes of unique expert weights read, summed over steps"),
            expert_bytes_native: m
                .float_counter("moe_expert_read_bytes_native_total", "The same for native routing of the same tokens"),
            router_entropy: m.gauges(
                "moe_router_entropy",
                "Mean entropy of the gate in the last step over log E, 0 to 1",
                &["layer"],
            ),
        }
    }

    fn routed(&self, trace: &StepTrace, work: &Work, reads: &ExpertReads, experts: &ExpertSeries) {
        for (k, count) in trace.k_histogram.iter().enumerate() {
            observe_n(&self.experts_per_token, k as f64, *count);
        }
        for (series, count) in experts.0.iter().zip(&trace.expert_tokens) {
            series.inc_by(*count);
        }
        for (scope, flops) in [("experts", work.experts), ("forward", work.forward)] {
            let (ran, native) = (self.flops.with_label_values(&[scope]), self.flops_native.with_label_values(&[scope]));
            ran.inc_by(flops.ran as f64);
            native.inc_by(flops.native as f64);
            // A model without mixtures never runs an expert.
            let saved = if native.get() > 0.0 { 1.0 - ran.get() / native.get() } else { 0.0 };
            self.flops_saved.with_label_values(&[scope]).set(saved);
        }
        self.unique_experts.observe(reads.ran as f64);
        self.expert_bytes.inc_by(reads.bytes_ran as f64);
        self.expert_bytes_native.inc_by(reads.bytes_native as f64);
        for (layer, entropy) in trace.entropy_l.iter().enumerate() {
            self.router_entropy.with_label_values(&[layer.to_string()]).set(*entropy);
        }
    }
}

/// `low`, 2·`low`, … below `end`, then `end`.
fn powers_of_two(low: usize, end: usize) -> impl Iterator<Item = f64> {
    let doubling = std::iter::successors((low < end).then_some(low), move |n| Some(n * 2).filter(|n| *n < end));
    doubling.chain((low <= end).then_some(end)).map(|n| n as f64)
}

/// Observes `value` `count` times at the price of a few additions instead of `count` locks.
fn observe_n(histogram: &Histogram, value: f64, count: u64) {
    let local = histogram.local();
    for _ in 0..count {
        local.observe(value);
    }
}
