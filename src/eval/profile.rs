//! What a workload costs: FLOPs beside native routing's, bytes of experts, and where the time of the steps goes.
//!
//! The profiler itself is [`crate::ops::profile`], a guard around any forward pass.

use super::in_process::InProcess;
use super::lm::{Lm, LmError, Reads, Routed, series};
use super::results::Saved;
use crate::engine::api::Generate;
use crate::engine::{Engine, Text};
use crate::ops::profile::Part;
use crate::types::{ModelShape, RouterSpec, TokenId};
use serde::Serialize;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Prompts to run.
#[derive(Clone, Debug)]
pub struct Workload {
    pub prompts: Vec<String>,
    /// Tokens generated after each prompt; end tokens do not end it.
    pub max_tokens: usize,
    /// Prompts that run at the same time.
    pub batch_size: usize,
    pub router: RouterSpec,
}

/// What a workload came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProfileReport {
    pub router: String,
    pub prompts: usize,
    pub batch_size: usize,
    /// Tokens that passed the model: of prompts, and generated ones but the last of each.
    pub tokens: u64,
    pub steps: u64,
    /// Wall time of the workload.
    pub seconds: f64,
    /// Of which the engine was in steps.
    pub step_seconds: f64,
    /// Experts per token and MoE layer.
    pub mean_k: f64,
    /// Scope `experts`.
    pub expert_flops: Saved,
    /// Scope `forward`.
    pub forward_flops: Saved,
    /// Bytes of unique expert weights, summed over steps.
    pub expert_bytes: Option<Saved>,
    /// (layer, expert) pairs read per step.
    pub unique_experts_per_step: f64,
    pub parts: Vec<PartTime>,
    pub layers: Vec<LayerProfile>,
}

/// Time of a part of the steps, all layers together. What is left of the steps is scheduling and copying.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartTime {
    pub part: String,
    pub seconds: f64,
    /// Of the time in steps.
    pub share: f64,
}

/// One mixture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerProfile {
    /// Counted among the MoE layers.
    pub layer: usize,
    pub mean_k: f64,
    pub expert_flops: Saved,
    pub routing_seconds: f64,
    pub experts_seconds: f64,
}

/// Runs `workload` on an engine that was started with `EngineConfig::profile`, and serves nothing else.
///
/// # Errors
/// A prompt that does not fit, or a failure of the engine.
pub fn profile(
    engine: Arc<Engine>,
    text: Text,
    shape: &ModelShape,
    workload: &Workload,
) -> Result<ProfileReport, LmError> {
    let lm = InProcess::new(engine.clone(), text, shape);
    let prompts = workload.prompts.iter().map(|p| lm.encode(p));
    let prompts: Vec<Vec<TokenId>> = prompts.collect::<Result<_, _>>()?;
    let before = engine.metrics();
    let started = Instant::now();
    let routed = run(&lm, &prompts, workload)?;
    let seconds = started.elapsed().as_secs_f64();
    let after = engine.metrics();
    // A part that a model does not have has no series.
    let value = |metrics: &str, name: &str| series(metrics, name).unwrap_or(0.0);
    let grown = |name: &str| value(&after, name) - value(&before, name);
    let steps = grown("moe_step_seconds_count");
    let step_seconds = grown("moe_step_seconds_sum");
    let part_seconds =
        |part: &str, layer: usize| grown(&format!("moe_step_part_seconds_total{{layer=\"{layer}\",part=\"{part}\"}}"));
    let layers = shape.layers.len();
    let part = |part: &Part| {
        let seconds: f64 = (0..layers).map(|layer| part_seconds(part.name(), layer)).sum();
        PartTime { part: part.name().into(), seconds, share: seconds / step_seconds.max(f64::MIN_POSITIVE) }
    };
    let rows: u64 = routed.rows_l.iter().sum();
    let price = routed.expert_flops[0] / rows.max(1);
    let layer = |(layer, rows): (usize, &u64)| LayerProfile {
        layer,
        mean_k: *rows as f64 / routed.tokens.max(1) as f64,
        expert_flops: Saved::of([rows * price, routed.tokens * shape.moe.top_k as u64 * price]),
        routing_seconds: part_seconds("routing", layer),
        experts_seconds: part_seconds("experts", layer),
    };
    let reads = Reads::parse(&after).zip(Reads::parse(&before));
    let reads = reads.map(|(now, then)| Saved::of([(now.ran - then.ran) as u64, (now.native - then.native) as u64]));
    Ok(ProfileReport {
        router: workload.router.to_string(),
        prompts: prompts.len(),
        batch_size: workload.batch_size,
        tokens: routed.tokens,
        steps: steps as u64,
        seconds,
        step_seconds,
        mean_k: routed.mean_k(),
        expert_flops: Saved::of(routed.expert_flops),
        forward_flops: Saved::of(routed.forward_flops),
        expert_bytes: reads,
        unique_experts_per_step: grown("moe_unique_experts_per_step_sum") / steps.max(1.0),
        parts: Part::ALL.iter().map(part).collect(),
        layers: routed.rows_l.iter().enumerate().map(layer).collect(),
    })
}

