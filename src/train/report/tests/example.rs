//! Runs as training might give them; all figures are made up.

use crate::train::report::*;

const LAYERS: usize = 3;
const EXPERTS: usize = 4;

/// Noise between -1 and 1 that depends on `a` and `b` alone (SplitMix64's finaliser).
fn noise(a: u64, b: u64) -> f64 {
    let mut z = (a << 20 | b).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// What a loss falls to at `done`, the share of the run.
fn falling(done: f64) -> f64 {
    1.45 + 2.8 * (-9.0 * done).exp()
}

fn step(i: u64, steps: u64, mixtures: usize) -> StepLog {
    let done = i as f64 / steps as f64;
    let loss = falling(done) + 0.09 * noise(i, 1);
    let by_layer = |value: &dyn Fn(u64) -> f64| (0..mixtures as u64).map(value).collect();
    let auxiliary = |value: f64| (mixtures > 0).then_some(value);
    StepLog {
        step: i,
        tokens: i * 8192,
        seconds: i as f64 * 0.56,
        lr: 3e-4 * (i as f64 / (0.05 * steps as f64)).min(0.55 + 0.45 * (3.0 * done).cos()),
        loss,
        perplexity: loss.exp(),
        balance: auxiliary(1.02 + 0.5 * (-12.0 * done).exp() + 0.02 * noise(i, 2)),
        z_loss: auxiliary(1.4 + 2.0 * done + 0.1 * noise(i, 3)),
        entropy_floor: None,
        dynk_entropy: auxiliary(1.1 - 0.6 * done + 0.03 * noise(i, 4)),
        total: loss + 0.02,
        grad_norm: 0.6 * (1.0 + 6.0 * (-20.0 * done).exp()) * (0.4 * noise(i, 5)).exp(),
        clipped: noise(i, 5) > 0.6,
        tokens_per_second: 14_600.0 + 400.0 * noise(i, 6),
        experts_per_token: if mixtures == 0 { 0.0 } else { 2.6 - 1.2 * done.sqrt() + 0.05 * noise(i, 7) },
        dropped_share: if mixtures == 0 { 0.0 } else { 0.02 * (1.0 + noise(i, 8)) },
        entropy_l: by_layer(&|l| 0.96 - (0.15 + 0.12 * l as f64) * done.sqrt() + 0.01 * noise(i, 10 + l)),
        utilisation_std_l: by_layer(&|l| {
            0.03 + 0.1 * (-15.0 * done).exp() + 0.01 * l as f64 + 0.004 * noise(i, 20 + l)
        }),
    }
}

fn eval(i: u64, steps: u64, mixtures: usize) -> EvalLog {
    let at = step(i, steps, mixtures);
    let loss = falling(i as f64 / steps as f64) + 0.06 + 0.01 * noise(i, 9);
    EvalLog {
        step: i,
        tokens_scored: 111_540,
        loss,
        perplexity: loss.exp(),
        top1: 0.95 - 0.27 * loss,
        top3: 1.1 - 0.2 * loss,
        experts_per_token: at.experts_per_token,
        entropy_l: at.entropy_l,
        utilisation_std_l: at.utilisation_std_l,
    }
}

fn routing() -> RoutingAnalysis {
    let classes = ["word start", "word continuation", "capitalised", "digits", "punctuation", "white space", "other"];
    let shares = |seed: u64, spread: f64| {
        let weights: Vec<f64> = (0..EXPERTS as u64).map(|e| (spread * noise(seed, e)).exp()).collect();
        let all: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / all).collect::<Vec<f64>>()
    };
    let layers = (0..LAYERS).map(|l| {
        let seed = 100 * (l as u64 + 1);
        let class = |(c, class): (usize, &&str)| ClassRow {
            class: (*class).into(),
            tokens: [14_000, 61_000, 5_100, 40, 8_800, 22_000, 600][c],
            share_e: shares(seed + c as u64, 1.4),
        };
        LayerRouting {
            layer: 2 * l + 1,
            entropy: 0.8 - 0.1 * l as f64,
            utilisation_e: shares(seed + 50, 0.3),
            utilisation_std: 0.031,
            k_histogram: vec![900, 70_000 - 9_000 * l as u64, 30_000, 8_000 + 9_000 * l as u64, 2_640],
            classes: classes.iter().enumerate().map(class).collect(),
        }
    });
    RoutingAnalysis { layers: layers.collect() }
}

fn run(steps: u64, mixtures: usize) -> (RunResults, Vec<StepLog>) {
    let log: Vec<StepLog> = (1..=steps).map(|i| step(i, steps, mixtures)).collect();
    let every = (steps / 20).max(1);
    let evals: Vec<EvalLog> =
        (1..=steps).filter(|i| i.is_multiple_of(every)).map(|i| eval(i, steps, mixtures)).collect();
    let recipe = "name = \"shakespeare-switch\"\nseed = 1337\n\n[model]\nhidden_size = 512\nlayers = 6\nheads = 8\nexperts = 4\n\
                  moe_layers = [1, 3, 5]\nrouter = \"dynk:0.8\"\ncapacity_factor = 1.25\n\n[train]\nsteps = 12000\nlearning_rate = \
                  3e-4\nwarmup_steps = 600\n\n[data]\nkind = \"characters\"  # <a & b>\n";
    let play = " Of all the world, and with the sword of the king\nThat hath the blood of this fair day.\n\nKING RICHARD:\n\
                \tWhat, is the duke?";
    let perplexities: Vec<f64> = evals.iter().map(|e| e.perplexity).collect();
    let results = RunResults {
        schema: SCHEMA,
        name: "shakespeare-switch".into(),
        variant: (mixtures == 0).then(|| "dense".into()),
        recipe: recipe.into(),
        seed: 1337,
        device: "cpu (AVX-512, 2 threads)".into(),
        precision: "f32".into(),
        version: "moe-train 0.1.0".into(),
        started: "2026-02-03T04:05:06Z".into(),
        train_seconds: 0.56 * steps as f64,
        steps,
        tokens: steps * 8192,
        parameters: 38_123_456,
        parameters_active: if mixtures == 0 { 38_123_456 } else { 19_654_321 },
        peak_memory_bytes: Some(1_734_967_296),
        data: serde_json::json!({
            "name": "TinyShakespeare", "tokenizer": {"kind": "characters", "vocabulary": 65},
            "files": [{"name": "input.txt", "bytes": 1_115_394}], "validation_share": 0.1, "seeds": [1, 2, 3],
        }),
        final_eval: evals.last().cloned(),
        perplexity_interval: crate::train::analysis::perplexity_interval(&perplexities, 5),
        evals,
        routing: (mixtures > 0).then(routing),
        samples: vec![
            Sample { prompt: "ROMEO:\n".into(), text: play.into() },
            Sample { prompt: "What light".into(), text: " through yonder window breaks <b>&amp; so on</b>?\n".into() },
        ],
    };
    (results, log)
}

/// A mixture of three layers and its log.
pub fn mixture(steps: u64) -> (RunResults, Vec<StepLog>) {
    run(steps, LAYERS)
}

/// Its dense twin.
pub fn dense(steps: u64) -> (RunResults, Vec<StepLog>) {
    run(steps, 0)
}
