//! What the engine offers: submit a request, read its events.

pub use super::events::{EventSender, Events};

use crate::types::{
    BudgetState, FinishReason, GenerateRequest, LimitError, Limits, RouterSpec, SpecError, TokenId, Usage,
};

/// Something that generates: the engine, or a scripted double in tests.
pub trait Generate: Send + Sync {
    /// What is served.
    fn info(&self) -> &ModelInfo;

    /// Token ids of a text; where asked for, with the special tokens that the checkpoint's tokenizer adds.
    ///
    /// # Errors
    /// A text the tokenizer cannot take, or one too long for the context whatever its tokens are.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, String>;

    /// The text that each token adds to those before it; all together, the text of `ids`.
    fn pieces(&self, ids: &[TokenId], skip_special_tokens: bool) -> Vec<String>;

    /// The id of the special token with this name.
    fn special_token(&self, name: &str) -> Option<TokenId>;

    /// The bytes that a token stands for, alone; of a special token, its name.
    fn token_bytes(&self, id: TokenId) -> Vec<u8>;

    /// Queues a request. Dropping the [`Events`] abandons it: its sequence is gone within a step.
    ///
    /// # Errors
    /// A request outside the limits, a full queue, or an engine that is stopping.
    fn submit(&self, request: GenerateRequest) -> Result<Events, SubmitError>;

    /// What a request gets now that names no router, if the server's own keeps a budget.
    fn budget(&self) -> Option<BudgetState> {
        None
    }

    /// Whether requests are accepted.
    fn ready(&self) -> bool;

    /// The series of this generator in Prometheus' text format.
    fn metrics(&self) -> String;
}

/// What is served, as clients may know it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Name that requests give.
    pub name: String,
    /// The default router.
    pub router: RouterSpec,
    /// What it means for this model, in words.
    pub router_means: String,
    pub limits: Limits,
    /// Completions that can be unfinished at the same time.
    pub unfinished_max: usize,
    /// Seconds since 1970.
    pub created: u64,
}

/// Why a request was not queued.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Router(#[from] SpecError),
    #[error("the server is busy: {unfinished} completions are unfinished and {limit} is the limit; try again later")]
    QueueFull { unfinished: usize, limit: usize },
    /// What the text must be is no valid grammar or schema.
    #[error("{message}")]
    Grammar {
        /// Whether it was made of the request's tools.
        tools: bool,
        message: String,
    },
    #[error("{0}")]
    Busy(String),
    #[error("the server is shutting down")]
    Stopping,
}

/// What happens to a request. Of every completion, in order: texts, then one end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Of the prompt what was asked for, before all else.
    Prompt(PromptReport),
    /// More text of completion `choice`: whole characters, never a part of a stop string.
    Text { choice: usize, text: String, tokens: Vec<TokenReport> },
    /// The end of completion `choice`, with what it used.
    Done { choice: usize, reason: FinishReason, usage: Usage },
    /// The end of all because the engine failed; the message is for the client.
    Failed(String),
}

/// What was asked for of the prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptReport {
    /// Of every prompt token, if scores were asked for; none of the first and of those before the first wanted.
    pub scores: Vec<Option<TokenScore>>,
    /// If asked for, the log-probabilities of the whole vocabulary at every scored token, and after the last token.
    pub distributions: Vec<Vec<f32>>,
    /// Experts used per MoE layer by the pass over every prompt token, if a trace was asked for; none of cached ones.
    pub experts: Vec<Option<Vec<u16>>>,
}

/// A generated token, told if log-probabilities or a trace were asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenReport {
    pub id: TokenId,
    /// Characters of the completion before it.
    pub offset: usize,
    pub score: Option<TokenScore>,
    /// Experts used per MoE layer by the pass that drew it, if a trace was asked for.
    pub experts: Vec<u16>,
}

/// How likely the model found a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 is the likeliest.
    pub rank: u32,
    /// The likeliest tokens and their log-probabilities, likeliest first.
    pub top: Vec<(TokenId, f32)>,
}
