//! The decoder that all families are variants of: attention and feed-forward with residuals around them.

use crate::moe::router::LENS_TOKENS;
use crate::moe::{MoeLayer, RouteCtx, TokenSignals};
use crate::ops::profile::{Part, timed};
use crate::ops::{self, Backend, Embedding, FeedForward, KvCache, Linear, Norm, ReadOut, Rotary, StepLayout};
use crate::types::{ModelShape, TokenId};
use candle_core::{Result, Tensor};
use std::sync::{Arc, OnceLock};

/// A loaded causal language model. Immutable: KV and routing state are arguments of [`CausalLm::forward`].
#[derive(Debug)]
pub struct CausalLm {
    pub(super) shape: ModelShape,
    pub(super) backend: Backend,
    pub(super) embedding: Embedding,
    /// Learned positions, added to the embeddings.
    pub(super) positions: Option<Embedding>,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: Norm,
    /// The embedding's own table where the two are tied.
    pub(super) lm_head: Arc<Linear>,
    pub(super) rotary: Option<Rotary>,
    /// Some rows of the LM head, once a router has asked for them.
    pub(super) lens: OnceLock<ReadOut>,
    pub(super) tied: bool,
}

#[derive(Debug)]
pub(super) struct DecoderLayer {
    pub attention_norm: Norm,
    pub attention: Attention,
    pub ffn_norm: Norm,
    pub ffn: Ffn,
}

#[derive(Debug)]
pub(super) enum Ffn {
    Dense(FeedForward),
    Moe(Box<MoeLayer>),
}

#[derive(Debug)]
pub(super) struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    /// q, k and v are clamped to ± this (OLMoE).
    pub clip: Option<f64>,
    pub window: Option<usize>,
}

/// Some tokens of some sequences.
pub struct StepInput<'a> {
    /// `[T]`
    pub tokens: &'a [TokenId],
    pub layout: &'a StepLayout,
    /// Rows whose final hidden states are wanted.
    pub logit_rows: &'a [u32],
}

impl CausalLm {
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Runs one step and returns the final hidden states of `logit_rows`, `[rows, D]`, or nothing if none are wanted;
    /// [`Self::logits`] takes them. Keys and values go to `kv`; `routes` decides and counts the routing.
    ///
    /// # Errors
    /// A failure of the device, or a router that breaks an invariant.
    pub fn forward(&self, step: &StepInput<'_>, kv: &mut KvCache, routes: &mut RouteCtx<'_>) -> Result<Option<Tensor>> {
        let mut x = self.embedding.forward(step.tokens)?;
        if let Some(positions) = &self.positions {
            x = ops::add(&x, &positions.forward(step.layout.positions())?)?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let asked = routes.signals();
            let mut attention_entropy_t = Vec::new();
            let entropy_t =
                (asked.attention_entropy && matches!(layer.ffn, Ffn::Moe(_))).then_some(&mut attention_entropy_t);
            x = timed(Part::Attention, i, || {
                let normed = layer.attention_norm.forward(&x)?;
                ops::add(&x, &self.attend(i, &layer.attention, &normed, step.layout, (kv, entropy_t))?)
            })?;
            let reads_out = asked.lens && matches!(layer.ffn, Ffn::Moe(_));
            let (normed, lens_entropy_t) = if reads_out {
                let (normed, scale_t) = layer.ffn_norm.forward_telling(&x)?;
                (normed, self.read_out(&x, scale_t.as_deref())?)
            } else {
                (layer.ffn_norm.forward(&x)?, Vec::new())
            };
            let out = match &layer.ffn {
                Ffn::Dense(net) => timed(Part::Dense, i, || net.forward(&normed))?,
                Ffn::Moe(moe) => moe.forward(&normed, &TokenSignals { attention_entropy_t, lens_entropy_t }, routes)?,
            };
            x = ops::add(&x, &out)?;
        }
        if step.logit_rows.is_empty() {
            return Ok(None);
        }
        // The LM head is the largest matrix of a small model: only the rows that are asked for pass it.
        self.norm.forward(&ops::select_rows(&x, step.logit_rows)?).map(Some)
    }

