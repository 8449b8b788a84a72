//! `/v1/completions`.

use crate::types::{TokenId, Usage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A request. Absent fields are `None`; null is the same as absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionRequest {
    pub model: Option<String>,
    pub prompt: Option<Prompt>,
    pub max_tokens: Option<usize>,
    pub min_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 and −1 are off.
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<TokenId>>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub user: Option<String>,
}

/// `stream_options`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamOptions {
    /// Send a last chunk with the usage.
    pub include_usage: bool,
}

/// A prompt, or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
    Many(Vec<PromptItem>),
}

/// One of several prompts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PromptItem {
    Text(String),
    Tokens(Vec<TokenId>),
}

impl Prompt {
    /// The prompts, one by one.
    pub fn items(self) -> Vec<PromptItem> {
        match self {
            Self::Text(text) => vec![PromptItem::Text(text)],
            Self::Tokens(ids) => vec![PromptItem::Tokens(ids)],
            Self::Many(items) => items,
        }
    }
}

/// A stop string, or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Stop {
    /// All of them.
    pub fn list(self) -> Vec<String> {
        match self {
            Self::One(stop) => vec![stop],
            Self::Many(stops) => stops,
        }
    }
}

/// Why a body is no valid request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    pub param: Option<String>,
    pub message: String,
}

/// Fields of OpenAI's API and its usual extensions that are not served, with the value that asks for nothing.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("n", "1"),
    ("best_of", "1"),
    ("echo", "false"),
    ("logprobs", "null"),
    ("prompt_logprobs", "null"),
    ("logit_bias", "{}"),
    ("suffix", "\"\""),
];

impl CompletionRequest {
    /// Fields that are read.
    const FIELDS: &'static [&'static str] = &[
        "model",
        "prompt",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "stream",
        "stream_options",
        "user",
    ];

    /// Reads a request body.
    ///
    /// # Errors
    /// Bytes that are no JSON object, a field of the wrong type, or a field that is not known: it might change the
    /// meaning, so it is not ignored.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let whole = |message: String| RequestError { param: None, message };
        let value: Value =
            serde_json::from_slice(body).map_err(|e| whole(format!("the body is not valid JSON: {e}")))?;
        let Value::Object(mut fields) = value else {
            return Err(whole("the body must be a JSON object".into()));
        };
        fields.retain(|_, value| !value.is_null());
        for (field, nothing) in UNSUPPORTED {
            if let Some(value) = fields.remove(*field)
                && value.to_string().as_str() != *nothing
            {
                let message = format!(
                    "{field} is not supported by this server; leave it out or give {nothing}; got {}",
                    shown(&value)
                );
                return Err(RequestError { param: Some((*field).into()), message });
            }
        }
        if let Some(field) = fields.keys().find(|f| !Self::FIELDS.contains(&f.as_str())) {
            let field = cut(field);
            let message = format!("unknown field `{field}`; known are {}", Self::FIELDS.join(", "));
            return Err(RequestError { param: Some(field), message });
        }
        Self::typed(fields)
    }

    fn typed(mut fields: Map<String, Value>) -> Result<Self, RequestError> {
        Ok(Self {
            model: get(&mut fields, "model", "a string")?,
            prompt: get(
                &mut fields,
                "prompt",
                "a string, an array of strings, an array of token ids, or an array of those",
            )?,
            max_tokens: get(&mut fields, "max_tokens", "a whole number of at least 1")?,
            min_tokens: get(&mut fields, "min_tokens", "a whole number of at least 0")?,
            temperature: get(&mut fields, "temperature", "a number")?,
            top_p: get(&mut fields, "top_p", "a number")?,
            top_k: get(&mut fields, "top_k", "a whole number, 0 or -1 for off")?,
            min_p: get(&mut fields, "min_p", "a number")?,
            presence_penalty: get(&mut fields, "presence_penalty", "a number")?,
            frequency_penalty: get(&mut fields, "frequency_penalty", "a number")?,
            repetition_penalty: get(&mut fields, "repetition_penalty", "a number")?,
            seed: get(&mut fields, "seed", "a whole number of 64 bits")?,
            stop: get(&mut fields, "stop", "a string or an array of strings")?,
            stop_token_ids: get(&mut fields, "stop_token_ids", "an array of token ids")?,
            ignore_eos: get(&mut fields, "ignore_eos", "true or false")?,
            skip_special_tokens: get(&mut fields, "skip_special_tokens", "true or false")?,
            stream: get(&mut fields, "stream", "true or false")?,
            stream_options: get(
                &mut fields,
                "stream_options",
                "an object with `include_usage`, true or false, and nothing else",
            )?,
            user: get(&mut fields, "user", "a string")?,
        })
    }
}

/// Takes a field out: bodies can be large, so values are not copied but for the message about a wrong one.
fn get<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    field: &str,
    expected: &str,
) -> Result<Option<T>, RequestError> {
    let Some(value) = fields.get_mut(field) else { return Ok(None) };
    // The beginning of a long array tells as much as all of it.
    let head = match &*value {
        Value::Array(items) => Value::Array(items.iter().take(40).cloned().collect()),
        other => other.clone(),
    };
    serde_json::from_value(value.take()).map(Some).map_err(|_| RequestError {
        param: Some(field.into()),
        message: format!("{field} must be {expected}; got {}", shown(&head)),
    })
}

