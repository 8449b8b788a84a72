//! `/v1/chat/completions`.

use super::common::Common;
use super::fields::{Fields, Refused, RequestError, shown, wrong};
use super::usage::{MoeTrace, UsageBody};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A request. Absent fields are `None`; null is the same as absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatRequest {
    #[serde(flatten)]
    pub common: Common,
    /// Checked: objects with a role, and content that is text.
    pub messages: Option<Vec<Value>>,
    pub max_completion_tokens: Option<usize>,
    /// The older name.
    pub max_tokens: Option<usize>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    /// Checked: functions with a name.
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<ToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// Whether tools may, must or must not be called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ToolChoice {
    Mode(ToolMode),
    Function(NamedTool),
}

/// See [`ToolChoice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolMode {
    None,
    Auto,
    Required,
}

/// A tool that must be called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum NamedTool {
    Function { function: FunctionName },
}

/// A function by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionName {
    pub name: String,
}

/// Messages of one request.
const MESSAGES_MAX: usize = 4096;
/// Tools of one request.
const TOOLS_MAX: usize = 128;

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

/// Fields of OpenAI's API that are not served.
const REFUSED: &[Refused] = &[
    Refused { field: "functions", nothing: "[]", instead: " (its newer name is tools)" },
    Refused { field: "function_call", nothing: "\"none\"", instead: " (its newer name is tool_choice)" },
    Refused { field: "modalities", nothing: "[\"text\"]", instead: " (it answers in text)" },
    Refused { field: "audio", nothing: "{}", instead: "" },
    Refused { field: "prediction", nothing: "{}", instead: "" },
    Refused { field: "web_search_options", nothing: "{}", instead: "" },
    Refused {
        field: "reasoning_effort",
        nothing: "\"\"",
        instead: " (templates take options by chat_template_kwargs)",
    },
    Refused { field: "verbosity", nothing: "\"\"", instead: "" },
    Refused {
        field: "chat_template",
        nothing: "\"\"",
        instead: " in a request (the operator gives one with --chat-template)",
    },
];

/// Fields for the caller's own records or for the keeping of them: they change no answer.
const NO_EFFECT: &[&str] =
    &["metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"];

impl ChatRequest {
    /// Fields that are read beside the common ones.
    const FIELDS: &'static [&'static str] = &[
        "messages",
        "max_completion_tokens",
        "max_tokens",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    ];

    /// Reads a request body.
    ///
    /// # Errors
    /// Bytes that are no JSON object, a field of the wrong type, one that is not known, or a message or tool that is
    /// none.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let mut fields = Fields::read(body)?;
        fields.refuse(REFUSED)?;
        fields.check_known(&[Self::FIELDS, Common::FIELDS, NO_EFFECT])?;
        let common = Common::take(&mut fields)?;
        Self::take(&mut fields, common)?.checked()
    }

    /// The request, if its messages and tools are such.
    pub(super) fn checked(self) -> Result<Self, RequestError> {
        for (field, n, max) in [
            ("messages", self.messages.as_ref().map_or(0, Vec::len), MESSAGES_MAX),
            ("tools", self.tools.as_ref().map_or(0, Vec::len), TOOLS_MAX),
        ] {
            if n > max {
                return Err(RequestError::field(field, format!("{field} takes at most {max}; got {n}")));
            }
        }
        self.messages.iter().flatten().enumerate().try_for_each(|(i, m)| check_message(i, m))?;
        self.tools.iter().flatten().enumerate().try_for_each(|(i, t)| check_tool(i, t))?;
        Ok(self)
    }

    /// Reads the fields that make a prompt of messages; those of the `/tokenize` endpoint too.
    pub(super) fn take(fields: &mut Fields, common: Common) -> Result<Self, RequestError> {
        Ok(Self {
            common,
            messages: fields.take("messages", "an array of messages")?,
            max_completion_tokens: fields.take("max_completion_tokens", "a whole number of at least 1")?,
            max_tokens: fields.take("max_tokens", "a whole number of at least 1")?,
            logprobs: fields.take("logprobs", "true or false")?,
            top_logprobs: fields.take("top_logprobs", "a whole number of at least 0")?,
            tools: fields.take("tools", "an array of tools")?,
            tool_choice: fields.take(
                "tool_choice",
                "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}",
            )?,
            parallel_tool_calls: fields.take("parallel_tool_calls", "true or false")?,
            add_generation_prompt: fields.take("add_generation_prompt", "true or false")?,
            continue_final_message: fields.take("continue_final_message", "true or false")?,
            chat_template_kwargs: fields.take("chat_template_kwargs", "an object")?,
        })
    }
}

