//! The fields that completions and chat completions share.

use super::fields::{Fields, RequestError, quoted};
use crate::types::TokenId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How to generate. Absent fields are `None`; null is the same as absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Common {
    pub model: Option<String>,
    pub n: Option<usize>,
    pub min_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 and −1 are off.
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// By token id, written as JSON has to write keys.
    pub logit_bias: Option<Map<String, Value>>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<TokenId>>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub response_format: Option<ResponseFormat>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub cache_salt: Option<String>,
    pub router: Option<String>,
    pub moe_trace: Option<bool>,
    /// For the caller's own records; without effect.
    pub user: Option<String>,
}

impl Common {
    /// Fields that are read.
    pub(super) const FIELDS: &'static [&'static str] = &[
        "model",
        "n",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "response_format",
        "stream",
        "stream_options",
        "cache_salt",
        "router",
        "moe_trace",
        "user",
    ];

    pub(super) fn take(fields: &mut Fields) -> Result<Self, RequestError> {
        Ok(Self {
            model: fields.take("model", "a string")?,
            n: fields.take("n", "a whole number of at least 1")?,
            min_tokens: fields.take("min_tokens", "a whole number of at least 0")?,
            temperature: fields.take("temperature", "a number")?,
            top_p: fields.take("top_p", "a number")?,
            top_k: fields.take("top_k", "a whole number, 0 or -1 for off")?,
            min_p: fields.take("min_p", "a number")?,
            presence_penalty: fields.take("presence_penalty", "a number")?,
            frequency_penalty: fields.take("frequency_penalty", "a number")?,
            repetition_penalty: fields.take("repetition_penalty", "a number")?,
            logit_bias: fields.take("logit_bias", "an object from token ids to numbers")?,
            seed: fields.take("seed", "a whole number of 64 bits")?,
            stop: fields.take("stop", "a string or an array of strings")?,
            stop_token_ids: fields.take("stop_token_ids", "an array of token ids")?,
            ignore_eos: fields.take("ignore_eos", "true or false")?,
            skip_special_tokens: fields.take("skip_special_tokens", "true or false")?,
            response_format: fields.take(
                "response_format",
                "{\"type\": \"text\"}, {\"type\": \"json_object\"} or {\"type\": \"json_schema\", \"json_schema\": {\"name\": …, \"schema\": {…}}}",
            )?,
            stream: fields.take("stream", "true or false")?,
            stream_options: fields.take(
                "stream_options",
                "an object with `include_usage`, true or false",
            )?,
            cache_salt: fields.take("cache_salt", "a string")?,
            router: fields.take("router", "a string such as \"dynk:0.8\"")?,
            moe_trace: fields.take("moe_trace", "true or false")?,
            user: fields.take("user", "a string")?,
        })
    }

    /// `logit_bias` in numbers.
    ///
    /// # Errors
    /// A key that is no token id, or a value that is no number.
    pub fn biases(&self) -> Result<Vec<(TokenId, f32)>, RequestError> {
        let error = |what: String| RequestError::field("logit_bias", format!("logit_bias {what}"));
        let bias = |(key, value): (&String, &Value)| {
            let id = key
                .parse()
                .ok()
                .filter(|id: &TokenId| id.to_string() == *key)
                .ok_or_else(|| error(format!("has token ids for keys; got {}", quoted(key))))?;
            let bias = value.as_f64().ok_or_else(|| error(format!("of token {id} must be a number; got {value}")))?;
            Ok((id, bias as f32))
        };
        self.logit_bias.iter().flatten().map(bias).collect()
    }
}

/// `stream_options`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamOptions {
    /// Send a last chunk with the usage.
    pub include_usage: bool,
    /// Some clients ask for the usage so far in every chunk and read the last; they get it at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub continuous_usage_stats: Option<bool>,
}

/// What the text must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

/// A schema with the name the caller gives it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonSchema {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub schema: Value,
    /// The output always follows the schema, whatever this says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
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
