//! Builds a model's parts out of named tensors.

use super::config::{Base, NormKind, PositionKind};
use super::decoder::{Attention, CausalLm, DecoderLayer, Ffn};
use super::{LoadError, Weights};
use crate::moe::{MoeLayer, SharedExpert};
use crate::ops::{
    Backend, Embedding, ExpertsBuilder, FeedForward, HostFfn, HostLinear, HostTensor, Linear, Norm, Rotary,
};
use crate::types::{FfnShape, ModelShape};
use std::sync::{Arc, OnceLock};

/// Takes tensors from a checkpoint and hands out parts on a backend.
pub(super) struct Loader<'a> {
    pub weights: &'a mut Weights,
    pub backend: &'a Backend,
    /// Positions that rotary tables are made for.
    pub positions: usize,
}

/// What differs between the families' attention layers.
#[derive(Clone, Copy, Default)]
pub(super) struct AttentionPlan {
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub qk_norm: QkNorm,
    pub clip: Option<f64>,
}

#[derive(Clone, Copy, Default, PartialEq)]
pub(super) enum QkNorm {
    #[default]
    None,
    /// Over the whole projection (OLMoE).
    Full,
    /// Over each head, with one weight for all of them (Qwen3).
    PerHead,
}

/// What differs between the families' feed-forward parts, dense layers and mixtures.
#[derive(Clone, Copy)]
pub(super) struct FfnPlan {
    /// Name of a mixture within its layer.
    pub moe: &'static str,
    /// Names of an expert's projections.
    pub experts: FfnNames,
    /// Whether all projections have biases; gates of mixtures have none.
    pub bias: bool,
    /// Whether one gate, `model.gate`, serves all mixtures.
    pub shared_gate: bool,
}

impl FfnPlan {
    /// Mixtures called `moe`, each with a gate of its own and nets without biases.
    pub(super) fn new(moe: &'static str, experts: FfnNames) -> Self {
        Self { moe, experts, bias: false, shared_gate: false }
    }
}

