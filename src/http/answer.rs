//! Answers, whole or as server-sent events: what completions and chat have in common.

use super::error::ApiError;
use crate::engine::api::{Event, Events, Generate, PromptReport, TokenReport};
use crate::types::{FinishReason, TokenId, Usage};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, StreamExt};
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

/// What all parts of an answer share.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
}

impl Head {
    /// With an id that begins with `kind`.
    pub(super) fn new(kind: &str, generate: &dyn Generate) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { id: unique_id(kind), created: now.as_secs(), model: generate.info().name.clone() }
    }
}

/// An id that no other answer or call of this process has.
pub(super) fn unique_id(kind: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{kind}-{:x}-{:x}", now.as_micros(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A token's text; where its bytes are none alone, they are written out, as OpenAI's API has it.
pub(super) fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => {
            let hex: String = bytes.iter().map(|b| format!("\\x{b:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

/// [`token_text`] of a token id.
pub(super) fn token_name(generate: &dyn Generate, id: TokenId) -> String {
    token_text(&generate.token_bytes(id))
}

/// A prompt's completions.
#[derive(Debug)]
pub(super) struct Answered {
    pub prompt: PromptReport,
    pub choices: Vec<Completed>,
}

/// One completion in full.
#[derive(Debug)]
pub(super) struct Completed {
    pub text: String,
    pub tokens: Vec<TokenReport>,
    pub reason: FinishReason,
}

pub(super) fn add(total: &mut Usage, usage: &Usage) {
    total.prompt_tokens += usage.prompt_tokens;
    total.cached_tokens += usage.cached_tokens;
    total.completion_tokens += usage.completion_tokens;
    total.work += usage.work;
}

/// Waits for all completions of all prompts, `n` of each, and what they used together.
pub(super) async fn collected(events: Vec<Events>, n: usize) -> Result<(Vec<Answered>, Usage), ApiError> {
    let mut total = Usage::default();
    let mut answers = Vec::with_capacity(events.len());
    for mut events in events {
        let mut prompt = PromptReport::default();
        let mut parts: Vec<(String, Vec<TokenReport>)> = vec![Default::default(); n];
        let mut reasons = vec![None; n];
        while reasons.iter().any(Option::is_none) {
            match events.next().await {
                Some(Event::Prompt(report)) => prompt = report,
                Some(Event::Text { choice, text, tokens }) => {
                    parts[choice].0.push_str(&text);
                    parts[choice].1.extend(tokens);
                }
                Some(Event::Done { choice, reason, usage }) => {
                    add(&mut total, &usage);
                    reasons[choice] = Some(reason);
                }
                Some(Event::Failed(message)) => return Err(ApiError::engine(message)),
                None => return Err(ApiError::engine(CUT_OFF.into())),
            }
        }
        let completed = |((text, tokens), reason): ((String, Vec<TokenReport>), Option<FinishReason>)| {
            reason.map(|reason| Completed { text, tokens, reason })
        };
        let choices = parts.into_iter().zip(reasons).filter_map(completed).collect();
        answers.push(Answered { prompt, choices });
    }
    Ok((answers, total))
}

const CUT_OFF: &str = "the engine stopped before the request was finished";

/// Writes the pieces of a streamed answer as JSON; `index` numbers completions over all prompts.
pub(super) trait Pieces: Send + 'static {
    /// Before anything is known.
    fn begin(&mut self) -> Vec<String>;
    /// What was asked for of prompt number `prompt`.
    fn prompt(&mut self, prompt: usize, report: PromptReport) -> Vec<String>;
    fn text(&mut self, index: usize, text: String, tokens: Vec<TokenReport>) -> Vec<String>;
    fn end(&mut self, index: usize, reason: FinishReason) -> Vec<String>;
    /// At the very end, if asked for.
    fn usage(&mut self, usage: &Usage) -> String;
}

/// State of a streamed answer.
struct Streaming<P> {
    pieces: P,
    events: SelectAll<stream::BoxStream<'static, (usize, Event)>>,
    n: usize,
    unfinished: usize,
    total: Usage,
    include_usage: bool,
    ready: VecDeque<String>,
}

/// Streams all completions, `n` of every prompt, as they come: pieces, then the usage if asked for, then `[DONE]`.
pub(super) fn streamed(pieces: impl Pieces, events: Vec<Events>, n: usize, include_usage: bool) -> Response {
    let unfinished = events.len() * n;
    let numbered = events.into_iter().enumerate().map(|(index, events)| events.map(move |e| (index, e)).boxed());
    let events = stream::select_all(numbered);
    let total = Usage::default();
    let mut state = Streaming { pieces, events, n, unfinished, total, include_usage, ready: VecDeque::new() };
    state.ready = state.pieces.begin().into();
    let parts = stream::unfold(state, |mut state| async move {
        let data = state.next().await?;
        Some((Ok::<_, Infallible>(sse::Event::default().data(data)), state))
    });
    Sse::new(parts).keep_alive(KeepAlive::default()).into_response()
}

const DONE: &str = "[DONE]";

impl<P: Pieces> Streaming<P> {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() {
            if self.unfinished == 0 {
                return None;
            }
            let event = self.events.next().await;
            let pieces = self.pieces_of(event);
            self.ready.extend(pieces);
        }
        self.ready.pop_front()
    }

    fn pieces_of(&mut self, event: Option<(usize, Event)>) -> Vec<String> {
        match event {
            Some((prompt, Event::Prompt(report))) => self.pieces.prompt(prompt, report),
            Some((prompt, Event::Text { choice, text, tokens })) => {
                self.pieces.text(prompt * self.n + choice, text, tokens)
            }
            Some((prompt, Event::Done { choice, reason, usage })) => {
                add(&mut self.total, &usage);
                self.unfinished -= 1;
                let mut pieces = self.pieces.end(prompt * self.n + choice, reason);
                if self.unfinished == 0 {
                    pieces.extend(self.include_usage.then(|| self.pieces.usage(&self.total)));
                    pieces.push(DONE.into());
                }
                pieces
            }
            Some((_, Event::Failed(message))) => self.failed(message),
            None => self.failed(CUT_OFF.into()),
        }
    }

    fn failed(&mut self, message: String) -> Vec<String> {
        self.unfinished = 0;
        vec![json(&ApiError::engine(message).body()), DONE.into()]
    }
}

/// These types hold strings, numbers and lists: they always serialise.
pub(super) fn json(body: &impl Serialize) -> String {
    serde_json::to_string(body).unwrap_or_default()
}
