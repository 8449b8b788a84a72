//! A generation request, its limits, and what it used. [`GenerateRequest::check`] stands before every queue.

use super::{RouterSpec, TokenId, Work};
use std::sync::Arc;

/// How the next token is drawn. [`GenerateRequest::check`] knows the ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens whose probability reaches this; 1 is off.
    pub top_p: f32,
    /// The k most likely tokens; 0 is off.
    pub top_k: u32,
    /// Tokens of at least this share of the most likely token's probability; 0 is off.
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted for every time a token was already generated.
    pub frequency_penalty: f32,
    /// Divides (or, below zero, multiplies) the logit of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens, at most once each.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Draws are reproducible with it; without, every request draws anew. Completion i of a request draws with
    /// seed + i.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    /// OpenAI's defaults.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// What the text of a completion must be. Texts are shared, since every prompt and completion has the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that a JSON schema (as text) allows.
    JsonSchema(Arc<str>),
    /// A grammar in llguidance's dialect of Lark.
    Lark(Arc<str>),
}

/// Which prompt tokens are scored: how likely the model finds them after what stands before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptScoring {
    /// Likeliest alternatives to tell of each.
    pub top: usize,
    /// Index of the first token scored; what stands before it can come from the prefix cache. The first token of a
    /// prompt has nothing before it and no score.
    pub from: usize,
    /// Whether to tell the log-probabilities of the whole vocabulary at every scored token, and after the last one.
    pub whole: bool,
}

/// One prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Not empty; every id is in the vocabulary.
    pub prompt: Vec<TokenId>,
    /// Completions of this one prompt, at least 1.
    pub n: usize,
    /// Prompt and completion together fit the context; 0 only computes (and scores) the prompt.
    pub max_tokens: usize,
    /// No end by EOS or a stop before this many tokens.
    pub min_tokens: usize,
    pub sampling: SamplingParams,
    /// Texts that end the completion; never part of it.
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<TokenId>,
    pub ignore_eos: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// Log-probabilities wanted of every generated token, and of this many of the likeliest ones beside it.
    pub logprobs: Option<usize>,
    pub scoring: Option<PromptScoring>,
    /// Whether to tell the experts used per token and MoE layer.
    pub trace: bool,
    /// Prompt tokens from this one on are computed even where the prefix cache has them, so that a trace has them all.
    pub reuse_max: Option<usize>,
    /// What the text must be.
    pub grammar: Option<GrammarSpec>,
    /// Requests share cached prefixes only with those of the same salt.
    pub cache_salt: String,
    /// Router of this request alone; the server's own without it.
    pub router: Option<RouterSpec>,
    /// Version of the server's own router, where that keeps a budget ([`super::BudgetState`]); the latest without it.
    pub budget_version: Option<u64>,
}

/// What a request may ask of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub vocab: usize,
    /// Prompt and completion together.
    pub max_model_len: usize,
}

/// Completions of one prompt.
pub const N_MAX: usize = 128;
/// Alternatives to a token whose log-probabilities can be asked for.
pub const LOGPROBS_MAX: usize = 20;
/// Completions of one prompt that are held to a grammar: each has a state of its own.
const GRAMMAR_N_MAX: usize = 16;
/// Tokens whose logits one request can bias.
const BIASES_MAX: usize = 1024;
/// Bytes of a cache salt.
const SALT_BYTES_MAX: usize = 256;
/// Stop strings accepted in one request. OpenAI's API has 4; evaluation harnesses send some more.
const STOP_STRINGS_MAX: usize = 16;
/// Bytes of one stop string.
const STOP_BYTES_MAX: usize = 256;
/// Stop token ids accepted in one request.
const STOP_IDS_MAX: usize = 64;

/// A parameter outside its limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LimitError {
    pub param: &'static str,
    pub message: String,
}

fn within(param: &'static str, value: f32, low: f32, high: f32) -> Result<(), LimitError> {
    if value >= low && value <= high {
        return Ok(());
    }
    let message = format!("{param} must be between {low} and {high}; got {value}");
    Err(LimitError { param, message })
}

impl GenerateRequest {
    /// A greedy request for `max_tokens` tokens after `prompt`.
    pub fn greedy(prompt: Vec<TokenId>, max_tokens: usize) -> Self {
        Self {
            prompt,
            n: 1,
            max_tokens,
            min_tokens: 0,
            sampling: SamplingParams { temperature: 0.0, ..Default::default() },
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
            logprobs: None,
            scoring: None,
            trace: false,
            reuse_max: None,
            grammar: None,
            cache_salt: String::new(),
            router: None,
            budget_version: None,
        }
    }

