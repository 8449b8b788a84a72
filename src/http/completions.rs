//! `POST /v1/completions`, whole or streamed.

use super::answer::{Answered, Completed, Head, Pieces, collected, json, streamed, token_name};
use super::error::ApiError;
use super::prepare::{Prepared, blocking, check_model, prepared, request, routed, streaming, submit};
use super::read::Body;
use super::{App, Service};
use crate::engine::api::{Generate, PromptReport, TokenReport, TokenScore};
use crate::types::{FinishReason, GenerateRequest, N_MAX, PromptScoring, TokenId, Usage};
use crate::wire::{
    Choice, Chunk, ChunkChoice, CompletionRequest, CompletionResponse, Logprobs, MoeTrace, PromptItem, PromptLogprob,
    Routed, UsageBody,
};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::Map;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Prompts in one request.
const PROMPTS_MAX: usize = 128;
/// OpenAI's default for `max_tokens`.
const MAX_TOKENS_DEFAULT: usize = 16;

pub(super) async fn create(State(service): App, Body(body): Body) -> Result<Response, ApiError> {
    let head = Head::new("cmpl", service.generate.as_ref());
    let reading = service.clone();
    let Prepared { requests, form, stream } = prepared(move || prepare(&reading, &body)).await?;
    let events = submit(service, requests).await?;
    if let Some(include_usage) = stream {
        let n = form.n;
        return Ok(streamed(Streamed { head, form }, events, n, include_usage));
    }
    let (answers, usage) = collected(events, form.of).await?;
    // What is told of a long prompt takes its time to write.
    blocking(move || {
        let usage = UsageBody::new(&usage, &form.routed);
        let choices = form.choices(answers);
        let Head { id, created, model } = head;
        Json(CompletionResponse { id, object: OBJECT.into(), created, model, choices, usage }).into_response()
    })
    .await
}

const OBJECT: &str = "text_completion";

/// What the answer is to look like.
struct Form {
    generate: Arc<dyn Generate>,
    routed: Routed,
    /// Completions told of every prompt, and made.
    n: usize,
    of: usize,
    /// The prompts, where they are told again.
    echo: Option<Vec<Echo>>,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    as_ids: bool,
    trace: bool,
    /// Prompts, where their tokens are told.
    prompts: Vec<Vec<TokenId>>,
}

/// A prompt that is told again.
struct Echo {
    text: String,
    /// Characters before each token.
    offsets: Vec<usize>,
    chars: usize,
}

fn prepare(service: &Service, body: &[u8]) -> Result<Prepared<Form>, ApiError> {
    let request = CompletionRequest::parse(body)?;
    check_model(request.common.model.as_ref(), service.generate.as_ref())?;
    let stream = streaming(&request.common)?;
    let (requests, form) = validate(service, request, stream.is_some())?;
    Ok(Prepared { requests, form, stream })
}

/// Makes the engine's requests of the API's, one per prompt, and the form of the answer.
fn validate(
    service: &Service,
    mut asked: CompletionRequest,
    stream: bool,
) -> Result<(Vec<GenerateRequest>, Form), ApiError> {
    let generate = service.generate.as_ref();
    let prompt = asked.prompt.take().ok_or_else(|| ApiError::invalid(Some("prompt"), "prompt is required"))?;
    let prompts = prompt.items();
    let info = generate.info();
    let prompts_max = PROMPTS_MAX.min(info.unfinished_max);
    if prompts.is_empty() || prompts.len() > prompts_max {
        let message = format!("prompt must hold 1 to {prompts_max} prompts; got {}", prompts.len());
        return Err(ApiError::invalid(Some("prompt"), message));
    }
    let echo = asked.echo.unwrap_or(false);
    let mut base = base(service, &asked, stream)?;
    let routed = routed(&mut base, generate);
    let mut requests = Vec::with_capacity(prompts.len());
    let mut echoes = Vec::new();
    for item in prompts {
        let (ids, text) = match item {
            PromptItem::Tokens(ids) => (ids, None),
            PromptItem::Text(text) => {
                let ids = generate.encode(&text, true).map_err(|e| ApiError::invalid(Some("prompt"), e))?;
                (ids, Some(text))
            }
        };
        // The default gives way to the context; what was asked for does not.
        let room = info.limits.max_model_len.saturating_sub(ids.len()).max(1);
        let max_tokens = asked.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT.min(room));
        let request = GenerateRequest { prompt: ids, max_tokens, ..base.clone() };
        // Before the prompt's own text is made of ids that may be none.
        request.check(&info.limits)?;
        if echo {
            echoes.push(Echo::new(generate, &request, text));
        }
        requests.push(request);
    }
    let told = base.scoring.is_some();
    let form = Form {
        generate: service.generate.clone(),
        routed,
        n: asked.common.n.unwrap_or(1),
        of: base.n,
        echo: echo.then_some(echoes),
        logprobs: asked.logprobs,
        prompt_logprobs: asked.prompt_logprobs,
        as_ids: asked.return_tokens_as_token_ids.unwrap_or(false),
        trace: base.trace,
        prompts: if told { requests.iter().map(|r| r.prompt.clone()).collect() } else { Vec::new() },
    };
    Ok((requests, form))
}

