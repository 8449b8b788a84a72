//! Qwen3-MoE (`Qwen3MoeForCausalLM`): QK-norm per head, some layers may be dense (Qwen team, arXiv 2505.09388).

use super::config::{Base, Config, experts, width};
use super::loader::{AttentionPlan, FfnPlan, Loader, PROJ, QkNorm};
use super::{CausalLm, Family, LoadError};
use crate::types::{FfnShape, LayerShape, MoeShape};
use serde_json::Value;

pub(super) const FAMILY: Family =
    Family { model_type: "qwen3_moe", summary: "Qwen3-30B-A3B, Qwen3-235B-A22B and their like", build };

fn build(config: &mut Config, loader: &mut Loader<'_>) -> Result<CausalLm, LoadError> {
    let base = Base::read(config, false)?;
    let experts = experts(config, ["num_experts", "num_local_experts"])?;
    let moe = MoeShape {
        experts,
        top_k: config.int("num_experts_per_tok", 1..=experts)?,
        expert_width: width(config, "moe_intermediate_size")?,
        shared_width: None,
        renormalise: config.bool("norm_topk_prob")?,
        layers: 0,
        router: None,
    };
    let ffns = ffn_layers(config, base.layers)?;
    let bias = config.opt_bool("attention_bias")?.unwrap_or(false);
    let windowed = config.opt_bool("use_sliding_window")?.unwrap_or(false);
    let window = config.opt_int("sliding_window", 0..=usize::MAX)?.filter(|w| windowed && *w > 0);
    // Written by transformers, read by nothing in this family.
    config.get("max_window_layers");
    let layers = ffns.into_iter().map(|ffn| LayerShape { sliding_window: window, ffn }).collect();
    let plan = AttentionPlan { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, ..Default::default() };
    loader.decoder(&base, base.shape(layers, moe), FfnPlan::new("mlp", PROJ), plan)
}

/// Layer i is a mixture iff it is not listed in `mlp_only_layers` and i + 1 is a multiple of
/// `decoder_sparse_step`; the others are dense. Shared with Qwen2-MoE.
pub(super) fn ffn_layers(config: &mut Config, layers: usize) -> Result<Vec<FfnShape>, LoadError> {
    let step = config.int("decoder_sparse_step", 1..=usize::MAX)?;
    let dense_width = width(config, "intermediate_size")?;
    let listed = config.get("mlp_only_layers").cloned().unwrap_or(Value::Array(Vec::new()));
    let dense: Option<Vec<u64>> = listed.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
    let dense = dense
        .ok_or_else(|| config.error("mlp_only_layers", format!("must be a list of layer numbers; got {listed}")))?;
    let moe = |i: usize| !dense.contains(&(i as u64)) && (i + 1).is_multiple_of(step);
    if !(0..layers).any(moe) {
        return Err(config.error("decoder_sparse_step", "leaves no layer that is a mixture: nothing to route"));
    }
    Ok((0..layers).map(|i| if moe(i) { FfnShape::Moe } else { FfnShape::Dense { width: dense_width } }).collect())
}
