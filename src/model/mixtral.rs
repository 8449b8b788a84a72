//! Mixtral (`MixtralForCausalLM`): every layer a mixture, top-k0 renormalised (Jiang et al., arXiv 2401.04088).

use super::config::{Base, Config, experts, width};
use super::loader::{AttentionPlan, FfnNames, FfnPlan, Loader};
use super::{CausalLm, Family, LoadError};
use crate::types::{FfnShape, LayerShape, MoeShape};

pub(super) const FAMILY: Family =
    Family { model_type: "mixtral", summary: "Mixtral-8x7B, Mixtral-8x22B and their like", build };

/// Gate, up and down as Mixtral calls them.
const NAMES: FfnNames = ["w1", "w3", "w2"];

fn build(config: &mut Config, loader: &mut Loader<'_>) -> Result<CausalLm, LoadError> {
    let base = Base::read(config, false)?;
    let experts = experts(config, ["num_local_experts", "num_experts"])?;
    let moe = MoeShape {
        experts,
        top_k: config.int("num_experts_per_tok", 1..=experts)?,
        expert_width: width(config, "intermediate_size")?,
        shared_width: None,
        renormalise: true,
        layers: 0,
        router: None,
    };
    let sliding_window = config.opt_int("sliding_window", 1..=usize::MAX)?;
    let layers = vec![LayerShape { sliding_window, ffn: FfnShape::Moe }; base.layers];
    loader.decoder(&base, base.shape(layers, moe), FfnPlan::new("block_sparse_moe", NAMES), AttentionPlan::default())
}