    /// Checks every field against its own range and the server's `limits`.
    ///
    /// # Errors
    /// The first field that is out of range, with the limit and what was given.
    pub fn check(&self, limits: &Limits) -> Result<(), LimitError> {
        let refuse = |param, message| Err(LimitError { param, message });
        let (n, max) = (self.prompt.len(), limits.max_model_len);
        if n == 0 {
            return refuse("prompt", "prompt is empty: it must hold at least one token".into());
        }
        let least = usize::from(self.max_tokens > 0);
        if n + least > max {
            let message = format!(
                "prompt has {n} tokens, but the context of this model is {max} tokens, completion included: shorten the \
                 prompt to at most {} tokens",
                max - least
            );
            return refuse("prompt", message);
        }
        if let Some(id) = self.prompt.iter().find(|&&id| id as usize >= limits.vocab) {
            let last = limits.vocab - 1;
            return refuse("prompt", format!("prompt holds token id {id}; ids of this model are 0 to {last}"));
        }
        if self.max_tokens > max - n {
            let message = format!(
                "max_tokens must be at most {} (context of {max} tokens less {n} of the prompt); got {}",
                max - n,
                self.max_tokens
            );
            return refuse("max_tokens", message);
        }
        if self.n == 0 || self.n > N_MAX {
            return refuse("n", format!("n must be between 1 and {N_MAX}; got {}", self.n));
        }
        if self.min_tokens > self.max_tokens {
            let (min, max) = (self.min_tokens, self.max_tokens);
            return refuse("min_tokens", format!("min_tokens must be at most max_tokens ({max}); got {min}"));
        }
        for (param, top) in [("logprobs", self.logprobs), ("prompt_logprobs", self.scoring.map(|s| s.top))] {
            if let Some(top) = top.filter(|top| *top > LOGPROBS_MAX) {
                return refuse(param, format!("{param} must be between 0 and {LOGPROBS_MAX}; got {top}"));
            }
        }
        if self.grammar.is_some() && self.n > GRAMMAR_N_MAX {
            let n = self.n;
            return refuse("n", format!("n must be at most {GRAMMAR_N_MAX} where the output is held to JSON; got {n}"));
        }
        let salt = self.cache_salt.len();
        if salt > SALT_BYTES_MAX {
            return refuse("cache_salt", format!("cache_salt has at most {SALT_BYTES_MAX} bytes; got {salt}"));
        }
        self.sampling.check(limits)?;
        self.check_stops(limits)
    }

    fn check_stops(&self, limits: &Limits) -> Result<(), LimitError> {
        let refuse = |param, message| Err(LimitError { param, message });
        let n = self.stop.len();
        if n > STOP_STRINGS_MAX {
            return refuse("stop", format!("stop takes at most {STOP_STRINGS_MAX} strings; got {n}"));
        }
        for stop in &self.stop {
            let n = stop.len();
            if n == 0 || n > STOP_BYTES_MAX {
                return refuse("stop", format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes; got {n}"));
            }
        }
        let n = self.stop_token_ids.len();
        if n > STOP_IDS_MAX {
            return refuse("stop_token_ids", format!("stop_token_ids takes at most {STOP_IDS_MAX} ids; got {n}"));
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= limits.vocab) {
            let message = format!("stop_token_ids holds {id}; ids of this model are 0 to {}", limits.vocab - 1);
            return refuse("stop_token_ids", message);
        }
        Ok(())
    }
}

impl SamplingParams {
    fn check(&self, limits: &Limits) -> Result<(), LimitError> {
        let refuse = |message| Err(LimitError { param: "logit_bias", message });
        if self.logit_bias.len() > BIASES_MAX {
            let n = self.logit_bias.len();
            return refuse(format!("logit_bias takes at most {BIASES_MAX} tokens; got {n}"));
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= limits.vocab {
                return refuse(format!("logit_bias holds token {id}; ids of this model are 0 to {}", limits.vocab - 1));
            }
            within("logit_bias", *bias, -100.0, 100.0)?;
        }
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        if self.top_p == 0.0 {
            let message = "top_p must be above 0 and at most 1; for greedy decoding use temperature 0".into();
            return Err(LimitError { param: "top_p", message });
        }
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
    }
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// EOS, a stop token or a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

impl FinishReason {
    /// The API's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a finished request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of several completions of one prompt, the first one has them all.
    pub prompt_tokens: usize,
    /// Prompt tokens that the prefix cache had: they took no work.
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    /// Of prompt and completion: what was computed, also what had to be recomputed, and not what was cached.
    pub work: Work,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(request: &GenerateRequest, top: usize) -> GenerateRequest {
        GenerateRequest { scoring: Some(PromptScoring { top, from: 1, whole: false }), ..request.clone() }
    }

