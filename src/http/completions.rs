//! `POST /v1/completions`, whole or streamed.

use super::App;
use super::error::ApiError;
use crate::engine::api::{Event, Events, Generate, ModelInfo};
use crate::types::{FinishReason, GenerateRequest, SamplingParams, TokenId, Usage};
use crate::wire::{Choice, Chunk, ChunkChoice, CompletionRequest, CompletionResponse, PromptItem, Stop, UsageBody};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use serde::Serialize;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Semaphore;

/// Prompts in one request.
const PROMPTS_MAX: usize = 128;
/// OpenAI's default for `max_tokens`.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Requests that are read and encoded at the same time: both take memory and time by the size of the prompt.
static PREPARING: Semaphore = Semaphore::const_new(4);

pub(super) async fn create(State(generate): App, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let body = body?;
    let head = Head::new(generate.info());
    // A long prompt takes milliseconds to read and encode: not on a thread that serves sockets.
    let prepared = match PREPARING.acquire().await {
        // The work holds the permit, not this future: a client that leaves ends the future, not the work.
        Ok(permit) => {
            let prepare = move || {
                let _permit = permit;
                Submitted::new(generate.as_ref(), &body)
            };
            tokio::task::spawn_blocking(prepare).await
        }
        Err(_) => return Err(ApiError::unavailable("the server is shutting down")),
    };
    let submitted = prepared.map_err(|e| ApiError::engine(format!("the request could not be prepared: {e}")))??;
    if submitted.stream {
        return Ok(streamed(head, submitted.events, submitted.include_usage).into_response());
    }
    Ok(Json(collected(head, submitted.events).await?).into_response())
}

/// A request whose prompts are queued.
struct Submitted {
    events: Vec<Events>,
    stream: bool,
    include_usage: bool,
}

impl Submitted {
    /// Submits every prompt of the request. If one is refused, those before it are abandoned.
    fn new(generate: &dyn Generate, body: &[u8]) -> Result<Self, ApiError> {
        let request = CompletionRequest::parse(body)?;
        let info = generate.info();
        if let Some(asked) = &request.model
            && *asked != info.name
        {
            return Err(ApiError::no_model(asked, &info.name));
        }
        let stream = request.stream.unwrap_or(false);
        if request.stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                Some("stream_options"),
                "stream_options is allowed only with \"stream\": true",
            ));
        }
        let include_usage = request.stream_options.is_some_and(|o| o.include_usage);
        let requests = validate(generate, request)?;
        // All are checked before any is queued.
        requests.iter().try_for_each(|r| r.check(&info.limits))?;
        let events =
            requests.into_iter().map(|r| generate.submit(r).map_err(ApiError::from)).collect::<Result<_, _>>()?;
        Ok(Self { events, stream, include_usage })
    }
}

/// Makes the engine's requests of the API's: one per prompt.
fn validate(generate: &dyn Generate, mut request: CompletionRequest) -> Result<Vec<GenerateRequest>, ApiError> {
    let prompt = request.prompt.take().ok_or_else(|| ApiError::invalid(Some("prompt"), "prompt is required"))?;
    let prompts = prompt.items();
    let info = generate.info();
    let prompts_max = PROMPTS_MAX.min(info.unfinished_max);
    if prompts.is_empty() || prompts.len() > prompts_max {
        let message = format!("prompt must hold 1 to {prompts_max} prompts; got {}", prompts.len());
        return Err(ApiError::invalid(Some("prompt"), message));
    }
    let sampling = sampling(&request)?;
    let stop = request.stop.map(Stop::list).unwrap_or_default();
    let encode = |item| -> Result<Vec<TokenId>, ApiError> {
        match item {
            PromptItem::Tokens(ids) => Ok(ids),
            PromptItem::Text(text) => generate.encode(&text).map_err(|e| ApiError::invalid(Some("prompt"), e)),
        }
    };
    let one = |item| -> Result<GenerateRequest, ApiError> {
        let prompt = encode(item)?;
        // The default gives way to the context; what was asked for does not.
        let room = info.limits.max_model_len.saturating_sub(prompt.len()).max(1);
        Ok(GenerateRequest {
            prompt,
            max_tokens: request.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT.min(room)),
            min_tokens: request.min_tokens.unwrap_or(0),
            sampling: sampling.clone(),
            stop: stop.clone(),
            stop_token_ids: request.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: request.ignore_eos.unwrap_or(false),
            skip_special_tokens: request.skip_special_tokens.unwrap_or(true),
            router: None,
        })
    };
    prompts.into_iter().map(one).collect()
}

