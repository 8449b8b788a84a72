//! `/v1/completions`.

use super::common::Common;
use super::fields::{Fields, Refused, RequestError};
use super::usage::{MoeTrace, UsageBody};
use crate::types::TokenId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A request. Absent fields are `None`; null is the same as absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompletionRequest {
    #[serde(flatten)]
    pub common: Common,
    pub prompt: Option<Prompt>,
    pub max_tokens: Option<usize>,
    /// Completions to choose the best `n` from, by mean log-probability of their tokens.
    pub best_of: Option<usize>,
    pub echo: Option<bool>,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// Write tokens of log-probabilities as `token_id:ID`: their texts need not be unique.
    pub return_tokens_as_token_ids: Option<bool>,
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

/// Fields of OpenAI's API that are not served.
const REFUSED: &[Refused] =
    &[Refused { field: "suffix", nothing: "\"\"", instead: " (its models only continue a prompt)" }];

impl CompletionRequest {
    /// Fields that are read beside the common ones.
    const FIELDS: &'static [&'static str] =
        &["prompt", "max_tokens", "best_of", "echo", "logprobs", "prompt_logprobs", "return_tokens_as_token_ids"];

    /// Reads a request body.
    ///
    /// # Errors
    /// Bytes that are no JSON object, a field of the wrong type, or one that is not known.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let mut fields = Fields::read(body)?;
        fields.refuse(REFUSED)?;
        fields.check_known(&[Self::FIELDS, Common::FIELDS])?;
        Ok(Self {
            common: Common::take(&mut fields)?,
            prompt: fields
                .take("prompt", "a string, an array of strings, an array of token ids, or an array of those")?,
            max_tokens: fields.take("max_tokens", "a whole number of at least 0")?,
            best_of: fields.take("best_of", "a whole number of at least 1")?,
            echo: fields.take("echo", "true or false")?,
            logprobs: fields.take("logprobs", "a whole number of at least 0")?,
            prompt_logprobs: fields.take("prompt_logprobs", "a whole number of at least 0")?,
            return_tokens_as_token_ids: fields.take("return_tokens_as_token_ids", "true or false")?,
        })
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
    pub logprobs: Option<Logprobs>,
    pub finish_reason: String,
    /// Per prompt token, its log-probability and those of the likeliest ones, by token id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_trace: Option<MoeTrace>,
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChunkChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_trace: Option<MoeTrace>,
}

/// Log-probabilities, one entry per token in each list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// Texts; `bytes:\x…` where a token is no text alone.
    pub tokens: Vec<String>,
    /// None of the first token of a prompt.
    pub token_logprobs: Vec<Option<f64>>,
    /// The likeliest tokens and the one that stands here; of two with the same text, the likelier.
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters before the token.
    pub text_offset: Vec<usize>,
}

/// An entry of `prompt_logprobs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprob {
    pub logprob: f32,
    /// 1 is the likeliest.
    pub rank: u32,
    pub decoded_token: String,
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
            ("[1]", None, "a JSON object"),
            (r#"{"prompt": "a", "seed": 1, "seed": 2}"#, None, "`seed` is given twice"),
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
            (r#"{"n": -2}"#, Some("n"), "got -2"),
            (r#"{"echo": 1}"#, Some("echo"), "true or false"),
            (r#"{"logprobs": true}"#, Some("logprobs"), "got true"),
            (r#"{"logit_bias": [5]}"#, Some("logit_bias"), "got [5]"),
            (r#"{"response_format": {"type": "yaml"}}"#, Some("response_format"), "json_schema"),
            (r#"{"suffix": "x"}"#, Some("suffix"), "not supported"),
            (r#"{"temprature": 1}"#, Some("temprature"), "unknown field `temprature`; known are prompt, max_tokens"),
        ] {
            let error = CompletionRequest::parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{body}");
            assert!(error.message.contains(text), "{body}: {}", error.message);
        }
    }

    #[test]
    fn null_and_values_that_ask_for_nothing_are_as_good_as_absent() {
        let body = r#"{"prompt": "a", "temperature": null, "suffix": "", "logprobs": null}"#;
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
        let mut known = [CompletionRequest::FIELDS, Common::FIELDS].concat();
        names.sort_unstable();
        known.sort_unstable();
        assert_eq!(names, known);
    }

    #[test]
    fn biases_are_read_by_token_id() {
        let biases = |json: &str| CompletionRequest::parse(json.as_bytes()).unwrap().common.biases();
        assert_eq!(biases(r#"{"logit_bias": {"5": 1, "7": -2.5}}"#), Ok(vec![(5, 1.0), (7, -2.5)]));
        assert!(biases(r#"{"logit_bias": {"five": 1}}"#).unwrap_err().message.contains("\"five\""));
        assert!(biases(r#"{"logit_bias": {"5": "x"}}"#).unwrap_err().message.contains("must be a number"));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = CompletionRequest::parse(&body);
        }
    }
}
