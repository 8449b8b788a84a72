//! `POST /v1/chat/completions`, whole or streamed.

use super::answer::{Answered, Completed, Head, Pieces, collected, json, streamed, token_text, unique_id};
use super::error::ApiError;
use super::prepare::{Prepared, blocking, check_model, prepared, request, routed, streaming, submit};
use super::read::Body;
use super::{App, Service};
use crate::chat::{ChatError, ChatTemplate, Piece, TemplateInput, ToolCall, ToolFormat, ToolStream, adapt, tool_names};
use crate::engine::api::{Generate, PromptReport, TokenReport};
use crate::types::{FinishReason, GenerateRequest, GrammarSpec, LOGPROBS_MAX, TokenId, Usage};
use crate::wire::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprob, ChatLogprobs, ChatRequest, ChatResponse,
    Delta, FunctionCall, MoeTrace, NamedTool, Routed, TokenLogprob, ToolCallBody, ToolChoice, ToolMode, UsageBody,
};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::sync::Arc;

pub(super) async fn create(State(service): App, Body(body): Body) -> Result<Response, ApiError> {
    let head = Head::new("chatcmpl", service.generate.as_ref());
    let reading = service.clone();
    let Prepared { requests, form, stream } = prepared(move || prepare(&reading, &body)).await?;
    let events = submit(service, requests).await?;
    if let Some(include_usage) = stream {
        let n = form.n;
        return Ok(streamed(Streamed::new(head, form), events, n, include_usage));
    }
    let (answers, usage) = collected(events, form.n).await?;
    // What is told of many tokens takes its time to write.
    blocking(move || {
        let usage = UsageBody::new(&usage, &form.routed);
        let choices = answers.into_iter().flat_map(|answer| form.choices(answer)).collect();
        let Head { id, created, model } = head;
        let object = "chat.completion".into();
        Json(ChatResponse { id, object, created, model, choices, usage }).into_response()
    })
    .await
}

/// The prompt that the model's template makes of the messages.
///
/// # Errors
/// A model without a template, or messages that it does not take.
pub(super) fn render(service: &Service, asked: &ChatRequest) -> Result<String, ApiError> {
    let tools = asked.tools.as_ref().filter(|tools| !tools.is_empty() && !forbids_tools(asked));
    let template = template(service, tools.is_some())?;
    let messages =
        asked.messages.as_ref().ok_or_else(|| ApiError::invalid(Some("messages"), "messages is required"))?;
    let mut messages = messages.clone();
    adapt(&mut messages, template);
    let continues = asked.continue_final_message.unwrap_or(false);
    let add_generation_prompt = asked.add_generation_prompt.unwrap_or(!continues);
    let tools = tools.map(|tools| Value::Array(tools.clone()));
    let kwargs = asked.chat_template_kwargs.clone().unwrap_or_default();
    let input = TemplateInput {
        messages: &messages,
        tools: tools.as_ref(),
        add_generation_prompt,
        continue_final_message: continues,
        kwargs,
    };
    template.render(&input).map_err(|e| {
        let param = match e {
            ChatError::Continue(_) => "continue_final_message",
            ChatError::Reserved(_) => "chat_template_kwargs",
            _ => "messages",
        };
        ApiError::invalid(Some(param), e.to_string())
    })
}

fn template(service: &Service, tools: bool) -> Result<&ChatTemplate, ApiError> {
    let templates = service.chat.as_ref().ok_or_else(|| {
        let model = &service.generate.info().name;
        ApiError::invalid(
            Some("messages"),
            format!(
                "the model `{model}` has no chat template, so it is most likely a base model: use /v1/completions, or \
                 start the server with --chat-template FILE (a Jinja template as in tokenizer_config.json)"
            ),
        )
    })?;
    Ok(templates.choose(tools))
}

fn forbids_tools(asked: &ChatRequest) -> bool {
    asked.tool_choice == Some(ToolChoice::Mode(ToolMode::None))
}

