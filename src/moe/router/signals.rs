//! What routers may know of a token beside its gate: computed only in steps where a policy reads it.

use std::ops::{BitOr, Range};

/// The M tokens of the vocabulary that [`GateInput::lens_entropy_t`] is about, or as many where there are fewer. Tokenizers
/// number special tokens and single bytes first, and then what they merged first, which is most frequent.
pub const LENS_TOKENS: Range<usize> = 260..292;

/// Which signals a policy reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// See [`GateInput::hidden_td`].
    pub hidden: bool,
    /// See [`GateInput::gram_ee`].
    pub gram: bool,
    /// See [`GateInput::attention_entropy_t`].
    pub attention_entropy: bool,
    /// See [`GateInput::lens_entropy_t`].
    pub lens: bool,
    /// See [`super::StepTokens::surprisal_t`].
    pub surprisal: bool,
}

impl Signals {
    /// All of them.
    pub const ALL: Self = Self { hidden: true, gram: true, attention_entropy: true, lens: true, surprisal: true };

    /// Their names, as far as `have` lacks them.
    pub fn missing(self, have: Self) -> Vec<&'static str> {
        let all = [
            (self.hidden && !have.hidden, "hidden states"),
            (self.gram && !have.gram, "products of the gate's rows"),
            (self.attention_entropy && !have.attention_entropy, "attention entropy"),
            (self.lens && !have.lens, "an early read-out"),
            (self.surprisal && !have.surprisal, "surprisal"),
        ];
        all.into_iter().filter_map(|(missing, name)| missing.then_some(name)).collect()
    }
}

impl BitOr for Signals {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            hidden: self.hidden | other.hidden,
            gram: self.gram | other.gram,
            attention_entropy: self.attention_entropy | other.attention_entropy,
            lens: self.lens | other.lens,
            surprisal: self.surprisal | other.surprisal,
        }
    }
}

/// One layer's gate over the tokens of a step, with the signals that [`super::RouteCtx::signals`] asks for; the others
/// may be empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct GateInput<'a> {
    /// The gate's logits, `[T, E]`.
    pub logits_te: &'a [f32],
    /// The gate's input, `[T, D]`.
    pub hidden_td: &'a [f32],
    /// W·Wᵀ of the gate's weight W `[E, D]`: `[E, E]`.
    pub gram_ee: &'a [f32],
    /// Entropy of the layer's own attention, the mean over its heads, in nats, `[T]`.
    pub attention_entropy_t: &'a [f32],
    /// Entropy of the softmax of the logits that the residual stream, as it is here, gives M tokens of the vocabulary, by
    /// log M, `[T]`.
    pub lens_entropy_t: &'a [f32],
}

impl<'a> GateInput<'a> {
    /// The logits alone.
    pub fn logits(logits_te: &'a [f32]) -> Self {
        Self { logits_te, ..Default::default() }
    }

    /// What is there.
    pub(super) fn signals(&self) -> Signals {
        Signals {
            hidden: !self.hidden_td.is_empty(),
            gram: !self.gram_ee.is_empty(),
            attention_entropy: !self.attention_entropy_t.is_empty(),
            lens: !self.lens_entropy_t.is_empty(),
            surprisal: false,
        }
    }
}