/// What of a message's content is no text: a string, or parts of type `text`.
fn not_text(content: &Value) -> Option<&'static str> {
    match content {
        Value::Null | Value::String(_) => None,
        Value::Array(parts) if parts.iter().all(is_text_part) => None,
        Value::Array(_) => Some("a part that is not {\"type\": \"text\", \"text\": …}"),
        _ => Some("neither a string nor an array of parts"),
    }
}

fn is_text_part(part: &Value) -> bool {
    part.get("type").is_some_and(|kind| kind == "text") && part.get("text").is_some_and(Value::is_string)
}

fn check_message(i: usize, message: &Value) -> Result<(), RequestError> {
    let at = |what: &str| format!("messages[{i}]{what}");
    let refuse = |message: String| Err(RequestError::field("messages", message));
    let Value::Object(fields) = message else {
        return refuse(format!("{} must be an object; got {}", at(""), shown(message)));
    };
    let role = fields.get("role").unwrap_or(&Value::Null);
    if !role.as_str().is_some_and(|r| ROLES.contains(&r)) {
        return refuse(format!("{} must be one of {}; got {}", at(".role"), ROLES.join(", "), shown(role)));
    }
    let content = fields.get("content").unwrap_or(&Value::Null);
    if let Some(what) = not_text(content) {
        return refuse(format!("{} is {what}: this server takes text; got {}", at(".content"), shown(content)));
    }
    if content.is_null() && role != "assistant" {
        return refuse(format!("{} is missing", at(".content")));
    }
    let Some(calls) = fields.get("tool_calls").filter(|c| !c.is_null()) else { return Ok(()) };
    let named = |call: &Value| call.pointer("/function/name").is_some_and(Value::is_string);
    if role != "assistant" || !calls.as_array().is_some_and(|calls| calls.iter().all(named)) {
        return refuse(format!("{} must be an array of calls with function.name, of an assistant", at(".tool_calls")));
    }
    Ok(())
}