/// How calls of tools are found in the text.
struct Tools {
    format: ToolFormat,
    names: Vec<String>,
    /// What a call begins with, where that is a special token.
    marker: Option<TokenId>,
}

/// What the answer is to look like.
struct Form {
    generate: Arc<dyn Generate>,
    routed: Routed,
    n: usize,
    logprobs: bool,
    trace: bool,
    tools: Option<Tools>,
}

fn prepare(service: &Service, body: &[u8]) -> Result<Prepared<Form>, ApiError> {
    let asked = ChatRequest::parse(body)?;
    let generate = service.generate.as_ref();
    check_model(asked.common.model.as_ref(), generate)?;
    let stream = streaming(&asked.common)?;
    let mut base = request(&asked.common, &service.options)?;
    base.logprobs = logprobs(&asked)?;
    let prompt = render(service, &asked)?;
    let tools = tools(service, &asked)?;
    if let Some(tools) = &tools {
        // What marks a call must be seen.
        base.skip_special_tokens &= tools.marker.is_none();
        constrain(&mut base, tools, &asked)?;
    }
    // The template has written what special tokens there are to be.
    let prompt = generate.encode(&prompt, false).map_err(|e| ApiError::invalid(Some("messages"), e))?;
    let room = generate.info().limits.max_model_len.saturating_sub(prompt.len()).max(1);
    let routed = routed(&mut base, generate);
    let request = GenerateRequest { max_tokens: max_tokens(&asked, room)?, prompt, ..base };
    let form = Form {
        generate: service.generate.clone(),
        routed,
        n: request.n,
        logprobs: request.logprobs.is_some(),
        trace: request.trace,
        tools,
    };
    Ok(Prepared { requests: vec![request], form, stream })
}

