//! From a request body to queued requests: what completions and chat have in common.

use super::error::ApiError;
use super::{Service, ServiceOptions};
use crate::engine::api::{Events, Generate};
use crate::types::{GenerateRequest, GrammarSpec, SamplingParams, SpecError};
use crate::wire::{Common, ResponseFormat, Routed, Stop};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Requests that are read and encoded at the same time: both take memory and time by the size of the prompt.
static PREPARING: Semaphore = Semaphore::const_new(4);

/// Runs `work` where it delays no socket: a long prompt takes milliseconds to read and encode.
pub(super) async fn prepared<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let Ok(permit) = PREPARING.acquire().await else {
        return Err(ApiError::unavailable("draining", "the server is shutting down"));
    };
    // The work holds the permit, not this future: a client that leaves ends the future, not the work.
    blocking(move || {
        let _permit = permit;
        work()
    })
    .await?
}

/// Runs `work` on a thread that serves no sockets.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| ApiError::engine(format!("the work on the request failed: {e}")))
}

/// A request that can be queued.
pub(super) struct Prepared<F> {
    /// One per prompt.
    pub requests: Vec<GenerateRequest>,
    /// What the answer is to look like.
    pub form: F,
    /// If it is streamed, whether with usage.
    pub stream: Option<bool>,
}

/// What routes `request`, which from now on keeps it: one answer is routed in one way, also that to several prompts.
pub(super) fn routed(request: &mut GenerateRequest, generate: &dyn Generate) -> Routed {
    if let Some(router) = &request.router {
        return Routed { router: router.clone(), budget: None };
    }
    let Some(budget) = generate.budget() else {
        return Routed { router: generate.info().router.clone(), budget: None };
    };
    request.budget_version = Some(budget.version);
    Routed { budget: Some((&budget).into()), router: budget.router }
}

/// Checks that the model asked for is the one that is served.
pub(super) fn check_model(asked: Option<&String>, generate: &dyn Generate) -> Result<(), ApiError> {
    let served = &generate.info().name;
    match asked {
        Some(asked) if asked != served => Err(ApiError::no_model(asked, served)),
        _ => Ok(()),
    }
}

/// Whether the answer is streamed, and whether its usage comes at the end.
pub(super) fn streaming(common: &Common) -> Result<Option<bool>, ApiError> {
    let stream = common.stream.unwrap_or(false);
    if common.stream_options.is_some() && !stream {
        let message = "stream_options is allowed only with \"stream\": true";
        return Err(ApiError::invalid(Some("stream_options"), message));
    }
    Ok(stream.then(|| common.stream_options.is_some_and(|o| o.include_usage)))
}

/// A request as its common fields say, without a prompt yet.
pub(super) fn request(common: &Common, options: &ServiceOptions) -> Result<GenerateRequest, ApiError> {
    let trace = common.moe_trace.unwrap_or(false);
    if trace && !options.moe_trace {
        let message =
            "moe_trace is not allowed by this server; leave it out, or start the server with --allow-moe-trace";
        return Err(ApiError::invalid(Some("moe_trace"), message));
    }
    let router = common.router.as_ref().map(|spec| spec.parse()).transpose();
    let router = router.map_err(|e: SpecError| ApiError::invalid(Some("router"), e.to_string()))?;
    Ok(GenerateRequest {
        n: common.n.unwrap_or(1),
        min_tokens: common.min_tokens.unwrap_or(0),
        sampling: sampling(common)?,
        stop: common.stop.clone().map(Stop::list).unwrap_or_default(),
        stop_token_ids: common.stop_token_ids.clone().unwrap_or_default(),
        ignore_eos: common.ignore_eos.unwrap_or(false),
        skip_special_tokens: common.skip_special_tokens.unwrap_or(true),
        trace,
        grammar: common.response_format.as_ref().and_then(grammar),
        cache_salt: common.cache_salt.clone().unwrap_or_default(),
        router,
        ..GenerateRequest::greedy(Vec::new(), 0)
    })
}

