//! Checks against text and checkpoints that lie outside the repository, in ../shared or where MOE_SHARED_DIR says.

use crate::checkpoint::{Checkpoint, quiet};
use crate::support::{Runner, shared_data};
use moe_serve::engine::Text;
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{LoadOptions, Loaded, load};
use moe_serve::types::DtypeChoice;
use rayon::prelude::*;
use std::path::PathBuf;

/// Tokens of a window; every token but the first is predicted.
const WINDOW: usize = 256;
/// Windows over which the perplexities of SOURCE.txt were measured.
const WINDOWS: usize = 202;
/// Windows that are one step together.
const BATCH: usize = 8;

/// `data/checkpoints` of the shared folder, if it is here.
fn checkpoints() -> Option<PathBuf> {
    Some(shared_data("checkpoints/stories-held-out.txt")?.join("checkpoints"))
}

/// A checkpoint in f32 and the held-out windows in its tokens.
struct HeldOut {
    loaded: Loaded,
    windows: Vec<Vec<u32>>,
}

impl HeldOut {
    fn read(name: &str) -> Option<Self> {
        let dir = checkpoints()?;
        let files = resolve(dir.join(name).to_str().unwrap(), &HubOptions::default(), &quiet()).unwrap();
        let options = LoadOptions { dtype: DtypeChoice::F32, ..Default::default() };
        let loaded = load(&files, &options, |_, _| {}).unwrap();
        let text = Text::read(&files.tokenizer, loaded.model.shape().vocab).unwrap();
        let ids = text.encode(&std::fs::read_to_string(dir.join("stories-held-out.txt")).unwrap(), true).unwrap();
        let windows: Vec<Vec<u32>> = ids.chunks_exact(WINDOW).map(<[u32]>::to_vec).collect();
        assert!(windows.len() >= WINDOWS, "{} windows of held-out text", windows.len());
        Some(Self { loaded, windows })
    }

    /// Perplexity and mean experts per token and layer over the first `count` windows.
    fn measure(&self, router: &str, count: usize) -> (f64, f64) {
        let layers = self.loaded.model.shape().moe.layers;
        let (mut nats, mut predicted, mut experts, mut tokens) = (0.0, 0, 0, 0);
        for batch in self.windows[..count].chunks(BATCH) {
            let mut runner = Runner::new(&self.loaded.model, batch.len(), WINDOW, router);
            let parts: Vec<(usize, &[u32])> = batch.iter().enumerate().map(|(s, w)| (s, &w[..])).collect();
            let logits = runner.step(&parts);
            let of_window = |(window, logits): (&Vec<u32>, &[Vec<f32>])| -> f64 {
                logits.iter().zip(&window[1..]).map(|(row, next)| log_softmax(row, *next)).sum()
            };
            nats -= batch.par_iter().zip(logits.par_chunks(WINDOW)).map(of_window).sum::<f64>();
            predicted += batch.len() * (WINDOW - 1);
            experts += runner.last_trace.k_tl.iter().map(|k| *k as usize).sum::<usize>();
            tokens += batch.len() * WINDOW;
        }
        ((nats / predicted as f64).exp(), experts as f64 / (tokens * layers) as f64)
    }
}

fn log_softmax(logits: &[f32], of: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    f64::from(logits[of as usize] - max) - sum.ln()
}

fn assert_perplexity(name: &str, windows: usize, want: f64, top_k: f64) {
    let Some(held_out) = HeldOut::read(name) else { return };
    let (perplexity, mean_k) = held_out.measure("native", windows);
    eprintln!("{name}: perplexity {perplexity:.3} over {windows} windows, mean k {mean_k}");
    assert!((perplexity - want).abs() < 0.05, "{name}: perplexity {perplexity:.3}, expected {want}");
    assert_eq!(mean_k, top_k);
}

#[test]
fn held_out_perplexity_of_stories_mixtral_is_that_of_transformers() {
    assert_perplexity("stories-mixtral", WINDOWS, 35.62, 2.0);
}

#[test]
fn held_out_perplexity_of_stories_olmoe_is_that_of_transformers() {
    assert_perplexity("stories-olmoe", WINDOWS, 39.49, 4.0);
}

/// The figures of SOURCE.txt count what the rule would choose while the model runs natively. Here it does choose, and
/// what more or fewer experts compute moves the gates of the layers above: little with mass=native, more the further
/// mass=full goes from the native 2.
#[test]
fn mean_k_of_dynk_is_what_the_native_router_probabilities_say() {
    let Some(mut held_out) = HeldOut::read("stories-mixtral") else { return };
    held_out.windows = held_out.windows[..WINDOWS].iter().step_by(26).cloned().collect();
    for (mass, tolerance, want) in
        [("native", 0.02, [1.00, 1.28, 1.62, 1.98]), ("full", 0.13, [1.60, 2.36, 3.82, 6.44])]
    {
        for (tau, want) in [0.5, 0.65, 0.8, 0.95].into_iter().zip(want) {
            let (perplexity, mean_k) = held_out.measure(&format!("dynk:{tau},mass={mass}"), held_out.windows.len());
            eprintln!("dynk:{tau},mass={mass}: mean k {mean_k:.3}, perplexity {perplexity:.2}");
            assert!((mean_k - want).abs() <= tolerance, "dynk:{tau},mass={mass}: mean k is {mean_k:.3}, not {want}");
        }
    }
}

/// The configurations of real checkpoints, without their weights: all is understood up to the first tensor.
#[test]
fn configurations_of_real_checkpoints_are_understood() {
    let Some(dir) = checkpoints() else { return };
    let configs = dir.parent().unwrap().join("tokenizers");
    for (file, shape) in [
        ("mixtral-8x7b/config.json", "[32000, 4096]"),
        ("olmoe-1b-7b/olmoe-1b-7b-0125-instruct.config.json", "[50304, 2048]"),
        ("qwen/qwen1.5-moe-a2.7b.config.json", "[151936, 2048]"),
        ("qwen/qwen3-30b-a3b.config.json", "[151936, 2048]"),
    ] {
        let mut checkpoint = Checkpoint::golden("mixtral_gqa");
        checkpoint.config = serde_json::from_slice(&std::fs::read(configs.join(file)).unwrap()).unwrap();
        checkpoint.tensors.retain(|name, _| name == "model.norm.weight");
        let error = checkpoint.refusal();
        let want =
            format!("tensor `model.embed_tokens.weight` is missing from the checkpoint (expected shape {shape})");
        assert_eq!(error, want, "{file}");
    }
}