/// Names of the projections of a feed-forward net: gate, up, down.
pub(super) type FfnNames = [&'static str; 3];
pub(super) const PROJ: FfnNames = ["gate_proj", "up_proj", "down_proj"];

impl Loader<'_> {
    /// `{name}.weight`, `[outputs, inputs]`, and `{name}.bias` where there is one.
    pub(super) fn linear(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
    ) -> Result<Linear, LoadError> {
        let weight = self.weights.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = bias.then(|| self.weights.take(&format!("{name}.bias"), &[outputs])).transpose()?;
        Ok(Linear::new(&weight, bias.as_ref(), self.backend)?)
    }

    /// `{name}.weight`, and for a layer norm `{name}.bias`.
    pub(super) fn norm(&mut self, name: &str, width: usize, base: &Base) -> Result<Norm, LoadError> {
        let weight = self.weights.take(&format!("{name}.weight"), &[width])?;
        match base.norm {
            NormKind::Rms => Ok(Norm::rms(&weight, base.eps, self.backend)?),
            NormKind::Layer => {
                let bias = self.weights.take(&format!("{name}.bias"), &[width])?;
                Ok(Norm::layer(&weight, &bias, base.eps, self.backend)?)
            }
        }
    }

    /// The net under `prefix`, `width` wide; it has a gate if the model's activation has one.
    fn ffn(
        &mut self,
        prefix: &str,
        shape: &ModelShape,
        width: usize,
        (names, bias): (FfnNames, bool),
    ) -> Result<HostFfn, LoadError> {
        let mut take = |name: &str, outputs: usize, inputs: usize| {
            let weight = self.weights.take(&format!("{prefix}.{name}.weight"), &[outputs, inputs])?;
            let bias = bias.then(|| self.weights.take(&format!("{prefix}.{name}.bias"), &[outputs])).transpose()?;
            Ok::<_, LoadError>(HostLinear { weight, bias })
        };
        let d = shape.hidden;
        let gate = shape.activation.gated().then(|| take(names[0], width, d)).transpose()?;
        Ok(HostFfn { gate, up: take(names[1], width, d)?, down: take(names[2], d, width)? })
    }

    fn feed_forward(
        &mut self,
        prefix: &str,
        shape: &ModelShape,
        width: usize,
        names: (FfnNames, bool),
    ) -> Result<FeedForward, LoadError> {
        let net = self.ffn(prefix, shape, width, names)?;
        Ok(FeedForward::new(&net, shape.activation, self.backend)?)
    }

    /// The mixture under `prefix`, the `index`-th of the model, with a gate `[E, D]` that it shares or its own.
    fn moe(
        &mut self,
        prefix: &str,
        plan: FfnPlan,
        shape: &ModelShape,
        (index, gate): (usize, Option<&HostTensor>),
    ) -> Result<MoeLayer, LoadError> {
        let (d, moe) = (shape.hidden, &shape.moe);
        // A shared gate is packed for every layer: it is small, and every layer is as it would be by itself.
        let gate = match gate {
            Some(gate) => Linear::full_precision(gate, self.backend)?,
            None => {
                let gate = self.weights.take(&format!("{prefix}.gate.weight"), &[moe.experts, d])?;
                Linear::full_precision(&gate, self.backend)?
            }
        };
        let names = (plan.experts, plan.bias);
        let mut experts = ExpertsBuilder::new(moe.experts, shape.activation, self.backend);
        for expert in 0..moe.experts {
            experts.push(&self.ffn(&format!("{prefix}.experts.{expert}"), shape, moe.expert_width, names)?)?;
        }
        let experts = experts.finish()?;
        let shared = match moe.shared_width {
            None => None,
            Some(width) => Some(SharedExpert {
                net: self.feed_forward(&format!("{prefix}.shared_expert"), shape, width, names)?,
                gate: self.linear(&format!("{prefix}.shared_expert_gate"), 1, d, false)?,
            }),
        };
        Ok(MoeLayer::new(index, gate, experts, shared))
    }

    fn attention(
        &mut self,
        layer: usize,
        base: &Base,
        plan: AttentionPlan,
        window: Option<usize>,
    ) -> Result<Attention, LoadError> {
        let a = base.attention;
        let prefix = format!("model.layers.{layer}.self_attn");
        let (q_width, kv_width) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let norms = match plan.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some((q_width, kv_width)),
            QkNorm::PerHead => Some((a.head_dim, a.head_dim)),
        };
        let mut norm = |name: &str, width: usize| self.norm(&format!("{prefix}.{name}_norm"), width, base);
        let (q_norm, k_norm) = match norms {
            None => (None, None),
            Some((q, k)) => (Some(norm("q", q)?), Some(norm("k", k)?)),
        };
        let mut project =
            |name: &str, outputs, inputs, bias| self.linear(&format!("{prefix}.{name}_proj"), outputs, inputs, bias);
        Ok(Attention {
            q: project("q", q_width, base.hidden, plan.qkv_bias)?,
            k: project("k", kv_width, base.hidden, plan.qkv_bias)?,
            v: project("v", kv_width, base.hidden, plan.qkv_bias)?,
            o: project("o", base.hidden, q_width, plan.o_bias)?,
            q_norm,
            k_norm,
            clip: plan.clip,
            window,
        })
    }

    /// The whole decoder: `shape` says which layers are mixtures and which are dense; the plans are of every layer.
    pub(super) fn decoder(
        &mut self,
        base: &Base,
        shape: ModelShape,
        ffn: FfnPlan,
        attention: AttentionPlan,
    ) -> Result<CausalLm, LoadError> {
        let table = Arc::new(self.linear("model.embed_tokens", base.vocab, base.hidden, false)?);
        let shared_gate = ffn.shared_gate && shape.moe.layers > 0;
        let gate = shared_gate
            .then(|| self.weights.take("model.gate.weight", &[shape.moe.experts, base.hidden]))
            .transpose()?;
        let mut layers = Vec::with_capacity(base.layers);
        let mut moe_layers = 0;
        for (i, layer) in shape.layers.iter().enumerate() {
            let prefix = format!("model.layers.{i}");
            let net = match layer.ffn {
                FfnShape::Dense { width } => {
                    Ffn::Dense(self.feed_forward(&format!("{prefix}.mlp"), &shape, width, (PROJ, ffn.bias))?)
                }
                FfnShape::Moe => {
                    moe_layers += 1;
                    let name = format!("{prefix}.{}", ffn.moe);
                    Ffn::Moe(Box::new(self.moe(&name, ffn, &shape, (moe_layers - 1, gate.as_ref()))?))
                }
            };
            layers.push(DecoderLayer {
                attention_norm: self.norm(&format!("{prefix}.input_layernorm"), base.hidden, base)?,
                attention: self.attention(i, base, attention, layer.sliding_window)?,
                ffn_norm: self.norm(&format!("{prefix}.post_attention_layernorm"), base.hidden, base)?,
                ffn: net,
            });
        }
        let norm = self.norm("model.norm", base.hidden, base)?;
        let lm_head =
            if base.tied { table.clone() } else { Arc::new(self.linear("lm_head", base.vocab, base.hidden, false)?) };
        let (positions, rotary) = self.positions(base)?;
        Ok(CausalLm {
            shape,
            backend: self.backend.clone(),
            embedding: Embedding::new(table, base.vocab),
            positions,
            layers,
            norm,
            lm_head,
            rotary,
            lens: OnceLock::new(),
            tied: base.tied,
        })
    }

    /// How tokens know where they stand: by embeddings, or by rotation.
    fn positions(&mut self, base: &Base) -> Result<(Option<Embedding>, Option<Rotary>), LoadError> {
        match &base.position {
            PositionKind::Learned => {
                let table = self.linear("model.embed_positions", base.max_positions, base.hidden, false)?;
                Ok((Some(Embedding::new(Arc::new(table), base.max_positions)), None))
            }
            PositionKind::Rope(rope) => {
                let (frequencies, scale) = rope.frequencies();
                Ok((None, Some(Rotary::new(&frequencies, scale, self.positions, self.backend)?)))
            }
        }
    }
}