/// Runs all prompts, `batch_size` at a time, and adds up what routing did.
fn run(lm: &InProcess, prompts: &[Vec<TokenId>], workload: &Workload) -> Result<Routed, LmError> {
    let next = AtomicUsize::new(0);
    let sum = Mutex::new(Ok(Routed::default()));
    std::thread::scope(|scope| {
        for _ in 0..workload.batch_size.min(prompts.len()) {
            scope.spawn(|| {
                while let Some(prompt) = prompts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = lm.run(prompt, workload.max_tokens, &workload.router);
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    match (&mut *sum, one) {
                        (Ok(sum), Ok(one)) => sum.add(&one),
                        (Ok(_), Err(error)) => *sum = Err(error),
                        (Err(_), _) => return,
                    }
                }
            });
        }
    });
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Display for ProfileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let giga = |flops: u64| flops as f64 / 1e9;
        let line = |name: &str, flops: &Saved| {
            let (ran, native, saved) = (giga(flops.ran), giga(flops.native), 100.0 * flops.saved);
            format!("{name:<10} {ran:.3} GFLOP, native routing {native:.3}: {saved:+.1} % saved")
        };
        writeln!(f, "router     {}: {:.3} experts per token and layer", self.router, self.mean_k)?;
        writeln!(
            f,
            "workload   {} prompts, {} at a time: {} tokens in {} steps, {:.3} s ({:.3} s in steps)",
            self.prompts, self.batch_size, self.tokens, self.steps, self.seconds, self.step_seconds
        )?;
        writeln!(f, "{}\n{}", line("forward", &self.forward_flops), line("experts", &self.expert_flops))?;
        if let Some(bytes) = &self.expert_bytes {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            writeln!(
                f,
                "bytes      {:.1} MiB of expert weights read, native routing {:.1}: {:+.1} % saved; {:.1} (layer, expert) pairs a step",
                mib(bytes.ran),
                mib(bytes.native),
                100.0 * bytes.saved,
                self.unique_experts_per_step
            )?;
        }
        writeln!(f, "\npart         seconds   share of steps")?;
        for part in &self.parts {
            writeln!(f, "{:<10} {:>9.4}   {:>6.1} %", part.part, part.seconds, 100.0 * part.share)?;
        }
        let rest = 1.0 - self.parts.iter().map(|p| p.share).sum::<f64>();
        writeln!(f, "{:<10} {:>9.4}   {:>6.1} %", "other", rest * self.step_seconds, 100.0 * rest)?;
        writeln!(f, "\nlayer   mean k   expert GFLOP     native      saved   routing s   experts s")?;
        for layer in &self.layers {
            writeln!(
                f,
                "{:>5} {:>8.3} {:>14.3} {:>10.3} {:>+8.1} % {:>11.4} {:>11.4}",
                layer.layer,
                layer.mean_k,
                giga(layer.expert_flops.ran),
                giga(layer.expert_flops.native),
                100.0 * layer.expert_flops.saved,
                layer.routing_seconds,
                layer.experts_seconds
            )?;
        }
        Ok(())
    }
}