/// The request of every prompt, but for the prompt.
fn base(service: &Service, asked: &CompletionRequest, stream: bool) -> Result<GenerateRequest, ApiError> {
    let base = request(&asked.common, &service.options)?;
    let echo = asked.echo.unwrap_or(false);
    let n = base.n;
    if n == 0 || n > N_MAX {
        return Err(ApiError::invalid(Some("n"), format!("n must be between 1 and {N_MAX}; got {n}")));
    }
    let of = asked.best_of.unwrap_or(n);
    if of < n || of > N_MAX {
        let message = format!("best_of must be between n ({n}) and {N_MAX}; got {of}");
        return Err(ApiError::invalid(Some("best_of"), message));
    }
    if stream && of > n {
        let message = format!("best_of must equal n ({n}) in a streamed answer: which is best is known at the end");
        return Err(ApiError::invalid(Some("best_of"), message));
    }
    if stream && asked.prompt_logprobs.is_some() {
        let message = "prompt_logprobs cannot be streamed; use echo with logprobs, or leave out stream";
        return Err(ApiError::invalid(Some("prompt_logprobs"), message));
    }
    if asked.max_tokens == Some(0) && !echo && asked.prompt_logprobs.is_none() {
        let message = "max_tokens must be at least 1 without echo or prompt_logprobs; got 0";
        return Err(ApiError::invalid(Some("max_tokens"), message));
    }
    let top = asked.prompt_logprobs.max(asked.logprobs.filter(|_| echo));
    // To choose the best, log-probabilities are needed.
    let logprobs = asked.logprobs.or((of > n).then_some(0));
    Ok(GenerateRequest {
        n: of,
        logprobs,
        scoring: top.map(|top| PromptScoring { top, from: 1, whole: false }),
        ..base
    })
}

impl Echo {
    fn new(generate: &dyn Generate, request: &GenerateRequest, text: Option<String>) -> Self {
        let pieces = match (&text, &request.scoring) {
            (Some(_), None) => Vec::new(),
            _ => generate.pieces(&request.prompt, request.skip_special_tokens),
        };
        let offsets = pieces.iter().scan(0, |chars, piece| {
            let before = *chars;
            *chars += piece.chars().count();
            Some(before)
        });
        let offsets = offsets.collect();
        let text = text.unwrap_or_else(|| pieces.concat());
        Self { offsets, chars: text.chars().count(), text }
    }
}

impl Form {
    fn choices(&self, answers: Vec<Answered>) -> Vec<Choice> {
        let mut choices = Vec::with_capacity(answers.len() * self.n);
        for (prompt, Answered { prompt: report, choices: mut completed }) in answers.into_iter().enumerate() {
            if self.of > self.n {
                completed.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
                completed.truncate(self.n);
            }
            for done in completed {
                choices.push(self.choice(choices.len(), prompt, &report, done));
            }
        }
        choices
    }

    fn choice(&self, index: usize, prompt: usize, report: &PromptReport, done: Completed) -> Choice {
        let mut text = self.echoed(prompt);
        text.push_str(&done.text);
        let logprobs = self.logprobs.map(|_| {
            let mut logprobs = self.prompt_logprobs(prompt, report);
            self.add_tokens(&mut logprobs, prompt, &done.tokens);
            logprobs
        });
        let moe_trace = self.trace.then(|| MoeTrace {
            prompt: Some(report.experts.clone()),
            completion: done.tokens.into_iter().map(|t| t.experts).collect(),
        });
        let prompt_logprobs = self.prompt_logprobs.map(|top| self.by_id(prompt, report, top));
        Choice { index, text, logprobs, finish_reason: done.reason.as_str().into(), prompt_logprobs, moe_trace }
    }

    fn echoed(&self, prompt: usize) -> String {
        self.echo.as_ref().map_or_else(String::new, |e| e[prompt].text.clone())
    }

    /// The prompt's part of `logprobs`: nothing, unless the prompt is told again.
    fn prompt_logprobs(&self, prompt: usize, report: &PromptReport) -> Logprobs {
        let mut logprobs = Logprobs::default();
        if let Some(echo) = &self.echo {
            let offsets = &echo[prompt].offsets;
            for ((id, score), offset) in self.prompts[prompt].iter().zip(&report.scores).zip(offsets) {
                self.add(&mut logprobs, *id, score.as_ref(), *offset);
            }
        }
        logprobs
    }

    fn add_tokens(&self, logprobs: &mut Logprobs, prompt: usize, tokens: &[TokenReport]) {
        let before = self.echo.as_ref().map_or(0, |e| e[prompt].chars);
        for token in tokens {
            self.add(logprobs, token.id, token.score.as_ref(), before + token.offset);
        }
    }