fn logprobs(asked: &ChatRequest) -> Result<Option<usize>, ApiError> {
    match (asked.logprobs.unwrap_or(false), asked.top_logprobs) {
        (false, Some(_)) => {
            Err(ApiError::invalid(Some("top_logprobs"), "top_logprobs is allowed only with \"logprobs\": true"))
        }
        (false, None) => Ok(None),
        (true, Some(top)) if top > LOGPROBS_MAX => {
            let message = format!("top_logprobs must be between 0 and {LOGPROBS_MAX}; got {top}");
            Err(ApiError::invalid(Some("top_logprobs"), message))
        }
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// Without a limit, an answer may be as long as the context allows.
fn max_tokens(asked: &ChatRequest, room: usize) -> Result<usize, ApiError> {
    match (asked.max_completion_tokens, asked.max_tokens) {
        (Some(a), Some(b)) if a != b => {
            let message = format!("max_tokens is the older name of max_completion_tokens; got {b} and {a}");
            Err(ApiError::invalid(Some("max_tokens"), message))
        }
        (Some(0), _) | (_, Some(0)) => {
            Err(ApiError::invalid(Some("max_completion_tokens"), "max_completion_tokens must be at least 1; got 0"))
        }
        (Some(given), _) if given > room => {
            let message = format!(
                "max_completion_tokens must be at most {room}, which the prompt leaves of the context; got {given}"
            );
            Err(ApiError::invalid(Some("max_completion_tokens"), message))
        }
        (given, older) => Ok(given.or(older).unwrap_or(room)),
    }
}

/// The tools that may be called, where the template has a format for calls.
fn tools(service: &Service, asked: &ChatRequest) -> Result<Option<Tools>, ApiError> {
    let must = !matches!(asked.tool_choice, None | Some(ToolChoice::Mode(ToolMode::None | ToolMode::Auto)));
    let given = asked.tools.as_deref().unwrap_or_default();
    if given.is_empty() {
        let message = "tool_choice asks for a call, but tools is empty: give tools, or leave out tool_choice";
        return if must { Err(ApiError::invalid(Some("tool_choice"), message)) } else { Ok(None) };
    }
    if forbids_tools(asked) {
        return Ok(None);
    }
    let format = ToolFormat::detect(template(service, true)?.source());
    let names = tool_names(given).map_err(|e| ApiError::invalid(Some("tools"), e.to_string()))?;
    match format {
        Some(format) => {
            let marker = format.marker().and_then(|marker| service.generate.special_token(marker));
            Ok(Some(Tools { format, names, marker }))
        }
        None => Err(ApiError::invalid(
            Some("tools"),
            "the model's chat template defines no format for calls that this server knows (Hermes and Qwen, Mistral, \
             Llama 3.1): leave out tools, or give \"tool_choice\": \"none\"",
        )),
    }
}

/// Holds the output to a call, where one must be made.
fn constrain(request: &mut GenerateRequest, tools: &Tools, asked: &ChatRequest) -> Result<(), ApiError> {
    let name = match &asked.tool_choice {
        Some(ToolChoice::Mode(ToolMode::Required)) => None,
        Some(ToolChoice::Function(NamedTool::Function { function })) => Some(function.name.as_str()),
        None | Some(ToolChoice::Mode(ToolMode::Auto | ToolMode::None)) => return Ok(()),
    };
    if request.grammar.is_some() {
        let message = "response_format and a tool_choice that asks for a call exclude each other: give one of them";
        return Err(ApiError::invalid(Some("response_format"), message));
    }
    let parallel = asked.parallel_tool_calls.unwrap_or(true);
    let given = asked.tools.as_deref().unwrap_or_default();
    let grammar = tools.format.grammar(given, name, parallel, tools.marker);
    let grammar = grammar.map_err(|e| ApiError::invalid(Some("tool_choice"), e.to_string()))?;
    request.grammar = Some(GrammarSpec::Lark(grammar.into()));
    Ok(())
}

impl Form {
    fn choices(&self, answer: Answered) -> Vec<ChatChoice> {
        let experts = answer.prompt.experts;
        let choices = answer.choices.into_iter().enumerate();
        choices.map(|(index, completed)| self.choice(index, completed, &experts)).collect()
    }

    fn choice(&self, index: usize, done: Completed, experts: &[Option<Vec<u16>>]) -> ChatChoice {
        let logprobs = self.logprobs.then(|| self.logprobs(&done.tokens));
        let moe_trace = self.trace.then(|| MoeTrace {
            prompt: Some(experts.to_vec()),
            completion: done.tokens.into_iter().map(|t| t.experts).collect(),
        });
        let (content, calls) = match &self.tools {
            None => (done.text, Vec::new()),
            Some(tools) => tools.format.parse(&done.text, &tools.names),
        };
        let tool_calls: Vec<_> = calls.into_iter().map(|call| call_body(call, None)).collect();
        let finish_reason = finish_reason(done.reason, !tool_calls.is_empty()).into();
        let content = (tool_calls.is_empty() || !content.trim().is_empty()).then_some(content);
        let message = AssistantMessage { role: ASSISTANT.into(), content, tool_calls };
        ChatChoice { index, message, logprobs, finish_reason, moe_trace }
    }

    fn logprobs(&self, tokens: &[TokenReport]) -> ChatLogprobs {
        let told = |id: TokenId, logprob: f32| {
            let bytes = self.generate.token_bytes(id);
            TokenLogprob { token: token_text(&bytes), logprob, bytes }
        };
        let one = |token: &TokenReport| {
            let score = token.score.as_ref()?;
            let top_logprobs = score.top.iter().map(|(id, logprob)| told(*id, *logprob)).collect();
            Some(ChatLogprob { token: told(token.id, score.logprob), top_logprobs })
        };
        ChatLogprobs { content: tokens.iter().filter_map(one).collect() }
    }
}

const ASSISTANT: &str = "assistant";

fn finish_reason(reason: FinishReason, called: bool) -> &'static str {
    match reason {
        FinishReason::Stop if called => "tool_calls",
        reason => reason.as_str(),
    }
}

fn call_body(call: ToolCall, index: Option<usize>) -> ToolCallBody {
    let function = FunctionCall { name: call.name, arguments: call.arguments };
    ToolCallBody { index, id: unique_id("call"), kind: "function".into(), function }
}

/// A streamed answer.
struct Streamed {
    head: Head,
    form: Form,
    choices: Vec<StreamedChoice>,
}

struct StreamedChoice {
    tools: Option<ToolStream>,
    /// Whether a call was made.
    called: bool,
}

impl Streamed {
    fn new(head: Head, form: Form) -> Self {
        let stream = |tools: &Tools| ToolStream::new(tools.format, tools.names.clone());
        let one = |_| StreamedChoice { tools: form.tools.as_ref().map(stream), called: false };
        let choices = (0..form.n).map(one).collect();
        Self { head, form, choices }
    }

    fn chunk(&self, choice: ChatChunkChoice) -> String {
        self.write(vec![choice], None)
    }

    fn write(&self, choices: Vec<ChatChunkChoice>, usage: Option<UsageBody>) -> String {
        let Head { id, created, model } = self.head.clone();
        json(&ChatChunk { id, object: "chat.completion.chunk".into(), created, model, choices, usage })
    }

    fn deltas(&mut self, index: usize, pieces: Vec<Piece>) -> Vec<Delta> {
        let called = &mut self.choices[index].called;
        let delta = |piece| match piece {
            Piece::Text(text) => Delta { content: Some(text), ..Default::default() },
            Piece::Call { index, call } => {
                *called = true;
                Delta { tool_calls: vec![call_body(call, Some(index))], ..Default::default() }
            }
        };
        pieces.into_iter().map(delta).collect()
    }
}

impl Pieces for Streamed {
    fn begin(&mut self) -> Vec<String> {
        let role = |index| {
            let delta = Delta { role: Some(ASSISTANT.into()), content: Some(String::new()), ..Default::default() };
            self.chunk(ChatChunkChoice { index, delta, ..Default::default() })
        };
        (0..self.form.n).map(role).collect()
    }

    fn prompt(&mut self, _: usize, report: PromptReport) -> Vec<String> {
        let trace = |index| {
            let moe_trace = Some(MoeTrace { prompt: Some(report.experts.clone()), completion: Vec::new() });
            self.chunk(ChatChunkChoice { index, moe_trace, ..Default::default() })
        };
        (0..self.form.n).map(trace).collect()
    }

    fn text(&mut self, index: usize, text: String, tokens: Vec<TokenReport>) -> Vec<String> {
        let pieces = match &mut self.choices[index].tools {
            Some(stream) => stream.push(&text),
            None => vec![Piece::Text(text)],
        };
        let mut deltas = self.deltas(index, pieces);
        // What is told of tokens is not held back with their text.
        if deltas.is_empty() && !tokens.is_empty() {
            deltas.push(Delta::default());
        }
        let mut logprobs = self.form.logprobs.then(|| self.form.logprobs(&tokens));
        let completion = tokens.into_iter().map(|t| t.experts).collect();
        let mut moe_trace = self.form.trace.then_some(MoeTrace { prompt: None, completion });
        let chunk = |delta| {
            let (logprobs, moe_trace) = (logprobs.take(), moe_trace.take());
            self.chunk(ChatChunkChoice { index, delta, logprobs, moe_trace, finish_reason: None })
        };
        deltas.into_iter().map(chunk).collect()
    }

    fn end(&mut self, index: usize, reason: FinishReason) -> Vec<String> {
        let rest = self.choices[index].tools.as_mut().map(ToolStream::finish).unwrap_or_default();
        let deltas = self.deltas(index, rest);
        let rest = deltas.into_iter().map(|delta| ChatChunkChoice { index, delta, ..Default::default() });
        let finish_reason = Some(finish_reason(reason, self.choices[index].called).into());
        let end = ChatChunkChoice { index, finish_reason, ..Default::default() };
        rest.chain([end]).map(|choice| self.chunk(choice)).collect()
    }

    fn usage(&mut self, usage: &Usage) -> String {
        self.write(Vec::new(), Some(UsageBody::new(usage, &self.form.routed)))
    }
}