fn sampling(request: &CompletionRequest) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let top_k = match request.top_k.unwrap_or(0) {
        -1 => 0,
        k => u32::try_from(k).map_err(|_| {
            ApiError::invalid(Some("top_k"), format!("top_k must be -1 or 0 (off) up to {}; got {k}", u32::MAX))
        })?,
    };
    Ok(SamplingParams {
        temperature: request.temperature.unwrap_or(default.temperature),
        top_p: request.top_p.unwrap_or(default.top_p),
        top_k,
        min_p: request.min_p.unwrap_or(default.min_p),
        presence_penalty: request.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: request.frequency_penalty.unwrap_or(default.frequency_penalty),
        repetition_penalty: request.repetition_penalty.unwrap_or(default.repetition_penalty),
        // Any 64 bits make a seed; the sign is one of them.
        seed: request.seed.map(|seed| seed as u64),
    })
}

/// What all parts of an answer share.
#[derive(Clone)]
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(info: &ModelInfo) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let id = format!("cmpl-{:x}-{:x}", now.as_micros(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self { id, created: now.as_secs(), model: info.name.clone() }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<UsageBody>) -> Chunk {
        let Self { id, created, model } = self.clone();
        Chunk { id, object: "text_completion".into(), created, model, choices, usage }
    }
}

/// Adds up what the prompts of one request used.
#[derive(Default)]
struct Total(Usage);

impl Total {
    fn add(&mut self, usage: &Usage) {
        self.0.prompt_tokens += usage.prompt_tokens;
        self.0.completion_tokens += usage.completion_tokens;
        self.0.work += usage.work;
    }
}

async fn collected(head: Head, events: Vec<Events>) -> Result<CompletionResponse, ApiError> {
    let mut total = Total::default();
    let mut choices = Vec::with_capacity(events.len());
    for (index, mut events) in events.into_iter().enumerate() {
        let mut text = String::new();
        let reason = loop {
            match events.next().await {
                Some(Event::Text(more)) => text.push_str(&more),
                Some(Event::Done { reason, usage }) => {
                    total.add(&usage);
                    break reason;
                }
                Some(Event::Failed(message)) => return Err(ApiError::engine(message)),
                None => return Err(ApiError::engine("the engine stopped before the request was finished".into())),
            }
        };
        choices.push(Choice { index, text, logprobs: None, finish_reason: reason.as_str().into() });
    }
    let Head { id, created, model } = head;
    let usage = UsageBody::from(&total.0);
    Ok(CompletionResponse { id, object: "text_completion".into(), created, model, choices, usage })
}

/// State of a streamed answer.
struct Streaming {
    head: Head,
    events: SelectAll<stream::BoxStream<'static, (usize, Event)>>,
    unfinished: usize,
    total: Total,
    include_usage: bool,
    stage: Stage,
}

#[derive(PartialEq)]
enum Stage {
    Choices,
    Usage,
    Done,
    Over,
}

fn streamed(
    head: Head,
    events: Vec<Events>,
    include_usage: bool,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let unfinished = events.len();
    let numbered = events.into_iter().enumerate().map(|(index, events)| events.map(move |e| (index, e)).boxed());
    let events = stream::select_all(numbered);
    let state = Streaming { head, events, unfinished, total: Total::default(), include_usage, stage: Stage::Choices };
    let parts = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok(event), state))
    });
    Sse::new(parts).keep_alive(KeepAlive::default())
}

impl Streaming {
    /// The next server-sent event: pieces of choices, then the usage if asked for, then `[DONE]`.
    async fn next(&mut self) -> Option<sse::Event> {
        match self.stage {
            Stage::Choices => Some(self.choice().await),
            Stage::Usage => {
                self.stage = Stage::Done;
                Some(data(&self.head.chunk(Vec::new(), Some(UsageBody::from(&self.total.0)))))
            }
            Stage::Done => {
                self.stage = Stage::Over;
                Some(sse::Event::default().data("[DONE]"))
            }
            Stage::Over => None,
        }
    }

    async fn choice(&mut self) -> sse::Event {
        let (index, text, reason) = match self.events.next().await {
            Some((index, Event::Text(text))) => (index, text, None),
            Some((index, Event::Done { reason, usage })) => {
                self.total.add(&usage);
                self.unfinished -= 1;
                if self.unfinished == 0 {
                    self.stage = if self.include_usage { Stage::Usage } else { Stage::Done };
                }
                (index, String::new(), Some(reason))
            }
            Some((_, Event::Failed(message))) => return self.failed(message),
            None => return self.failed("the engine stopped before the request was finished".into()),
        };
        let finish_reason = reason.map(FinishReason::as_str).map(Into::into);
        data(&self.head.chunk(vec![ChunkChoice { index, text, logprobs: None, finish_reason }], None))
    }

    fn failed(&mut self, message: String) -> sse::Event {
        self.stage = Stage::Done;
        data(&ApiError::engine(message).body())
    }
}

fn data(body: &impl Serialize) -> sse::Event {
    // These types hold strings, numbers and lists: they always serialise.
    sse::Event::default().data(serde_json::to_string(body).unwrap_or_default())
}