/// A value as it was given, cut to a length that fits a message.
fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// What a request used. `moe` is an addition to OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UsageBody {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub moe: MoeUsage,
}

/// What dynamic routing did: ratios against native routing of the same tokens, below zero when it cost more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeUsage {
    /// Mean over tokens (of prompt and completion) and MoE layers.
    pub experts_per_token: f64,
    pub expert_flops_saved: f64,
    pub forward_flops_saved: f64,
}

impl From<&Usage> for UsageBody {
    fn from(usage: &Usage) -> Self {
        let work = &usage.work;
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            moe: MoeUsage {
                experts_per_token: work.experts_per_token(),
                expert_flops_saved: work.experts.saved(),
                forward_flops_saved: work.forward.saved(),
            },
        }
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompletionResponse {
    pub id: String,
    /// `text_completion`
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<Choice>,
    pub usage: UsageBody,
}

/// One completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<Value>,
    pub finish_reason: String,
}

/// A piece of a streamed answer; the last one, if asked for, has no choices but the usage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Chunk {
    pub id: String,
    /// `text_completion`
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageBody>,
}

/// A piece of one completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChunkChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<Value>,
    pub finish_reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prompts_of_all_four_kinds_are_read() {
        let prompt = |json: &str| CompletionRequest::parse(json.as_bytes()).unwrap().prompt.unwrap().items();
        let text = |t: &str| PromptItem::Text(t.into());
        assert_eq!(prompt(r#"{"prompt": "a"}"#), [text("a")]);
        assert_eq!(prompt(r#"{"prompt": ["a", "b"]}"#), [text("a"), text("b")]);
        assert_eq!(prompt(r#"{"prompt": [1, 2]}"#), [PromptItem::Tokens(vec![1, 2])]);
        assert_eq!(
            prompt(r#"{"prompt": [[1], [2, 3]]}"#),
            [PromptItem::Tokens(vec![1]), PromptItem::Tokens(vec![2, 3])]
        );
    }

    #[test]
    fn a_bad_body_names_the_field_and_what_was_given() {
        for (body, param, text) in [
            ("", None, "not valid JSON"),
            ("{\"prompt\": \"a\"", None, "not valid JSON"),
            ("[1]", None, "must be a JSON object"),
            (r#"{"prompt": 3}"#, Some("prompt"), "got 3"),
            (r#"{"prompt": [-1]}"#, Some("prompt"), "got [-1]"),
            (r#"{"prompt": [1, "a"]}"#, Some("prompt"), "array of strings"),
            (r#"{"temperature": "hot"}"#, Some("temperature"), "must be a number; got \"hot\""),
            (r#"{"max_tokens": -3}"#, Some("max_tokens"), "got -3"),
            (r#"{"max_tokens": 1.5}"#, Some("max_tokens"), "got 1.5"),
            (r#"{"seed": 1e30}"#, Some("seed"), "64 bits"),
            (r#"{"stream": "yes"}"#, Some("stream"), "true or false"),
            (r#"{"stream_options": {"usage": true}}"#, Some("stream_options"), "include_usage"),
            (r#"{"stop": [1]}"#, Some("stop"), "array of strings"),
            (r#"{"n": 2}"#, Some("n"), "n is not supported by this server; leave it out or give 1; got 2"),
            (r#"{"echo": true}"#, Some("echo"), "give false"),
            (r#"{"logprobs": 1}"#, Some("logprobs"), "got 1"),
            (r#"{"logit_bias": {"5": 1}}"#, Some("logit_bias"), "got {\"5\":1}"),
            (r#"{"temprature": 1}"#, Some("temprature"), "unknown field `temprature`; known are model, prompt"),
        ] {
            let error = CompletionRequest::parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{body}");
            assert!(error.message.contains(text), "{body}: {}", error.message);
        }
    }

    #[test]
    fn null_and_values_that_ask_for_nothing_are_as_good_as_absent() {
        let body = r#"{"prompt": "a", "temperature": null, "n": 1, "echo": false, "logprobs": null, "logit_bias": {}, "best_of": 1}"#;
        let request = CompletionRequest::parse(body.as_bytes()).unwrap();
        let want = CompletionRequest { prompt: Some(Prompt::Text("a".into())), ..Default::default() };
        assert_eq!(request, want);
    }

    #[test]
    fn every_field_of_the_struct_is_a_known_field() {
        let Value::Object(fields) = serde_json::to_value(CompletionRequest::default()).unwrap() else {
            panic!("an object")
        };
        let mut names: Vec<&str> = fields.keys().map(String::as_str).collect();
        let mut known = CompletionRequest::FIELDS.to_vec();
        names.sort_unstable();
        known.sort_unstable();
        assert_eq!(names, known);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = CompletionRequest::parse(&body);
        }
    }
}
