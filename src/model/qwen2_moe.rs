//! Qwen2-MoE and Qwen1.5-MoE (`Qwen2MoeForCausalLM`): a shared expert behind a sigmoid gate beside the routed
//! ones, whose weights are raw probabilities (Qwen team, arXiv 2407.10671).

use super::config::{Base, Config, experts, width};
use super::loader::{AttentionPlan, FfnPlan, Loader, PROJ};
use super::qwen3_moe::ffn_layers;
use super::{CausalLm, Family, LoadError};
use crate::types::{LayerShape, MoeShape};
use serde_json::Value;

pub(super) const FAMILY: Family =
    Family { model_type: "qwen2_moe", summary: "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B and their like", build };

fn build(config: &mut Config, loader: &mut Loader<'_>) -> Result<CausalLm, LoadError> {
    let base = Base::read(config, false)?;
    let experts = experts(config, ["num_experts", "num_local_experts"])?;
    let moe = MoeShape {
        experts,
        top_k: config.int("num_experts_per_tok", 1..=experts)?,
        expert_width: width(config, "moe_intermediate_size")?,
        shared_width: Some(width(config, "shared_expert_intermediate_size")?),
        renormalise: config.bool("norm_topk_prob")?,
        layers: 0,
        router: None,
    };
    let ffns = ffn_layers(config, base.layers)?;
    let windows = windows(config, base.layers)?;
    // Absent in files older than the field, all of which have the biases.
    let qkv_bias = config.opt_bool("qkv_bias")?.unwrap_or(true);
    let layers =
        ffns.into_iter().zip(windows).map(|(ffn, sliding_window)| LayerShape { sliding_window, ffn }).collect();
    let plan = AttentionPlan { qkv_bias, ..Default::default() };
    loader.decoder(&base, base.shape(layers, moe), FfnPlan::new("mlp", PROJ), plan)
}

/// The window of every layer: as `layer_types` says, or by transformers' rule for files without it, where of the
/// first `max_window_layers` layers every other one has a window.
fn windows(config: &mut Config, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
    let enabled = config.opt_bool("use_sliding_window")?.unwrap_or(false);
    let window = config.opt_int("sliding_window", 0..=usize::MAX)?.filter(|w| enabled && *w > 0);
    let before = config.opt_int("max_window_layers", 0..=usize::MAX)?;
    let types = config.get("layer_types").cloned();
    let Some(window) = window else { return Ok(vec![None; layers]) };
    let sliding: Vec<bool> = match &types {
        Some(Value::Array(types)) if types.len() == layers => types.iter().map(|t| t == "sliding_attention").collect(),
        Some(other) => {
            return Err(config.error("layer_types", format!("must list {layers} layer types; got {other}")));
        }
        None => {
            let before =
                before.ok_or_else(|| config.error("max_window_layers", "is missing, and so is `layer_types`"))?;
            (0..layers).map(|i| i < before && i % 2 == 0).collect()
        }
    };
    Ok(sliding.into_iter().map(|s| s.then_some(window)).collect())
}
