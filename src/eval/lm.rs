//! What an evaluation needs of a language model, wherever it runs.

use crate::engine::Text;
use crate::types::{RouterSpec, TokenId};
use serde::{Deserialize, Serialize};

/// A language model that is evaluated: an engine in this process, or a server.
pub trait Lm: Send + Sync {
    /// Longest prompt and completion together, in tokens.
    fn max_length(&self) -> usize;

    /// Token ids of a prompt, with the special tokens that the checkpoint's tokenizer begins with.
    ///
    /// # Errors
    /// A text the tokenizer cannot take.
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, LmError>;

    /// Bytes of the text of `tokens`.
    fn text_bytes(&self, tokens: &[TokenId]) -> usize;

    /// Log-likelihood in nats of each continuation after `context`; none is empty. Of the last token of a
    /// continuation only the probability is needed: context and continuation less one token fit the model.
    ///
    /// # Errors
    /// Whatever kept the model from answering: never a wrong answer.
    fn choose(&self, context: &[TokenId], continuations: &[Vec<TokenId>], how: &How<'_>) -> Result<Chosen, LmError>;

    /// The greedy completion of `prompt`, of at most `max_tokens`, cut before the first of the texts in `until`.
    ///
    /// # Errors
    /// As for [`Self::choose`].
    fn generate(
        &self,
        prompt: &[TokenId],
        until: &[String],
        max_tokens: usize,
        how: &How<'_>,
    ) -> Result<Generated, LmError>;

    /// Log-probability of every token of `window` but the first.
    ///
    /// # Errors
    /// As for [`Self::choose`].
    fn score(&self, window: &[TokenId], how: &How<'_>) -> Result<Scored, LmError>;

    /// Log-probabilities of the whole vocabulary after each prefix of `prompt` of at least `from` tokens; `None` where
    /// the model cannot tell.
    ///
    /// # Errors
    /// As for [`Self::choose`].
    fn distributions(
        &self,
        _prompt: &[TokenId],
        _from: usize,
        _router: &RouterSpec,
    ) -> Result<Option<Vec<Vec<f32>>>, LmError> {
        Ok(None)
    }

    /// Bytes of unique expert weights read so far, in all steps; `None` where the model does not tell.
    ///
    /// # Errors
    /// As for [`Self::choose`].
    fn expert_reads(&self) -> Result<Option<Reads>, LmError> {
        Ok(None)
    }
}

/// How one request is to be run.
#[derive(Clone, Copy, Debug, Default)]
pub struct How<'a> {
    /// The model's own router without it.
    pub router: Option<&'a RouterSpec>,
    /// Tokens at the prompt's start that other prompts share: they may come from a cache and are not counted.
    pub shared: usize,
}

/// Bytes of unique expert weights that steps read, and that native routing of the same tokens would have read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reads {
    pub ran: f64,
    pub native: f64,
}

impl Reads {
    /// Reads the two counters off `metrics` in Prometheus' text format; `None` where they are not there.
    pub fn parse(metrics: &str) -> Option<Self> {
        let value = |name| series(metrics, name);
        Some(Self { ran: value("moe_expert_read_bytes_total")?, native: value("moe_expert_read_bytes_native_total")? })
    }
}

/// The value of the series called `name`, labels included, in `metrics` in Prometheus' text format.
pub(super) fn series(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.parse().ok()
}

/// Why a model gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LmError(pub String);

/// A tokenizer that encodes as lm-eval does, texts of any length.
pub(super) struct Encoder {
    text: Text,
    /// Name of the token that the tokenizer begins every text with, if it does.
    bos: Option<Vec<u8>>,
}

impl Encoder {
    pub(super) fn new(text: Text) -> Self {
        let first = text.encode("", true).ok().and_then(|ids| ids.first().copied());
        let bos = first.map(|id| text.token_bytes(id).to_vec());
        Self { text, bos }
    }

    /// Token ids, with special tokens unless the text names the first one itself.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<TokenId>, LmError> {
        let named = self.bos.as_ref().is_some_and(|bos| text.as_bytes().starts_with(bos));
        self.text.encode(text, !named).map_err(|e| LmError(e.to_string()))
    }

    /// Bytes of the text of `tokens`.
    pub(super) fn bytes(&self, tokens: &[TokenId]) -> usize {
        tokens.iter().map(|id| self.text.token_bytes(*id).len()).sum()
    }
}

/// Answer to [`Lm::choose`].
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// In nats, one per continuation.
    pub log_likelihoods: Vec<f64>,
    pub routed: Option<Routed>,
}

/// Answer to [`Lm::generate`].
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    pub text: String,
    pub routed: Option<Routed>,
}

/// Answer to [`Lm::score`].
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// In nats, one per token but the first.
    pub logprobs: Vec<f64>,
    pub routed: Option<Routed>,
}

/// What routing did to the tokens of a request beyond its shared ones. Adds up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routed {
    pub tokens: u64,
    /// Σk per MoE layer.
    pub rows_l: Vec<u64>,
    /// How often a (token, layer) used k experts, index k; as long as needed.
    pub k_histogram: Vec<u64>,
    /// Scope `experts`: `[ran, native]`.
    pub expert_flops: [u64; 2],
    /// Scope `forward`: `[ran, native]`.
    pub forward_flops: [u64; 2],
}

impl Routed {
    /// Adds what `other` counts.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        add_all(&mut self.rows_l, &other.rows_l);
        add_all(&mut self.k_histogram, &other.k_histogram);
        for scope in 0..2 {
            self.expert_flops[scope] += other.expert_flops[scope];
            self.forward_flops[scope] += other.forward_flops[scope];
        }
    }

    /// Mean over tokens and MoE layers; 0 where nothing ran.
    pub fn mean_k(&self) -> f64 {
        let visits = self.tokens * self.rows_l.len() as u64;
        self.rows_l.iter().sum::<u64>() as f64 / visits.max(1) as f64
    }
}

/// Adds element by element, to a list that grows as needed.
fn add_all(to: &mut Vec<u64>, from: &[u64]) {
    to.resize(to.len().max(from.len()), 0);
    to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
}