    fn name(&self, id: TokenId) -> String {
        if self.as_ids { format!("token_id:{id}") } else { token_name(self.generate.as_ref(), id) }
    }

    fn add(&self, to: &mut Logprobs, id: TokenId, score: Option<&TokenScore>, offset: usize) {
        let name = self.name(id);
        let top = score.map(|score| {
            let mut top = Map::new();
            let told =
                score.top.iter().take(self.logprobs.unwrap_or(0)).map(|(id, logprob)| (self.name(*id), *logprob));
            // The likeliest come first, and of two with the same text the likelier one stays.
            for (name, logprob) in told.chain([(name.clone(), score.logprob)]) {
                top.entry(name).or_insert_with(|| decimal(logprob).into());
            }
            top
        });
        to.tokens.push(name);
        to.token_logprobs.push(score.map(|s| decimal(s.logprob)));
        to.top_logprobs.push(top);
        to.text_offset.push(offset);
    }

    /// `prompt_logprobs`: the `top` likeliest tokens and the one that stands there, by id.
    fn by_id(&self, prompt: usize, report: &PromptReport, top: usize) -> Vec<Option<BTreeMap<String, PromptLogprob>>> {
        let entry = |id: TokenId, logprob: f32, rank: u32| {
            let decoded_token = token_name(self.generate.as_ref(), id);
            (id.to_string(), PromptLogprob { logprob, rank, decoded_token })
        };
        let told = |(id, score): (&TokenId, &Option<TokenScore>)| {
            let score = score.as_ref()?;
            let best = score.top.iter().take(top).zip(1..).map(|((id, logprob), rank)| entry(*id, *logprob, rank));
            Some(best.chain([entry(*id, score.logprob, score.rank)]).collect())
        };
        self.prompts[prompt].iter().zip(&report.scores).map(told).collect()
    }
}

/// The shortest decimal number that is this one in 32 bits: the same digits wherever it is written.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn mean_logprob(done: &Completed) -> f64 {
    let scores = done.tokens.iter().filter_map(|t| t.score.as_ref());
    let (sum, count) = scores.fold((0.0, 0), |(sum, count), s| (sum + f64::from(s.logprob), count + 1));
    sum / f64::from(count.max(1))
}

/// A streamed answer.
struct Streamed {
    head: Head,
    form: Form,
}

impl Streamed {
    fn chunk(&self, choice: ChunkChoice) -> String {
        self.write(vec![choice], None)
    }

    fn write(&self, choices: Vec<ChunkChoice>, usage: Option<UsageBody>) -> String {
        let Head { id, created, model } = self.head.clone();
        json(&Chunk { id, object: OBJECT.into(), created, model, choices, usage })
    }

    /// Pieces with the prompt's text, one for each of its completions.
    fn echo(&self, prompt: usize, report: &PromptReport) -> Vec<String> {
        let first = prompt * self.form.n;
        let pieces = (first..first + self.form.n).map(|index| {
            let logprobs = self.form.logprobs.map(|_| self.form.prompt_logprobs(prompt, report));
            let trace = MoeTrace { prompt: Some(report.experts.clone()), completion: Vec::new() };
            let moe_trace = self.form.trace.then_some(trace);
            self.chunk(ChunkChoice { index, text: self.form.echoed(prompt), logprobs, moe_trace, finish_reason: None })
        });
        pieces.collect()
    }
}

impl Pieces for Streamed {
    fn begin(&mut self) -> Vec<String> {
        // Where the prompt has to be computed for what is told of it, it is told then.
        match &self.form.echo {
            Some(echo) if self.form.logprobs.is_none() && !self.form.trace => {
                (0..echo.len()).flat_map(|prompt| self.echo(prompt, &PromptReport::default())).collect()
            }
            _ => Vec::new(),
        }
    }

    fn prompt(&mut self, prompt: usize, report: PromptReport) -> Vec<String> {
        self.echo(prompt, &report)
    }

    fn text(&mut self, index: usize, text: String, tokens: Vec<TokenReport>) -> Vec<String> {
        let logprobs = self.form.logprobs.map(|_| {
            let mut logprobs = Logprobs::default();
            self.form.add_tokens(&mut logprobs, index / self.form.n, &tokens);
            logprobs
        });
        let completion = tokens.into_iter().map(|t| t.experts).collect();
        let moe_trace = self.form.trace.then_some(MoeTrace { prompt: None, completion });
        vec![self.chunk(ChunkChoice { index, text, logprobs, moe_trace, finish_reason: None })]
    }

    fn end(&mut self, index: usize, reason: FinishReason) -> Vec<String> {
        let finish_reason = Some(reason.as_str().into());
        vec![self.chunk(ChunkChoice { index, finish_reason, ..Default::default() })]
    }

    fn usage(&mut self, usage: &Usage) -> String {
        self.write(Vec::new(), Some(UsageBody::new(usage, &self.form.routed)))
    }
}
