//! What a loaded model looks like, in integers: enough to count its FLOPs, size its KV cache and
//! check a router against it, without touching a tensor.

use super::RouterSpec;
use serde::{Deserialize, Serialize};

/// Sizes of one model. Everything that cost and scheduling need, nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// D, the model width.
    pub hidden: usize,
    pub vocab: usize,
    /// Longest sequence the positions are defined for.
    pub max_positions: usize,
    pub attention: AttentionShape,
    pub layers: Vec<LayerShape>,
    /// Of every feed-forward net, experts included.
    pub activation: Activation,
    /// Shared by every MoE layer of the model.
    pub moe: MoeShape,
    /// All parameters of the checkpoint.
    pub parameters: usize,
}

/// Sizes shared by the attention of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Keys further back than this many positions (the own one included) are not seen.
    pub sliding_window: Option<usize>,
    pub ffn: FfnShape,
}

/// The feed-forward part of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnShape {
    /// One net of this width.
    Dense { width: usize },
    /// A mixture; its sizes are in [`ModelShape::moe`].
    Moe,
}

/// What stands between the projections of a feed-forward net.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `down(silu(gate(x)) ⊙ up(x))` (Shazeer, arXiv 2002.05202); all others are `down(act(up(x)))`.
    #[default]
    Swiglu,
    /// The approximation by tanh that GPT-2 has (Hendrycks & Gimpel, arXiv 1606.08415).
    Gelu,
    Relu,
    /// `x · sigmoid(x)`.
    Silu,
}

impl Activation {
    /// Whether there is a gate projection beside up and down.
    pub fn gated(self) -> bool {
        self == Self::Swiglu
    }
}

/// Sizes of the mixtures of one model, and how the checkpoint itself routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeShape {
    /// E, experts per MoE layer.
    pub experts: usize,
    /// k0, the checkpoint's own number of experts per token, against which savings are counted; the most there are,
    /// where its own number varies.
    pub top_k: usize,
    /// F, the width of one expert.
    pub expert_width: usize,
    /// Width of the shared expert that every token passes, if there is one.
    pub shared_width: Option<usize>,
    /// Whether the chosen experts' probabilities are renormalised to sum to 1.
    pub renormalise: bool,
    /// Number of layers that are mixtures.
    pub layers: usize,
    /// The rule that the checkpoint was trained with, where it is not static top-k0. It takes at most k0 experts.
    pub router: Option<RouterSpec>,
}
