//! Results as a run on a model of OLMoE's shape might give them; all figures are made up.

use crate::eval::results::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Label, mean k, and what the router and its control lose of the native score.
const ROUTERS: [(&str, f64, f64, f64); 4] = [
    ("dynk:0.8", 5.12, 0.004, 0.012),
    ("dynk:0.6", 3.05, 0.021, 0.047),
    ("ratio:0.5", 4.40, 0.011, 0.019),
    ("dynk:0.8,mass=full", 15.38, -0.002, 0.006),
];

const LAYERS: usize = 16;
const EXPERTS: usize = 64;
const TOP_K: f64 = 8.0;

const SUBJECTS: [(&str, usize); 12] = [
    ("anatomy", 135),
    ("astronomy", 152),
    ("college_biology", 144),
    ("econometrics", 114),
    ("high_school_european_history", 165),
    ("high_school_government_and_politics", 193),
    ("international_law", 121),
    ("machine_learning", 112),
    ("marketing", 234),
    ("moral_scenarios", 895),
    ("philosophy", 311),
    ("professional_law", 1534),
];

/// Three tasks, native and four routers with their controls.
pub fn example() -> Results {
    let mut draw = Draw(ChaCha8Rng::seed_from_u64(1));
    let mut arms = vec![arm(&mut draw, "native", Role::Native, TOP_K, 0.0)];
    for (label, k, loss, control_loss) in ROUTERS {
        arms.push(arm(&mut draw, label, Role::Router, k, loss));
        let role = Role::Control { of: label.into() };
        arms.push(arm(&mut draw, &format!("static control of {label}"), role, k, control_loss));
    }
    let comparisons = comparisons(&arms);
    Results {
        schema: SCHEMA,
        program: "moe-eval 0.1.0".into(),
        command: "moe-eval run --model allenai/OLMoE-1B-7B-0924 --task mmlu,gsm8k,text --router dynk:0.8 --router \
                  dynk:0.6 --router ratio:0.5 --router dynk:0.8,mass=full --control --kl --html report.html"
            .into(),
        finished: "2026-02-03T04:05:06Z".into(),
        model: ModelFacts {
            name: "allenai/OLMoE-1B-7B-0924".into(),
            hash: Some("8f1d2c3b4a5968778695a4b3c2d1e0f00112233445566778899aabbccddeeff0".into()),
            runs_on: "cpu (AVX-512, 2 threads) with bf16 weights".into(),
            parameters: Some(6_919_161_856),
            moe: Some(MoeFacts { layers: LAYERS, experts: EXPERTS, top_k: TOP_K as usize }),
        },
        settings: Settings {
            tasks: ["mmlu", "gsm8k", "text"].map(Into::into).to_vec(),
            shots: None,
            limit: None,
            seed: 0,
            max_gen_tokens: Some(256),
            window: 512,
            text_tokens: None,
            kl_samples: 256,
            max_length: 4096,
            bootstrap_resamples: 2000,
        },
        data: vec![
            DataFacts { name: "mmlu/test".into(), rows: 14_042, sha256: "ab".repeat(32), verified: Some(true) },
            DataFacts { name: "own samples".into(), rows: 80, sha256: "cd".repeat(32), verified: Some(false) },
        ],
        arms,
        comparisons,
        findings: vec![
            "On mmlu, `dynk:0.8` keeps the native score within 0.40 pp at 36.0 % fewer expert FLOPs (p = 0.31).".into(),
            "On mmlu, `dynk:0.6` beats its static control by 2.60 pp at the same mean k (Holm p = 0.004).".into(),
            "`dynk:0.8,mass=full` costs 92.2 % more expert FLOPs than native and gains nothing that can be told."
                .into(),
        ],
    }
}

struct Draw(ChaCha8Rng);

impl Draw {
    /// Uniform in 0..1.
    fn share(&mut self) -> f64 {
        self.0.next_u32() as f64 / 2f64.powi(32)
    }
}

