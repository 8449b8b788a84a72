//! Builds a model's parts out of named tensors.

use super::config::Base;
use super::decoder::{Attention, CausalLm, DecoderLayer, Ffn};
use super::{LoadError, Weights};
use crate::moe::{MoeLayer, SharedExpert};
use crate::ops::{Backend, Embedding, ExpertsBuilder, Linear, RmsNorm, Rotary, Swiglu};
use crate::types::{FfnShape, ModelShape};
use std::sync::Arc;

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

/// Names of the three matrices of a SwiGLU: gate, up, down.
pub(super) type SwigluNames = [&'static str; 3];
pub(super) const PROJ: SwigluNames = ["gate_proj", "up_proj", "down_proj"];

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

    pub(super) fn norm(&mut self, name: &str, width: usize, eps: f64) -> Result<RmsNorm, LoadError> {
        let weight = self.weights.take(&format!("{name}.weight"), &[width])?;
        Ok(RmsNorm::new(&weight, eps, self.backend)?)
    }

    /// `{prefix}.{gate,up,down}.weight`.
    pub(super) fn swiglu(&mut self, prefix: &str, names: SwigluNames, d: usize, f: usize) -> Result<Swiglu, LoadError> {
        let [gate, up, down] = self.swiglu_tensors(prefix, names, d, f)?;
        Ok(Swiglu::new(&gate, &up, &down, self.backend)?)
    }

    fn swiglu_tensors(
        &mut self,
        prefix: &str,
        names: SwigluNames,
        d: usize,
        f: usize,
    ) -> Result<[crate::ops::HostTensor; 3], LoadError> {
        let mut take = |name: &str, shape: [usize; 2]| self.weights.take(&format!("{prefix}.{name}.weight"), &shape);
        Ok([take(names[0], [f, d])?, take(names[1], [f, d])?, take(names[2], [d, f])?])
    }

    /// The mixture under `prefix`, the `index`-th of the model.
    pub(super) fn moe(
        &mut self,
        prefix: &str,
        names: SwigluNames,
        shape: &ModelShape,
        index: usize,
    ) -> Result<MoeLayer, LoadError> {
        let (d, f, e) = (shape.hidden, shape.moe.expert_width, shape.moe.experts);
        let gate = self.weights.take(&format!("{prefix}.gate.weight"), &[e, d])?;
        let gate = Linear::full_precision(&gate, self.backend)?;
        let mut experts = ExpertsBuilder::new(e, self.backend);
        for expert in 0..e {
            let [gate, up, down] = self.swiglu_tensors(&format!("{prefix}.experts.{expert}"), names, d, f)?;
            experts.push(&gate, &up, &down)?;
        }
        let experts = experts.finish()?;
        let shared = match shape.moe.shared_width {
            None => None,
            Some(width) => Some(SharedExpert {
                net: self.swiglu(&format!("{prefix}.shared_expert"), names, d, width)?,
                gate: self.linear(&format!("{prefix}.shared_expert_gate"), 1, d, false)?,
            }),
        };
        Ok(MoeLayer { index, gate, experts, shared })
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
        let mut norm = |name: &str, width: usize| self.norm(&format!("{prefix}.{name}_norm"), width, base.eps);
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

    /// The whole decoder: `shape` says which layers are mixtures (under `moe_name`, experts' matrices called
    /// `names`) and which are dense; `plan` is every layer's attention.
    pub(super) fn decoder(
        &mut self,
        base: &Base,
        shape: ModelShape,
        (moe_name, names): (&str, SwigluNames),
        plan: AttentionPlan,
    ) -> Result<CausalLm, LoadError> {
        let table = Arc::new(self.linear("model.embed_tokens", base.vocab, base.hidden, false)?);
        let mut layers = Vec::with_capacity(base.layers);
        let mut moe_layers = 0;
        for (i, layer) in shape.layers.iter().enumerate() {
            let prefix = format!("model.layers.{i}");
            let ffn = match layer.ffn {
                FfnShape::Dense { width } => {
                    Ffn::Dense(self.swiglu(&format!("{prefix}.mlp"), PROJ, base.hidden, width)?)
                }
                FfnShape::Moe => {
                    moe_layers += 1;
                    Ffn::Moe(self.moe(&format!("{prefix}.{moe_name}"), names, &shape, moe_layers - 1)?)
                }
            };
            layers.push(DecoderLayer {
                attention_norm: self.norm(&format!("{prefix}.input_layernorm"), base.hidden, base.eps)?,
                attention: self.attention(i, base, plan, layer.sliding_window)?,
                ffn_norm: self.norm(&format!("{prefix}.post_attention_layernorm"), base.hidden, base.eps)?,
                ffn,
            });
        }
        let norm = self.norm("model.norm", base.hidden, base.eps)?;
        let lm_head =
            if base.tied { table.clone() } else { Arc::new(self.linear("lm_head", base.vocab, base.hidden, false)?) };
        let (frequencies, scale) = base.rope.frequencies();
        let rotary = Rotary::new(&frequencies, scale, self.positions, self.backend)?;
        let embedding = Embedding::new(table, base.vocab);
        Ok(CausalLm { shape, backend: self.backend.clone(), embedding, layers, norm, lm_head, rotary, tied: base.tied })
    }
}