    #[test]
    fn every_limit_names_the_field_the_limit_and_the_value() {
        let limits = Limits { vocab: 100, max_model_len: 32 };
        let ok = GenerateRequest::greedy(vec![1, 2, 3], 8);
        assert_eq!(ok.check(&limits), Ok(()));
        assert_eq!(GenerateRequest { prompt: vec![1; 32], max_tokens: 0, ..ok.clone() }.check(&limits), Ok(()));
        let sampling = |edit: fn(&mut SamplingParams)| {
            let mut request = ok.clone();
            edit(&mut request.sampling);
            request
        };
        let cases: Vec<(GenerateRequest, &str, &str)> = vec![
            (GenerateRequest { prompt: vec![], ..ok.clone() }, "prompt", "at least one token"),
            (GenerateRequest { prompt: vec![1; 32], ..ok.clone() }, "prompt", "at most 31 tokens"),
            (GenerateRequest { prompt: vec![100], ..ok.clone() }, "prompt", "0 to 99"),
            (GenerateRequest { prompt: vec![1; 33], max_tokens: 0, ..ok.clone() }, "prompt", "at most 32 tokens"),
            (GenerateRequest { max_tokens: 30, ..ok.clone() }, "max_tokens", "at most 29"),
            (GenerateRequest { n: 0, ..ok.clone() }, "n", "between 1 and 128; got 0"),
            (
                GenerateRequest { n: 17, grammar: Some(GrammarSpec::JsonObject), ..ok.clone() },
                "n",
                "at most 16 where the output is held to JSON",
            ),
            (GenerateRequest { n: 129, ..ok.clone() }, "n", "between 1 and 128; got 129"),
            (GenerateRequest { logprobs: Some(21), ..ok.clone() }, "logprobs", "between 0 and 20; got 21"),
            (scored(&ok, 21), "prompt_logprobs", "between 0 and 20; got 21"),
            (GenerateRequest { cache_salt: "x".repeat(257), ..ok.clone() }, "cache_salt", "256 bytes; got 257"),
            (sampling(|s| s.logit_bias = vec![(100, 1.0)]), "logit_bias", "0 to 99"),
            (sampling(|s| s.logit_bias = vec![(1, -101.0)]), "logit_bias", "between -100 and 100; got -101"),
            (sampling(|s| s.logit_bias = vec![(1, 1.0); 1025]), "logit_bias", "at most 1024 tokens; got 1025"),
            (GenerateRequest { min_tokens: 9, ..ok.clone() }, "min_tokens", "got 9"),
            (sampling(|s| s.temperature = 2.5), "temperature", "between 0 and 2; got 2.5"),
            (sampling(|s| s.temperature = f32::NAN), "temperature", "NaN"),
            (sampling(|s| s.top_p = 0.0), "top_p", "above 0"),
            (sampling(|s| s.min_p = -0.1), "min_p", "got -0.1"),
            (sampling(|s| s.presence_penalty = 3.0), "presence_penalty", "got 3"),
            (sampling(|s| s.frequency_penalty = -3.0), "frequency_penalty", "got -3"),
            (sampling(|s| s.repetition_penalty = 0.0), "repetition_penalty", "got 0"),
            (GenerateRequest { stop: vec!["a".into(); 17], ..ok.clone() }, "stop", "at most 16 strings; got 17"),
            (GenerateRequest { stop: vec![String::new()], ..ok.clone() }, "stop", "1 to 256"),
            (GenerateRequest { stop_token_ids: vec![100], ..ok.clone() }, "stop_token_ids", "0 to 99"),
            (GenerateRequest { stop_token_ids: vec![1; 65], ..ok.clone() }, "stop_token_ids", "at most 64"),
        ];
        for (request, param, text) in cases {
            let error = request.check(&limits).unwrap_err();
            assert_eq!(error.param, param);
            assert!(error.message.contains(text), "{param}: {}", error.message);
        }
    }
}