    /// Logits of rows `start..start + len` of what [`Self::forward`] gave, `[rows, D] → [len, vocab]`. In parts, because
    /// the logits of a long prompt that is scored would take gigabytes.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn logits(&self, hidden: &Tensor, start: usize, len: usize) -> Result<Tensor> {
        timed(Part::LmHead, 0, || self.lm_head.forward(&hidden.narrow(0, start, len)?))
    }

    /// How undecided the residual stream `x [T, D]` is about some tokens of the vocabulary, as if no layer followed: see
    /// [`ReadOut::entropies`].
    fn read_out(&self, x: &Tensor, scale_t: Option<&[f32]>) -> Result<Vec<f32>> {
        if self.lens.get().is_none() {
            let vocab = self.shape.vocab;
            let count = LENS_TOKENS.len().min(vocab);
            let first = LENS_TOKENS.start.min(vocab - count);
            let rows: Vec<u32> = (first..first + count).map(|id| id as u32).collect();
            // Who was faster made the same.
            let _ = self.lens.set(ReadOut::new(&self.lm_head.rows(&rows)?, &self.norm, &self.backend)?);
        }
        self.lens.get().map_or(Ok(Vec::new()), |lens| lens.entropies(x, scale_t))
    }

    /// Attention over the cache; tells its entropy where that is asked for.
    fn attend(
        &self,
        layer: usize,
        a: &Attention,
        x: &Tensor,
        layout: &StepLayout,
        (kv, entropy_t): (&mut KvCache, Option<&mut Vec<f32>>),
    ) -> Result<Tensor> {
        let [mut q, mut k, mut v] = Linear::forward_all([&a.q, &a.k, &a.v], x)?;
        if let (Some(q_norm), Some(k_norm)) = (&a.q_norm, &a.k_norm) {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some(clip) = a.clip {
            (q, k, v) = (ops::clip(&q, clip)?, ops::clip(&k, clip)?, ops::clip(&v, clip)?);
        }
        if let Some(rotary) = &self.rotary {
            (q, k) = (rotary.forward(&q, layout)?, rotary.forward(&k, layout)?);
        }
        a.o.forward(&ops::attention([&q, &k, &v], layer, a.window, kv, layout, entropy_t)?)
    }

    /// Bytes the weights take.
    pub fn bytes(&self) -> usize {
        let head = if self.tied { 0 } else { self.lm_head.bytes() };
        let layers: usize = self.layers.iter().map(DecoderLayer::bytes).sum();
        let positions = self.positions.as_ref().map_or(0, Embedding::bytes);
        self.embedding.bytes() + positions + head + layers + self.norm.bytes()
    }

    /// Bytes of the weights that every step reads, whatever is routed: all but those of routed experts and the tables of
    /// embeddings, of which it reads rows.
    pub fn dense_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(DecoderLayer::bytes).sum();
        let experts = self.shape.moe.layers * self.shape.moe.experts * self.expert_bytes();
        layers - experts + self.norm.bytes() + self.lm_head.bytes()
    }

    /// Bytes of one routed expert's weights.
    pub fn expert_bytes(&self) -> usize {
        let moe = self.layers.iter().find_map(|layer| match &layer.ffn {
            Ffn::Moe(moe) => Some(moe.experts.bytes()),
            Ffn::Dense(_) => None,
        });
        moe.unwrap_or(0) / self.shape.moe.experts
    }
}

impl DecoderLayer {
    fn bytes(&self) -> usize {
        let a = &self.attention;
        let norms = [Some(&self.attention_norm), Some(&self.ffn_norm), a.q_norm.as_ref(), a.k_norm.as_ref()];
        let norms: usize = norms.into_iter().flatten().map(Norm::bytes).sum();
        let ffn = match &self.ffn {
            Ffn::Dense(net) => net.bytes(),
            Ffn::Moe(moe) => moe.bytes(),
        };
        a.q.bytes() + a.k.bytes() + a.v.bytes() + a.o.bytes() + norms + ffn
    }
}
