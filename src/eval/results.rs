//! What a run found: the document that `results.json` holds and every report shows.

use crate::types::Flops;
use serde::{Deserialize, Serialize};

/// Version of this document's form; raised when a field changes its meaning.
pub const SCHEMA: u32 = 1;

/// Everything a run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub schema: u32,
    /// `moe-eval` and its version.
    pub program: String,
    /// The command line, as it was typed.
    pub command: String,
    /// When the run ended, RFC 3339.
    pub finished: String,
    pub model: ModelFacts,
    pub settings: Settings,
    pub data: Vec<DataFacts>,
    /// Native first, then every router, each followed by its static control.
    pub arms: Vec<Arm>,
    pub comparisons: Vec<Comparison>,
    /// What can be said, in sentences.
    pub findings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    pub name: String,
    /// SHA-256 over the checkpoint's files; none over HTTP.
    pub hash: Option<String>,
    /// What it ran on: `cpu (AVX-512, 2 threads) with bf16 weights`, or the server's address.
    pub runs_on: String,
    pub parameters: Option<u64>,
    /// None over HTTP, and for models without mixtures.
    pub moe: Option<MoeFacts>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeFacts {
    pub layers: usize,
    pub experts: usize,
    /// The checkpoint's own experts per token.
    pub top_k: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub tasks: Vec<String>,
    /// Shots per task, where they are not the task's own.
    pub shots: Option<usize>,
    /// Samples per subtask.
    pub limit: Option<usize>,
    pub seed: u64,
    pub max_gen_tokens: Option<usize>,
    /// Tokens of a window of text, and of text in all.
    pub window: usize,
    pub text_tokens: Option<usize>,
    /// Samples per task on which next-token distributions were compared.
    pub kl_samples: usize,
    /// Longest prompt and completion together, in tokens.
    pub max_length: usize,
    pub bootstrap_resamples: usize,
}

/// A split that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataFacts {
    pub name: String,
    pub rows: usize,
    pub sha256: String,
    /// Whether count and sum are those of the published data; none of a text, which has none to compare with.
    pub verified: Option<bool>,
}

/// One router, on all tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// `native`, `dynk:0.8`, `static control of dynk:0.8`.
    pub label: String,
    pub role: Role,
    pub tasks: Vec<TaskResult>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Role {
    Native,
    Router,
    /// Static routing at the mean k that the router `of` had on each task.
    Control {
        of: String,
    },
}

/// One arm on one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    pub task: String,
    /// lm-eval's version of the task; none of perplexity.
    pub version: Option<String>,
    /// What routed: a router, or the two static mixes between which the samples of a control alternate.
    pub routers: Vec<String>,
    pub samples: usize,
    /// Samples whose prompt lost tokens on the left to fit the model's context.
    pub cut: usize,
    /// Headline first. Of a group: over all samples (micro average).
    pub metrics: Vec<Metric>,
    /// Mean over the subtasks of the headline metric; none for a single task.
    pub macro_average: Option<f64>,
    /// `mmlu_stem` and the like, over their samples.
    pub groups: Vec<SubtaskResult>,
    pub subtasks: Vec<SubtaskResult>,
    /// None where the server does not tell it.
    pub routing: Option<RoutingFacts>,
    /// Expert weights read in all steps; None where not told.
    pub expert_bytes: Option<Saved>,
    /// KL(native ‖ this arm) of next-token distributions, in nats.
    pub kl: Option<Kl>,
    /// Wall time of the samples, in seconds.
    pub seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubtaskResult {
    pub name: String,
    /// `mmlu_stem` and the like.
    pub group: Option<String>,
    pub samples: usize,
    pub metrics: Vec<Metric>,
    /// Experts per token and MoE layer.
    pub mean_k: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// `acc`, `exact_match,strict-match`, `perplexity`, `bits_per_byte`.
    pub name: String,
    pub value: f64,
    /// Standard error as lm-eval gives it; none where it gives none.
    pub stderr: Option<f64>,
    /// 95 % interval.
    pub low: f64,
    pub high: f64,
    pub higher_is_better: bool,
    /// Whether the value is a share of right answers (shown in per cent).
    pub share: bool,
}

/// What routing did to the tokens that belong to samples: those after a subtask's shared few-shot prefix, and those generated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingFacts {
    pub tokens: u64,
    pub mean_k: f64,
    /// Per MoE layer.
    pub mean_k_l: Vec<f64>,
    /// How often a (token, layer) used k experts, index k.
    pub k_histogram: Vec<u64>,
    /// Scope `experts`: the routed experts' matrix products.
    pub expert_flops: Saved,
    /// Scope `forward`: all matrix products.
    pub forward_flops: Saved,
}

/// What ran beside what native routing would have run; the saving is 1 − ran/native, below zero a cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    pub ran: u64,
    pub native: u64,
    pub saved: f64,
}

impl Saved {
    /// Of `[ran, native]`.
    pub fn of([ran, native]: [u64; 2]) -> Self {
        Self { ran, native, saved: Flops { ran, native }.saved() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kl {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// Next-token distributions compared.
    pub positions: u64,
}

/// Two arms on the same samples of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub task: String,
    pub metric: String,
    pub arm: String,
    pub against: String,
    /// Value of `arm` less that of `against`, with its 95 % paired bootstrap interval.
    pub difference: f64,
    pub low: f64,
    pub high: f64,
    /// McNemar's exact test where answers are right or wrong, a sign-flip permutation test otherwise; two-sided.
    pub p: f64,
    /// `p` after Holm's correction for all comparisons of this document.
    pub p_holm: f64,
    /// Samples that only `arm` got right, and only `against`; where answers are right or wrong.
    pub only_arm: Option<u64>,
    pub only_against: Option<u64>,
    pub significant: bool,
}