fn grammar(format: &ResponseFormat) -> Option<GrammarSpec> {
    match format {
        ResponseFormat::Text => None,
        ResponseFormat::JsonObject => Some(GrammarSpec::JsonObject),
        ResponseFormat::JsonSchema { json_schema } => {
            Some(GrammarSpec::JsonSchema(json_schema.schema.to_string().into()))
        }
    }
}

fn sampling(common: &Common) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let top_k = match common.top_k.unwrap_or(0) {
        -1 => 0,
        k => u32::try_from(k).map_err(|_| {
            ApiError::invalid(Some("top_k"), format!("top_k must be -1 or 0 (off) up to {}; got {k}", u32::MAX))
        })?,
    };
    Ok(SamplingParams {
        temperature: common.temperature.unwrap_or(default.temperature),
        top_p: common.top_p.unwrap_or(default.top_p),
        top_k,
        min_p: common.min_p.unwrap_or(default.min_p),
        presence_penalty: common.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: common.frequency_penalty.unwrap_or(default.frequency_penalty),
        repetition_penalty: common.repetition_penalty.unwrap_or(default.repetition_penalty),
        logit_bias: common.biases()?,
        // Any 64 bits make a seed; the sign is one of them.
        seed: common.seed.map(|seed| seed as u64),
    })
}

/// What is told of prompt tokens in one answer, in log-probabilities and counts of experts: it comes cheap to who asks.
const TOLD_MAX: usize = 1 << 20;
/// Counts of experts per token: about as many as deep models have MoE layers.
const TRACED: usize = 64;

/// Checks that what is told of the prompts, once for every completion, is not beyond all measure.
fn check_told(requests: &[GenerateRequest]) -> Result<(), ApiError> {
    let per_token = |r: &GenerateRequest| r.scoring.map_or(0, |s| s.top + 1) + if r.trace { TRACED } else { 0 };
    let param = if requests.iter().any(|r| r.scoring.is_some()) { "logprobs" } else { "moe_trace" };
    let told: usize = requests.iter().map(|r| r.prompt.len() * r.n * per_token(r)).sum();
    if told > TOLD_MAX {
        let message = format!(
            "logprobs and moe_trace of prompts: prompt tokens times completions times what is told of each must be at most \
             {TOLD_MAX}; got {told}: ask for fewer prompts, completions or logprobs"
        );
        return Err(ApiError::invalid(Some(param), message));
    }
    Ok(())
}

/// Requests whose grammars are compiled, or wait for it, at the same time.
static COMPILING: Semaphore = Semaphore::const_new(16);

/// Submits all of `requests`; if one is refused, those before it are abandoned.
pub(super) async fn submit(service: Arc<Service>, requests: Vec<GenerateRequest>) -> Result<Vec<Events>, ApiError> {
    if requests.iter().all(|r| r.grammar.is_none()) {
        return submit_all(&service, requests);
    }
    // Compiling may take seconds, which requests without grammars are not to wait for.
    let Ok(permit) = COMPILING.try_acquire() else {
        return Err(ApiError::busy(
            "grammar_busy",
            "too many schemas and grammars are being compiled: try again later",
        ));
    };
    blocking(move || {
        let _permit = permit;
        submit_all(&service, requests)
    })
    .await?
}

fn submit_all(service: &Service, requests: Vec<GenerateRequest>) -> Result<Vec<Events>, ApiError> {
    let info = service.generate.info();
    // All are checked before any is queued.
    requests.iter().try_for_each(|r| r.check(&info.limits))?;
    check_told(&requests)?;
    let completions: usize = requests.iter().map(|r| r.n).sum();
    if completions > info.unfinished_max {
        let message = format!(
            "n times the number of prompts must be at most {}, the completions this server holds; got {completions}",
            info.unfinished_max
        );
        return Err(ApiError::invalid(Some("n"), message));
    }
    requests.into_iter().map(|r| service.generate.submit(r).map_err(ApiError::from)).collect()
}
