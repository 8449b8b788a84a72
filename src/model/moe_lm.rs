//! `moe_lm`: the models that this program trains. One family for several designs, which config.json names: learned or
//! rotary positions, layer or RMS norms, gated or plain nets, biases, which layers are mixtures (perhaps none), a gate
//! for each mixture or one for all, and the router the model was trained with.

use super::config::{self, Base, Config, EXPERTS_MAX, NormKind, PositionKind, max_positions, width};
use super::loader::{AttentionPlan, FfnPlan, Loader, PROJ};
use super::rope::RopeConfig;
use super::{CausalLm, Family, LoadError};
use crate::moe::Policy;
use crate::types::{Activation, FfnShape, LayerShape, ModelShape, MoeShape, RouterSpec};
use serde_json::Value;

pub(super) const FAMILY: Family =
    Family { model_type: "moe_lm", summary: "models trained by this program, dense ones included", build };

const NORMS: &[(&str, NormKind)] = &[("layernorm", NormKind::Layer), ("rmsnorm", NormKind::Rms)];
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("swiglu", Activation::Swiglu),
    ("gelu", Activation::Gelu),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
];

fn build(config: &mut Config, loader: &mut Loader<'_>) -> Result<CausalLm, LoadError> {
    let base = base(config)?;
    let bias = config.bool("bias")?;
    let experts = config.int("num_experts", 1..=EXPERTS_MAX)?;
    let moe = MoeShape {
        experts,
        top_k: config.int("num_experts_per_tok", 1..=experts)?,
        expert_width: width(config, "intermediate_size")?,
        shared_width: None,
        renormalise: config.bool("norm_topk_prob")?,
        layers: 0,
        router: None,
    };
    let mut shape = base.shape(layers(config, base.layers)?, moe);
    shape.moe.router = router(config, &shape)?;
    let ffn = FfnPlan { bias, shared_gate: config.bool("shared_router")?, ..FfnPlan::new("block_sparse_moe", PROJ) };
    let attention = AttentionPlan { qkv_bias: bias, o_bias: bias, ..Default::default() };
    loader.decoder(&base, shape, ffn, attention)
}

fn base(config: &mut Config) -> Result<Base, LoadError> {
    config::not_quantised(config)?;
    let hidden = width(config, "hidden_size")?;
    let attention = config::attention(config, hidden, false)?;
    let max_positions = max_positions(config)?;
    let learned = config.one_of("position_embedding", &[("learned", true), ("rope", false)])?;
    Ok(Base {
        vocab: config::vocab(config)?,
        hidden,
        layers: config::layers(config)?,
        attention,
        activation: config.one_of("hidden_act", ACTIVATIONS)?,
        norm: config.one_of("norm", NORMS)?,
        eps: config.positive("norm_eps")?,
        max_positions,
        tied: config.bool("tie_word_embeddings")?,
        position: match learned {
            true => PositionKind::Learned,
            false => PositionKind::Rope(RopeConfig::read(config, attention.head_dim, max_positions)?),
        },
    })
}

/// Layers listed in `moe_layers` are mixtures, the others are `dense_intermediate_size` wide.
fn layers(config: &mut Config, count: usize) -> Result<Vec<LayerShape>, LoadError> {
    let listed = config.get("moe_layers").cloned().ok_or_else(|| config.error("moe_layers", "is missing"))?;
    let numbers: Option<Vec<u64>> = listed.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
    let mut is_moe = vec![false; count];
    let mut mark = |i: u64| is_moe.get_mut(i as usize).is_some_and(|moe| !std::mem::replace(moe, true));
    if !numbers.is_some_and(|numbers| numbers.into_iter().all(&mut mark)) {
        let problem = format!("must list layers, each once, by numbers from 0 to {}; got {listed}", count - 1);
        return Err(config.error("moe_layers", problem));
    }
    let dense = match config.get("dense_intermediate_size") {
        None if is_moe.iter().all(|moe| *moe) => FfnShape::Moe,
        _ => FfnShape::Dense { width: width(config, "dense_intermediate_size")? },
    };
    let layer = |moe: bool| LayerShape { sliding_window: None, ffn: if moe { FfnShape::Moe } else { dense } };
    Ok(is_moe.into_iter().map(layer).collect())
}

/// The router the model was trained with, if it is named and not static top-k0.
fn router(config: &mut Config, shape: &ModelShape) -> Result<Option<RouterSpec>, LoadError> {
    let spec: RouterSpec = match config.get("router").cloned() {
        None => return Ok(None),
        Some(Value::String(text)) => text.parse().map_err(|e| config.error("router", e))?,
        Some(other) => return Err(config.error("router", format!("must be a router as a string; got {other}"))),
    };
    if spec.options.iter().any(|(name, _)| name == "weights") {
        return Err(
            config.error("router", format!("`{spec}`: leave out `weights`; `norm_topk_prob` says what they are"))
        );
    }
    let moe = MoeShape { router: Some(spec), ..shape.moe.clone() };
    Policy::build(&RouterSpec::native(), &moe).map_err(|e| config.error("router", e))?;
    Ok(moe.router)
}
