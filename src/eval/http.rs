//! A model behind an OpenAI-compatible server: this one, vLLM, llama.cpp and their like.
//!
//! Prompts are sent as token ids, so that the server's tokenizer has no say; log-likelihoods come from `echo` with
//! `logprobs`, as in lm-eval's `local-completions`.

use super::lm::{Chosen, Encoder, Generated, How, Lm, LmError, Scored};
use crate::engine::Text;
use crate::types::TokenId;
use serde_json::{Value, json};
use std::time::Duration;

/// Where the server is, and how to talk to it.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// `http://host:8000/v1`, with or without `/v1`.
    pub base_url: String,
    /// Name of the model in requests.
    pub model: String,
    pub api_key: Option<String>,
    /// Longest prompt and completion together, in tokens.
    pub max_length: usize,
}

/// A server that is evaluated.
pub struct Http {
    agent: ureq::Agent,
    options: HttpOptions,
    encoder: Encoder,
}

/// Attempts at one request beyond the first, where the server is busy or the connection broke.
const RETRIES: u32 = 5;
/// A server that says nothing for this long has hung.
const TIMEOUT: Duration = Duration::from_secs(600);

impl Http {
    /// Asks the server whether it is there. `text` is the model's tokenizer.
    ///
    /// # Errors
    /// A server that cannot be reached, or does not serve the model.
    pub fn connect(options: HttpOptions, text: Text) -> Result<Self, LmError> {
        let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false);
        let mut options = options;
        let bare = options.base_url.trim_end_matches('/').trim_end_matches("/v1");
        options.base_url = format!("{bare}/v1");
        let lm = Self { agent: config.build().new_agent(), options, encoder: Encoder::new(text) };
        let models = lm.attempt("models", None).map_err(Failure::into_error)?;
        let ids = models["data"].as_array().into_iter().flatten().filter_map(|m| m["id"].as_str());
        let ids: Vec<&str> = ids.collect();
        if !ids.is_empty() && !ids.contains(&lm.options.model.as_str()) {
            let (url, model) = (&lm.options.base_url, &lm.options.model);
            let served = ids.join(", ");
            return Err(LmError(format!("{url} does not serve {model:?} but {served}; give --served-model-name")));
        }
        Ok(lm)
    }

    /// One answer to `body`; without one, a GET.
    fn attempt(&self, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let url = format!("{}/{path}", self.options.base_url);
        let key = self.options.api_key.as_ref().map(|key| format!("Bearer {key}"));
        let sent = match body {
            None => {
                let request = self.agent.get(&url);
                key.iter().fold(request, |r, key| r.header("Authorization", key)).call()
            }
            Some(body) => {
                let request = self.agent.post(&url).header("Content-Type", "application/json");
                key.iter().fold(request, |r, key| r.header("Authorization", key)).send(body.to_string())
            }
        };
        let mut response = sent.map_err(|e| Failure::again(format!("{url}: {e}")))?;
        let status = response.status().as_u16();
        // Scored prompts with their log-probabilities are long.
        let read = response.body_mut().with_config().limit(1 << 30).read_to_string();
        let text = read.map_err(|e| Failure::again(format!("{url}: {e}")))?;
        let shown: String = text.chars().take(500).collect();
        if status != 200 {
            let message = format!("{url} answered {status}: {shown}");
            return Err(if status == 429 || status >= 500 {
                Failure::again(message)
            } else {
                Failure::refused(message)
            });
        }
        serde_json::from_str(&text).map_err(|e| Failure::refused(format!("{url} answered no JSON ({e}): {shown}")))
    }

    /// The first choice of the answer to `body`. A server that is busy, or a connection that broke, is asked again.
    fn complete(&self, mut body: Value, how: &How<'_>) -> Result<Value, LmError> {
        body["model"] = json!(self.options.model);
        body["temperature"] = json!(0);
        if let Some(router) = how.router {
            body["router"] = json!(router.to_string());
        }
        let mut attempt = 0;
        loop {
            match self.attempt("completions", Some(&body)) {
                Ok(mut answer) => {
                    let choice = answer.pointer_mut("/choices/0").map(Value::take);
                    return choice.ok_or_else(|| LmError(format!("an answer has no choice: {answer}")));
                }
                Err(failure) if failure.again && attempt < RETRIES => {
                    attempt += 1;
                    std::thread::sleep(Duration::from_millis(250 << attempt));
                }
                Err(failure) => return Err(failure.into_error()),
            }
        }
    }

    /// Log-probabilities of the tokens of `prompt` from `from` on.
    fn logprobs(&self, prompt: &[TokenId], from: usize, how: &How<'_>) -> Result<Vec<f64>, LmError> {
        let body = json!({"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": true, "seed": 1234});
        let choice = self.complete(body, how)?;
        let told = choice.pointer("/logprobs/token_logprobs").and_then(Value::as_array);
        let told = told.ok_or_else(|| LmError("the server tells no log-probabilities with echo".into()))?;
        // The prompt's, and one of the token that follows.
        if told.len() < prompt.len() || told.len() > prompt.len() + 1 {
            let (sent, told) = (prompt.len(), told.len());
            return Err(LmError(format!("the server told {told} log-probabilities of a prompt of {sent} tokens")));
        }
        let number = |v: &Value| v.as_f64().ok_or_else(|| LmError(format!("a log-probability is {v}")));
        told[from..prompt.len()].iter().map(number).collect()
    }
}

impl Lm for Http {
    fn max_length(&self) -> usize {
        // One token for what the API generates with every score, one for the last of a continuation, which the server
        // runs although nothing follows it.
        self.options.max_length.saturating_sub(2)
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, LmError> {
        self.encoder.encode(text)
    }

    fn text_bytes(&self, tokens: &[TokenId]) -> usize {
        self.encoder.bytes(tokens)
    }

    fn choose(&self, context: &[TokenId], continuations: &[Vec<TokenId>], how: &How<'_>) -> Result<Chosen, LmError> {
        let mut log_likelihoods = Vec::with_capacity(continuations.len());
        for continuation in continuations {
            let whole = [context, continuation].concat();
            let logprobs = self.logprobs(&whole, context.len(), how)?;
            log_likelihoods.push(logprobs.iter().sum());
        }
        Ok(Chosen { log_likelihoods, routed: None })
    }

    fn generate(
        &self,
        prompt: &[TokenId],
        until: &[String],
        max_tokens: usize,
        how: &How<'_>,
    ) -> Result<Generated, LmError> {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "stop": until, "seed": 1234});
        let choice = self.complete(body, how)?;
        let text = choice["text"].as_str().ok_or_else(|| LmError("a choice has no text".into()))?;
        // Some servers leave the stop string in.
        let end = until.iter().filter_map(|stop| text.find(stop.as_str())).min();
        Ok(Generated { text: text[..end.unwrap_or(text.len())].into(), routed: None })
    }

    fn score(&self, window: &[TokenId], how: &How<'_>) -> Result<Scored, LmError> {
        Ok(Scored { logprobs: self.logprobs(window, 1, how)?, routed: None })
    }
}

/// Why there was no answer, and whether asking again may help.
struct Failure {
    message: String,
    again: bool,
}

impl Failure {
    fn again(message: String) -> Self {
        Self { message, again: true }
    }

    fn refused(message: String) -> Self {
        Self { message, again: false }
    }

    fn into_error(self) -> LmError {
        LmError(self.message)
    }
}