fn arm(draw: &mut Draw, label: &str, role: Role, k: f64, loss: f64) -> Arm {
    let native = role == Role::Native;
    let control = matches!(role, Role::Control { .. });
    let subtasks: Vec<SubtaskResult> = SUBJECTS
        .iter()
        .enumerate()
        .map(|(i, (name, samples))| SubtaskResult {
            name: format!("mmlu_{name}"),
            group: Some(if i % 2 == 0 { "mmlu_stem" } else { "mmlu_other" }.into()),
            samples: *samples,
            metrics: vec![share_metric("acc", 0.35 + 0.035 * i as f64 - loss + 0.03 * draw.share(), *samples)],
            mean_k: Some(k),
        })
        .collect();
    let routers = if control {
        vec![format!("static:{}", k.floor()), format!("static:{}", k.ceil())]
    } else {
        vec![label.into()]
    };
    let kl = |size: f64| (!native).then_some(Kl { mean: size, low: 0.9 * size, high: 1.12 * size, positions: 41_872 });
    let task = |task: &str, samples, metrics, subtasks: Vec<SubtaskResult>, seconds: f64| TaskResult {
        task: task.into(),
        version: None,
        routers: routers.clone(),
        samples,
        cut: 0,
        metrics,
        macro_average: (!subtasks.is_empty()).then_some(0.5412 - loss),
        groups: subtasks
            .iter()
            .take(1)
            .map(|s| SubtaskResult { name: "mmlu_stem".into(), group: None, ..s.clone() })
            .collect(),
        subtasks,
        routing: Some(routing(k, control)),
        expert_bytes: Some(saved(1_000_000 * (30.0 + 4.0 * k) as u64, 1_000_000 * 62)),
        kl: kl(0.4 * loss.abs() + 0.002),
        seconds: seconds * (0.4 + 0.075 * k),
    };
    let gsm8k = vec![
        share_metric("exact_match,strict-match", 0.405 - 1.5 * loss, 1319),
        share_metric("exact_match,flexible-extract", 0.418 - 1.4 * loss, 1319),
    ];
    let perplexity = 11.05 * (1.0 + 2.0 * loss);
    let text = vec![real_metric("perplexity", perplexity), real_metric("bits_per_byte", perplexity.ln() / 4.1 / 0.693)];
    let tasks = vec![
        task("mmlu", 4110, vec![share_metric("acc", 0.541 - loss, 4110)], subtasks, 3120.0),
        task("gsm8k", 1319, gsm8k, Vec::new(), 5410.5),
        task("text", 16, text, Vec::new(), 61.3),
    ];
    Arm { label: label.into(), role, tasks }
}

fn share_metric(name: &str, value: f64, samples: usize) -> Metric {
    let stderr = (value * (1.0 - value) / samples as f64).sqrt();
    let (low, high) = (value - 1.96 * stderr, value + 1.96 * stderr);
    Metric { name: name.into(), value, stderr: Some(stderr), low, high, higher_is_better: true, share: true }
}

fn real_metric(name: &str, value: f64) -> Metric {
    let (low, high) = (0.97 * value, 1.028 * value);
    Metric { name: name.into(), value, stderr: None, low, high, higher_is_better: false, share: false }
}

fn saved(ran: u64, native: u64) -> Saved {
    Saved { ran, native, saved: 1.0 - ran as f64 / native as f64 }
}

fn routing(k: f64, control: bool) -> RoutingFacts {
    let wave = |l: usize| if control { 0.0 } else { 0.25 * k * (l as f64 / 2.4).sin() };
    let spread = if control { 0.5 } else { 0.3 * k };
    let weight = |i: usize| (1e6 * (-((i as f64 - k) / spread).powi(2) / 2.0).exp()) as u64;
    let expert = |k: f64| (k * 1e12) as u64;
    let mut k_histogram: Vec<u64> = (0..=EXPERTS).map(weight).collect();
    k_histogram[0] = 0;
    if k == TOP_K {
        k_histogram = (0..=EXPERTS).map(|i| if i == 8 { 4_000_000 } else { 0 }).collect();
    }
    RoutingFacts {
        tokens: 1_204_311,
        mean_k: k,
        mean_k_l: (0..LAYERS).map(|l| if k == TOP_K { k } else { k + wave(l) }).collect(),
        k_histogram,
        expert_flops: saved(expert(k), expert(TOP_K)),
        forward_flops: saved(expert(k) + 3_760_000_000_000, expert(TOP_K) + 3_760_000_000_000),
    }
}

/// Every router against native and its control, by every metric.
fn comparisons(arms: &[Arm]) -> Vec<Comparison> {
    let mut found = Vec::new();
    for (i, arm) in arms.iter().enumerate().filter(|(_, arm)| arm.role == Role::Router) {
        for against in [&arms[0], &arms[i + 1]] {
            for (task, other) in arm.tasks.iter().zip(&against.tasks) {
                for (metric, beside) in task.metrics.iter().zip(&other.metrics) {
                    let (difference, half) = (metric.value - beside.value, 0.45 * (metric.high - metric.low));
                    let p = (-3.0 * (difference / half).powi(2)).exp();
                    found.push(Comparison {
                        task: task.task.clone(),
                        metric: metric.name.clone(),
                        arm: arm.label.clone(),
                        against: against.label.clone(),
                        difference,
                        low: difference - half,
                        high: difference + half,
                        p,
                        p_holm: (6.0 * p).min(1.0),
                        only_arm: metric.share.then_some(120),
                        only_against: metric.share.then_some(131),
                        significant: 6.0 * p < 0.05,
                    });
                }
            }
        }
    }
    found
}