fn check_tool(i: usize, tool: &Value) -> Result<(), RequestError> {
    let function = tool.get("type").and_then(Value::as_str) == Some("function");
    let name = tool.pointer("/function/name").and_then(Value::as_str);
    let parameters = tool.pointer("/function/parameters").unwrap_or(&Value::Null);
    if function && name.is_some_and(|n| !n.is_empty()) && (parameters.is_object() || parameters.is_null()) {
        return Ok(());
    }
    let expected = "{\"type\": \"function\", \"function\": {\"name\": …, \"parameters\": {…}}}";
    Err(RequestError { param: Some("tools".into()), ..wrong(&format!("tools[{i}]"), expected, tool) })
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatResponse {
    pub id: String,
    /// `chat.completion`
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: UsageBody,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`
    pub finish_reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_trace: Option<MoeTrace>,
}

/// What the model says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: String,
    /// Nothing where there are tool calls alone.
    pub content: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallBody>,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCallBody {
    /// In streamed pieces alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    pub id: String,
    /// `function`
    #[serde(rename = "type")]
    pub kind: String,
    pub function: FunctionCall,
}

/// A function with its arguments, which are JSON as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCall {
    pub name: String,
    pub arguments: String,
}

/// A piece of a streamed answer; the last one, if asked for, has no choices but the usage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    pub id: String,
    /// `chat.completion.chunk`
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageBody>,
}

/// A piece of one answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_trace: Option<MoeTrace>,
}

/// What is new of a message. Clients add texts up, so each is sent once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallBody>,
}

/// Log-probabilities of an answer's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
}

/// Of one token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprob {
    #[serde(flatten)]
    pub token: TokenLogprob,
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Text; `bytes:\x…` where it is none alone.
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bad_body_names_the_field_and_what_was_given() {
        let with = |message: &str| format!(r#"{{"messages": [{{"role": "user", "content": "a"}}, {message}]}}"#);
        for (body, param, text) in [
            (with("3"), "messages", "messages[1] must be an object; got 3"),
            (with(r#"{"content": "a"}"#), "messages", "messages[1].role must be one of system"),
            (with(r#"{"role": "robot", "content": "a"}"#), "messages", "got \"robot\""),
            (with(r#"{"role": "user"}"#), "messages", "messages[1].content is missing"),
            (with(r#"{"role": "user", "content": 5}"#), "messages", "messages[1].content is neither a string"),
            (
                with(r#"{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}"#),
                "messages",
                "this server takes text; got [{\"type\":\"image_url\"",
            ),
            (with(r#"{"role": "assistant", "tool_calls": [{}]}"#), "messages", "messages[1].tool_calls"),
            (r#"{"tools": [{"type": "code"}]}"#.into(), "tools", "tools[0] must be {\"type\": \"function\""),
            (r#"{"tool_choice": "maybe"}"#.into(), "tool_choice", "\"required\""),
            (r#"{"chat_template": "{{ x }}"}"#.into(), "chat_template", "--chat-template"),
            (r#"{"functions": [{"name": "f"}]}"#.into(), "functions", "tools"),
            (r#"{"logprobs": 3}"#.into(), "logprobs", "true or false; got 3"),
            (r#"{"message": []}"#.into(), "message", "unknown field `message`; known are messages"),
        ] {
            let error = ChatRequest::parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert!(error.message.contains(text), "{body}: {}", error.message);
        }
    }

    #[test]
    fn records_without_effect_are_accepted() {
        let body = r#"{"messages": [], "metadata": {"a": "b"}, "store": true, "service_tier": "auto"}"#;
        assert!(ChatRequest::parse(body.as_bytes()).is_ok());
    }

    #[test]
    fn tool_choices_of_all_kinds_are_read() {
        let choice = |json: &str| {
            let body = format!(r#"{{"tool_choice": {json}}}"#);
            ChatRequest::parse(body.as_bytes()).unwrap().tool_choice.unwrap()
        };
        assert_eq!(choice("\"none\""), ToolChoice::Mode(ToolMode::None));
        assert_eq!(choice("\"required\""), ToolChoice::Mode(ToolMode::Required));
        let named = NamedTool::Function { function: FunctionName { name: "f".into() } };
        assert_eq!(choice(r#"{"type": "function", "function": {"name": "f"}}"#), ToolChoice::Function(named));
    }

    #[test]
    fn every_field_of_the_struct_is_a_known_field() {
        let Value::Object(fields) = serde_json::to_value(ChatRequest::default()).unwrap() else { panic!("an object") };
        let mut names: Vec<&str> = fields.keys().map(String::as_str).collect();
        let mut known = [ChatRequest::FIELDS, Common::FIELDS].concat();
        names.sort_unstable();
        known.sort_unstable();
        assert_eq!(names, known);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(body in "\\PC{0,100}", content in "\\PC{0,20}") {
            let _ = ChatRequest::parse(body.as_bytes());
            let _ = ChatRequest::parse(format!(r#"{{"messages": [{{"role": "user", "content": {content}}}]}}"#).as_bytes());
        }
    }
}
