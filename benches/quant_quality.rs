//! What quantised weights cost in quality: perplexity of a text, and how far the distributions of its next tokens are from
//! those of the checkpoint in bf16. Prints a table: `cargo bench --bench quant_quality -- CHECKPOINT TEXT`.

use moe_serve::engine::Text;
use moe_serve::eval::kl_divergence;
use moe_serve::eval::stats::{mean, mean_stderr};
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{CausalLm, LoadOptions, StepInput, load};
use moe_serve::moe::router::StepTokens;
use moe_serve::moe::{Policy, RouteCtx};
use moe_serve::ops::{KvCache, KvShape, Segment, StepLayout, to_host};
use moe_serve::types::{BlockId, DtypeChoice, TokenId};
use std::sync::Arc;

/// The first is what the others are compared with.
const FORMATS: [&str; 7] = ["none", "q8_0", "q4_k", "q4_0", "experts=q8_0", "experts=q4_k", "experts=q4_0"];
/// Tokens that are run together, and the most windows of them that are taken, spread over the text.
const WINDOW: usize = 256;
const WINDOWS_MAX: usize = 64;

/// Log-probabilities of a window, `[tokens, vocabulary]`.
fn run(model: &CausalLm, window: &[TokenId]) -> Vec<f32> {
    let (shape, block_size) = (model.shape(), 16);
    let attention = shape.attention;
    let kv_shape = KvShape {
        layers: shape.layers.len(),
        blocks: WINDOW.div_ceil(block_size),
        block_size,
        kv_heads: attention.kv_heads,
        head_dim: attention.head_dim,
    };
    let mut kv = KvCache::new(kv_shape, model.backend()).expect("memory");
    let blocks = (0..kv_shape.blocks as u32).map(BlockId).collect();
    let segment = Segment { start: 0, len: window.len(), blocks };
    let layout = StepLayout::new(vec![segment], &kv, model.backend()).expect("a layout");
    let tokens = StepTokens {
        token_t: window.to_vec(),
        position_t: (0..window.len() as u32).collect(),
        policy_t: vec![0; window.len()],
        ..StepTokens::default()
    };
    let rows: Vec<u32> = (0..window.len() as u32).collect();
    let native = Arc::new(Policy::build(&"native".parse().expect("a spec"), &shape.moe).expect("native"));
    let policies = [native];
    let mut routes = RouteCtx::new(&shape.moe, &policies, &tokens);
    let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &rows };
    let hidden = model.forward(&input, &mut kv, &mut routes).expect("runs").expect("rows");
    let mut logits = to_host(&model.logits(&hidden, 0, rows.len()).expect("runs")).expect("on the host");
    for row in logits.chunks_exact_mut(shape.vocab) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = row.iter().map(|z| f64::from(z - max).exp()).sum::<f64>().ln() as f32 + max;
        row.iter_mut().for_each(|z| *z -= log_sum);
    }
    logits
}

/// A window's negative log-likelihood, KL(plain ‖ quantised) and share of equal first choices: means over its tokens but the
/// last.
fn measure(window: &[TokenId], vocab: usize, plain: &[f32], quantised: &[f32]) -> [f64; 3] {
    let mut sums = [0.0; 3];
    let first = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
    for ((p, q), next) in plain.chunks_exact(vocab).zip(quantised.chunks_exact(vocab)).zip(&window[1..]) {
        sums[0] -= f64::from(q[*next as usize]);
        sums[1] += kl_divergence(p, q);
        sums[2] += f64::from(u8::from(first(p) == first(q)));
    }
    sums.map(|sum| sum / (window.len() - 1) as f64)
}

/// Mean and half the width of its 95 % interval, over windows.
fn interval(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let values: Vec<f64> = values.collect();
    (mean(&values).unwrap_or(f64::NAN), 1.96 * mean_stderr(&values).unwrap_or(f64::NAN))
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [dir, text] = &args[..] else {
        // No failure: `cargo bench` runs this too.
        println!("quant_quality: nothing to do without `cargo bench --bench quant_quality -- CHECKPOINT TEXT`");
        return;
    };
    let bars = indicatif::MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
    let files = resolve(dir, &HubOptions::from_env(), &bars).expect("a checkpoint");
    let open = |format: &str| {
        let quantization = format.parse().expect("a format");
        let options = LoadOptions { dtype: DtypeChoice::Bf16, quantization, ..LoadOptions::default() };
        load(&files, &options, |_, _| {}).expect("loads").model
    };
    let plain = open(FORMATS[0]);
    let vocab = plain.shape().vocab;
    let text = std::fs::read_to_string(text).expect("a text");
    let ids = Text::read(&files.tokenizer, vocab).expect("a tokenizer").encode(&text, false).expect("tokens");
    let all: Vec<&[TokenId]> = ids.chunks_exact(WINDOW).collect();
    assert!(!all.is_empty(), "the text has {} tokens, but a window takes {WINDOW}", ids.len());
    let windows: Vec<&[TokenId]> = all.iter().step_by(all.len().div_ceil(WINDOWS_MAX)).copied().collect();
    let wanted: Vec<Vec<f32>> = windows.iter().map(|window| run(&plain, window)).collect();
    println!("{} windows of {WINDOW} tokens; 95 % intervals over windows\n", windows.len());
    println!(
        "| `--quant` | MiB | perplexity | change of the log-likelihood, nats | KL to bf16, nats | same first choice |"
    );
    println!("|---|---|---|---|---|---|");
    let mut before = Vec::new();
    for format in FORMATS {
        let model = open(format);
        let measured: Vec<[f64; 3]> = windows
            .iter()
            .zip(&wanted)
            .map(|(window, wanted)| measure(window, vocab, wanted, &run(&model, window)))
            .collect();
        if before.is_empty() {
            before = measured.iter().map(|[nll, ..]| *nll).collect();
        }
        let (nll, _) = interval(measured.iter().map(|m| m[0]));
        let (change, change_by) = interval(measured.iter().zip(&before).map(|(m, before)| before - m[0]));
        let (kl, kl_by) = interval(measured.iter().map(|m| m[1]));
        let (same, same_by) = interval(measured.iter().map(|m| 100.0 * m[2]));
        let mib = model.bytes() as f64 / f64::from(1 << 20);
        println!(
            "| `{format}` | {mib:.1} | {:.3} | {change:+.4} ± {change_by:.4} | {kl:.5} ± {kl_by:.5} | {same:.1} ± {same_by:.1} % |",
            nll.exp()
        );
    }
}
