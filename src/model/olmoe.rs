//! OLMoE (`OlmoeForCausalLM`): many small experts, raw probabilities as weights, QK-norm over the whole
//! projections, optional clipping of q, k and v (Muennighoff et al., arXiv 2409.02060).

use super::config::{Base, Config, experts, width};
use super::loader::{AttentionPlan, FfnPlan, Loader, PROJ, QkNorm};
use super::{CausalLm, Family, LoadError};
use crate::types::{FfnShape, LayerShape, MoeShape};

pub(super) const FAMILY: Family = Family { model_type: "olmoe", summary: "OLMoE-1B-7B, base and instruct", build };

fn build(config: &mut Config, loader: &mut Loader<'_>) -> Result<CausalLm, LoadError> {
    let base = Base::read(config, true)?;
    let experts = experts(config, ["num_experts", "num_local_experts"])?;
    let moe = MoeShape {
        experts,
        top_k: config.int("num_experts_per_tok", 1..=experts)?,
        expert_width: width(config, "intermediate_size")?,
        shared_width: None,
        renormalise: config.bool("norm_topk_prob")?,
        layers: 0,
        router: None,
    };
    let bias = config.opt_bool("attention_bias")?.unwrap_or(false);
    let clip = config.opt_positive("clip_qkv")?;
    let plan = AttentionPlan { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::Full, clip };
    let layers = vec![LayerShape { sliding_window: None, ffn: FfnShape::Moe }; base.layers];
    loader.decoder(&base, base.shape(layers, moe), FfnPlan::new("mlp", PROJ), plan)
}
