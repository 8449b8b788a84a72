//! `/tokenize` and `/detokenize`.

use super::chat::ChatRequest;
use super::common::Common;
use super::fields::{Fields, RequestError};
use crate::types::TokenId;
use serde::{Deserialize, Serialize};

/// What is to become tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub input: TokenizeInput,
    /// True unless given; for messages false, whose template writes these tokens.
    pub add_special_tokens: bool,
    pub return_token_strs: bool,
}

/// See [`TokenizeRequest`].
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizeInput {
    Text(String),
    Chat(Box<ChatRequest>),
}

const TOKENIZE: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "add_special_tokens",
    "return_token_strs",
];

impl TokenizeRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// Bytes that are no JSON object, a wrong or unknown field, or neither a prompt nor messages.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let mut fields = Fields::read(body)?;
        fields.check_known(&[TOKENIZE])?;
        let model = fields.take("model", "a string")?;
        let prompt: Option<String> = fields.take("prompt", "a string")?;
        let add_special_tokens: Option<bool> = fields.take("add_special_tokens", "true or false")?;
        let return_token_strs: Option<bool> = fields.take("return_token_strs", "true or false")?;
        let chat = ChatRequest::take(&mut fields, Common::default())?.checked()?;
        let (input, special) = match (prompt, &chat.messages) {
            (Some(text), None) => (TokenizeInput::Text(text), true),
            (None, Some(_)) => (TokenizeInput::Chat(Box::new(chat)), false),
            _ => return Err(RequestError::field("prompt", "give either prompt or messages".into())),
        };
        Ok(Self {
            model,
            input,
            add_special_tokens: add_special_tokens.unwrap_or(special),
            return_token_strs: return_token_strs.unwrap_or(false),
        })
    }
}

/// The tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeResponse {
    pub tokens: Vec<TokenId>,
    pub count: usize,
    pub max_model_len: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// Tokens that are to become text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<TokenId>,
}

impl DetokenizeRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// Bytes that are no JSON object, a wrong or unknown field, or no tokens.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let mut fields = Fields::read(body)?;
        fields.check_known(&[&["model", "tokens"]])?;
        let model = fields.take("model", "a string")?;
        let tokens = fields.take("tokens", "an array of token ids")?;
        let tokens = tokens.ok_or_else(|| RequestError::field("tokens", "tokens is required".into()))?;
        Ok(Self { model, tokens })
    }
}

/// The text of some tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetokenizeResponse {
    pub prompt: String,
}
