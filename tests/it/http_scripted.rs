//! The HTTP layer over a generator that does what its script says.

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use futures::StreamExt;
use moe_serve::engine::api::{Event, EventSender, Events, Generate, ModelInfo, SubmitError};
use moe_serve::http::{Service, ServiceOptions};
use moe_serve::types::{
    BudgetState, FinishReason, Flops, GenerateRequest, GrammarSpec, LimitError, Limits, PromptScoring, RouterSpec,
    SpecError, TokenId, Usage, Work,
};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tower::ServiceExt;

/// What a submitted request meets.
type Script = Result<Events, SubmitError>;

struct Scripted {
    info: ModelInfo,
    ready: bool,
    budget: Option<BudgetState>,
    scripts: Mutex<VecDeque<Script>>,
    submitted: Mutex<Vec<GenerateRequest>>,
}

impl Scripted {
    fn new(scripts: impl IntoIterator<Item = Script>) -> Arc<Self> {
        let limits = Limits { vocab: 256, max_model_len: 64 };
        let info = ModelInfo {
            name: "org/double".into(),
            router: RouterSpec::native(),
            router_means: "k = 2".into(),
            limits,
            unfinished_max: 64,
            created: 7,
        };
        Arc::new(Self {
            info,
            ready: true,
            budget: None,
            scripts: Mutex::new(scripts.into_iter().collect()),
            submitted: Mutex::default(),
        })
    }
}

impl Generate for Scripted {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn encode(&self, text: &str, _: bool) -> Result<Vec<TokenId>, String> {
        match text {
            "unencodable" => Err("this text cannot be encoded".into()),
            _ => Ok(text.bytes().map(TokenId::from).collect()),
        }
    }

    fn pieces(&self, ids: &[TokenId], _: bool) -> Vec<String> {
        ids.iter().map(|id| char::from(*id as u8).to_string()).collect()
    }

    fn special_token(&self, _: &str) -> Option<TokenId> {
        None
    }

    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        vec![id as u8]
    }

    fn submit(&self, request: GenerateRequest) -> Result<Events, SubmitError> {
        let script = self.scripts.lock().unwrap().pop_front().expect("a request that the script does not have");
        self.submitted.lock().unwrap().push(request);
        script
    }

    fn budget(&self) -> Option<BudgetState> {
        self.budget.clone()
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn metrics(&self) -> String {
        "double_total 1\n".into()
    }
}

/// A request whose events come while the test goes on.
fn live() -> (EventSender, Script) {
    let (sender, events) = Events::channel(16);
    (sender, Ok(events))
}

/// A request whose events are all there; without an end in them, its engine has died.
fn told(events: impl IntoIterator<Item = Event>) -> Script {
    let (sender, told) = Events::channel(16);
    events.into_iter().for_each(|event| sender.send(event));
    Ok(told)
}

fn text(t: &str) -> Event {
    Event::Text { choice: 0, text: t.into(), tokens: Vec::new() }
}

fn done(completion_tokens: usize) -> Event {
    done_of(0, completion_tokens)
}

fn done_of(choice: usize, completion_tokens: usize) -> Event {
    let experts = Flops { ran: 50, native: 200 };
    let forward = Flops { ran: 150, native: 300 };
    let work = Work { tokens: 10, moe_visits: 20, expert_rows: 30, experts, forward };
    let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens, work };
    Event::Done { choice, reason: FinishReason::Length, usage }
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{}: {e}", self.body))
    }

    /// The error, whose shape must be OpenAI's in full.
    fn error(&self) -> Value {
        let json = self.json();
        assert_eq!(json.as_object().unwrap().len(), 1, "{json}");
        let error = json["error"].as_object().unwrap();
        let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"], "{json}");
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{json}");
        json["error"].clone()
    }
}

async fn ask(generate: &Arc<Scripted>, method: Method, path: &str, body: impl Into<Body>) -> axum::response::Response {
    let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
    let service = Service { generate: generate.clone(), chat: None, options: ServiceOptions::default() };
    let response = moe_serve::http::app(service).oneshot(request);
    tokio::time::timeout(Duration::from_secs(10), response).await.expect("an answer in time").unwrap()
}

async fn answer(generate: &Arc<Scripted>, method: Method, path: &str, body: impl Into<Body>) -> Answer {
    let response = ask(generate, method, path, body).await;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = tokio::time::timeout(Duration::from_secs(10), to_bytes(response.into_body(), 64 << 20));
    let body = body.await.expect("the body ends").unwrap();
    Answer { status, headers, body: String::from_utf8(body.to_vec()).unwrap() }
}

async fn complete(generate: &Arc<Scripted>, body: Value) -> Answer {
    answer(generate, Method::POST, "/v1/completions", body.to_string()).await
}

/// A streamed body, event by event.
struct Parts(axum::body::BodyDataStream);

impl Parts {
    async fn begin(generate: &Arc<Scripted>, body: Value) -> Self {
        let response = ask(generate, Method::POST, "/v1/completions", body.to_string()).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self(response.into_body().into_data_stream())
    }

    /// What follows `data: `; `None` at the end of the body.
    async fn next(&mut self) -> Option<String> {
        let bytes = tokio::time::timeout(Duration::from_secs(10), self.0.next()).await.expect("an event in time")?;
        let event = String::from_utf8(bytes.unwrap().to_vec()).unwrap();
        let data = event.strip_prefix("data: ").and_then(|e| e.strip_suffix("\n\n"));
        Some(data.unwrap_or_else(|| panic!("not one event: {event:?}")).to_string())
    }

    async fn json(&mut self) -> Value {
        let data = self.next().await.expect("another event");
        serde_json::from_str(&data).unwrap_or_else(|e| panic!("{data}: {e}"))
    }

    async fn ends(&mut self) {
        assert_eq!(self.next().await.as_deref(), Some("[DONE]"));
        assert_eq!(self.next().await, None);
    }
}

#[tokio::test]
async fn pieces_of_several_prompts_stream_as_they_come_under_their_own_index() {
    let ((first, a), (second, b)) = (live(), live());
    let generate = Scripted::new([a, b]);
    let body = json!({"prompt": ["abc", "def"], "stream": true, "stream_options": {"include_usage": true}});
    let mut parts = Parts::begin(&generate, body).await;
    let mut ids = Vec::new();
    let script = [(1, "B1"), (0, "A1"), (0, "A2"), (1, "B2")];
    for (index, piece) in script {
        [&first, &second][index].send(text(piece));
        let chunk = parts.json().await;
        let want = json!([{"index": index, "text": piece, "logprobs": null, "finish_reason": null}]);
        assert_eq!(chunk["choices"], want);
        assert_eq!((&chunk["object"], &chunk["model"]), (&json!("text_completion"), &json!("org/double")));
        assert_eq!(chunk.get("usage"), None, "the usage comes once, at the end");
        ids.push(chunk["id"].clone());
    }
    for (index, sender, tokens) in [(1, second, 5), (0, first, 4)] {
        sender.send(done(tokens));
        let chunk = parts.json().await;
        let want = json!([{"index": index, "text": "", "logprobs": null, "finish_reason": "length"}]);
        assert_eq!(chunk["choices"], want);
        ids.push(chunk["id"].clone());
    }
    let last = parts.json().await;
    assert_eq!(last["choices"], json!([]));
    let usage = json!({"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 2}, "moe": {
        "router": "native", "experts_per_token": 1.5, "expert_flops_saved": 0.75, "forward_flops_saved": 0.5,
    }});
    assert_eq!(last["usage"], usage);
    parts.ends().await;
    ids.push(last["id"].clone());
    assert!(ids[0].as_str().unwrap().starts_with("cmpl-") && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[tokio::test]
async fn without_include_usage_no_chunk_is_without_choices() {
    for options in [json!(null), json!({}), json!({"include_usage": false})] {
        let generate = Scripted::new([told([text("x"), done(1)])]);
        let body = json!({"prompt": "abc", "stream": true, "stream_options": options});
        let mut parts = Parts::begin(&generate, body).await;
        for _ in 0..2 {
            let chunk = parts.json().await;
            assert_eq!(chunk["choices"].as_array().unwrap().len(), 1, "{options}");
            assert_eq!(chunk.get("usage"), None, "{options}");
        }
        parts.ends().await;
    }
}

#[tokio::test]
async fn text_with_newlines_and_any_characters_stays_one_event_and_comes_back_equal() {
    let awkward = "a\nb\r\nc\rdata: [DONE]\n\n☃ 日本語 🦀 \u{2028}\"\\\u{0}\u{FFFD}";
    let generate = Scripted::new([told([text(awkward), done(1)])]);
    let mut parts = Parts::begin(&generate, json!({"prompt": "abc", "stream": true})).await;
    assert_eq!(parts.json().await["choices"][0]["text"], awkward);
    parts.json().await;
    parts.ends().await;
}

#[tokio::test]
async fn an_answer_in_full_has_the_choices_in_order_and_the_sum_of_the_usage() {
    let generate = Scripted::new([told([text("A"), text("1"), done(2)]), told([done(0)]), told([text("C"), done(1)])]);
    let answer = complete(&generate, json!({"prompt": ["a", "b", "c"]})).await;
    assert_eq!(
        (answer.status, &answer.headers["content-type"]),
        (StatusCode::OK, &"application/json".parse().unwrap())
    );
    let json = answer.json();
    let choice =
        |index: usize, text: &str| json!({"index": index, "text": text, "logprobs": null, "finish_reason": "length"});
    assert_eq!(json["choices"], json!([choice(0, "A1"), choice(1, ""), choice(2, "C")]));
    assert_eq!(json["usage"]["prompt_tokens"], 9);
    assert_eq!(json["usage"]["completion_tokens"], 3);
    assert_eq!(json["usage"]["total_tokens"], 12);
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_error_object_and_then_done_whatever_other_prompts_do() {
    let (other, b) = live();
    let generate = Scripted::new([told([text("half"), Event::Failed("out of luck".into())]), b]);
    let body = json!({"prompt": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}});
    let mut parts = Parts::begin(&generate, body).await;
    assert_eq!(parts.json().await["choices"][0]["text"], "half");
    let error = parts.json().await;
    let want = json!({"error": {"message": "out of luck", "type": "server_error", "param": null, "code": null}});
    assert_eq!(error, want);
    parts.ends().await;
    drop(parts);
    tokio::time::timeout(Duration::from_secs(10), other.closed()).await.expect("the other prompt is abandoned");
}

#[tokio::test]
async fn an_engine_that_dies_is_an_error_and_not_a_short_answer() {
    let generate = Scripted::new([told([text("half")])]);
    let mut parts = Parts::begin(&generate, json!({"prompt": "a", "stream": true})).await;
    assert_eq!(parts.json().await["choices"][0]["finish_reason"], Value::Null);
    let error = parts.json().await;
    assert!(error["error"]["message"].as_str().unwrap().contains("stopped"), "{error}");
    parts.ends().await;

    let generate = Scripted::new([told([text("whole"), done(1)]), told([text("half")])]);
    let answer = complete(&generate, json!({"prompt": ["a", "b"]})).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(answer.error()["type"], "server_error");
}

/// `select_all` ends when the last stream ends: a prompt that dies while another lives must not go unnoticed.
#[tokio::test]
async fn one_of_several_prompts_that_dies_in_mid_stream_is_noticed() {
    let generate = Scripted::new([told([text("half")]), told([text("whole"), done(1)])]);
    let mut parts = Parts::begin(&generate, json!({"prompt": ["a", "b"], "stream": true})).await;
    let mut errors = 0;
    while let Some(data) = parts.next().await {
        errors += usize::from(data.contains("\"error\""));
    }
    assert_eq!(errors, 1);
}

#[tokio::test]
async fn a_failure_before_anything_was_sent_is_a_500() {
    let generate = Scripted::new([told([text("half"), Event::Failed("out of luck".into())])]);
    let answer = complete(&generate, json!({"prompt": "a"})).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    let want = json!({"message": "out of luck", "type": "server_error", "param": null, "code": null});
    assert_eq!(answer.error(), want);
}

#[tokio::test]
async fn every_refusal_of_the_generator_has_its_status() {
    let limit = LimitError { param: "max_tokens", message: "max_tokens is too much".into() };
    let router: SpecError = RouterSpec::native().error("no good");
    for (refusal, status, kind, code, param, message) in [
        (SubmitError::Limit(limit), 400, "invalid_request_error", None, Some("max_tokens"), "is too much"),
        (SubmitError::Router(router), 400, "invalid_request_error", None, Some("router"), "`native`: no good"),
        (
            SubmitError::QueueFull { unfinished: 9, limit: 9 },
            429,
            "rate_limit_error",
            Some("queue_full"),
            None,
            "9 is the limit",
        ),
        (
            SubmitError::Grammar { tools: false, message: "no".into() },
            400,
            "invalid_request_error",
            None,
            Some("response_format"),
            "no",
        ),
        (SubmitError::Busy("later".into()), 429, "rate_limit_error", Some("grammar_busy"), None, "later"),
        (SubmitError::Stopping, 503, "server_error", Some("draining"), None, "shutting down"),
    ] {
        for stream in [false, true] {
            let generate = Scripted::new([Err(refusal.clone())]);
            let answer = complete(&generate, json!({"prompt": "a", "stream": stream})).await;
            assert_eq!(answer.status, status, "{refusal}");
            assert_eq!(answer.headers.contains_key("retry-after"), status == 429, "{refusal}");
            let error = answer.error();
            assert_eq!((&error["type"], &error["code"], &error["param"]), (&json!(kind), &json!(code), &json!(param)));
            assert!(error["message"].as_str().unwrap().contains(message), "{error}");
        }
    }
}

#[tokio::test]
async fn a_refusal_of_a_later_prompt_abandons_those_before_it() {
    let (first, a) = live();
    let generate = Scripted::new([a, Err(SubmitError::QueueFull { unfinished: 2, limit: 2 })]);
    let answer = complete(&generate, json!({"prompt": ["a", "b", "c"]})).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(first.is_closed());
    assert_eq!(generate.submitted.lock().unwrap().len(), 2, "nothing is submitted after a refusal");
}

#[tokio::test]
async fn a_bad_prompt_among_good_ones_submits_nothing() {
    for (prompts, message) in [
        (json!(["a", "unencodable"]), "cannot be encoded"),
        (json!(["a", ""]), "empty"),
        (json!([[1], [256]]), "token id 256"),
        (json!(["a", "b".repeat(60)]), "max_tokens"),
        (json!(["a", "b".repeat(64)]), "64 tokens"),
    ] {
        let generate = Scripted::new([]);
        let answer = complete(&generate, json!({"prompt": prompts, "max_tokens": 16})).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{prompts}");
        assert!(answer.error()["message"].as_str().unwrap().contains(message), "{}", answer.body);
    }
}

#[tokio::test]
async fn an_answer_that_would_be_out_of_all_proportion_is_refused() {
    let generate = Scripted::new([]);
    let prompts = vec!["b".repeat(60); 40];
    let body = json!({"prompt": prompts, "n": 128, "echo": true, "logprobs": 20, "max_tokens": 1});
    let answer = complete(&generate, body).await;
    assert_eq!((answer.status, &answer.error()["param"]), (StatusCode::BAD_REQUEST, &json!("logprobs")));
    assert!(answer.body.contains("at most 1048576; got 6451200"), "{}", answer.body);
}

#[tokio::test]
async fn the_default_of_max_tokens_gives_way_to_the_context() {
    let generate = Scripted::new([told([done(1)])]);
    let answer = complete(&generate, json!({"prompt": "b".repeat(60)})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    assert_eq!(generate.submitted.lock().unwrap()[0].max_tokens, 4);
}

#[tokio::test]
async fn fields_reach_the_generator_as_given_and_defaults_are_openais() {
    let generate = Scripted::new([told([done(1)]), told([done(1), done_of(1, 1)])]);
    complete(&generate, json!({"prompt": [1, 2]})).await;
    complete(
        &generate,
        json!({"model": "org/double", "prompt": "ab", "max_tokens": 9, "min_tokens": 3, "temperature": 0.5,
            "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": -1.5, "frequency_penalty": 1.5,
            "repetition_penalty": 1.25, "seed": -1, "stop": "x", "stop_token_ids": [5, 6], "ignore_eos": true,
            "skip_special_tokens": false, "user": "someone", "n": 2, "logprobs": 3, "logit_bias": {"5": 1.5, "6": -2},
            "prompt_logprobs": 4, "cache_salt": "tenant", "router": "dynk:0.5", "response_format": {"type": "json_object"}}),
    )
    .await;
    let submitted = generate.submitted.lock().unwrap();
    let default = GenerateRequest { sampling: Default::default(), ..GenerateRequest::greedy(vec![1, 2], 16) };
    assert_eq!((default.sampling.temperature, default.sampling.top_p), (1.0, 1.0));
    assert_eq!(submitted[0], default);
    let sampling = moe_serve::types::SamplingParams {
        temperature: 0.5,
        top_p: 0.25,
        top_k: 7,
        min_p: 0.125,
        presence_penalty: -1.5,
        frequency_penalty: 1.5,
        repetition_penalty: 1.25,
        logit_bias: vec![(5, 1.5), (6, -2.0)],
        seed: Some(u64::MAX),
    };
    let given = GenerateRequest {
        prompt: vec![97, 98],
        n: 2,
        max_tokens: 9,
        min_tokens: 3,
        sampling,
        stop: vec!["x".into()],
        stop_token_ids: vec![5, 6],
        ignore_eos: true,
        skip_special_tokens: false,
        logprobs: Some(3),
        scoring: Some(PromptScoring { top: 4, from: 1, whole: false }),
        trace: false,
        reuse_max: None,
        grammar: Some(GrammarSpec::JsonObject),
        cache_salt: "tenant".into(),
        router: Some("dynk:0.5".parse().unwrap()),
        budget_version: None,
    };
    assert_eq!(submitted[1], given);
}

#[tokio::test]
async fn all_prompts_of_a_request_keep_the_budgets_version_and_the_answer_tells_it() {
    let whole = || told([text("x"), done(1)]);
    let generate = Arc::new(Scripted {
        budget: Some(BudgetState {
            version: 7,
            router: "policy:p.json,at=0.6000".parse().unwrap(),
            share: 0.6,
            shed: true,
        }),
        ..Arc::into_inner(Scripted::new([whole(), whole(), whole()])).unwrap()
    });
    let answer = complete(&generate, json!({"prompt": ["a", "b"]})).await.json();
    assert_eq!(answer["usage"]["moe"]["router"], "policy:p.json,at=0.6000");
    assert_eq!(answer["usage"]["moe"]["budget"], json!({"version": 7, "share": 0.6, "shed": true}));
    // Who names a router has no part in the budget.
    let answer = complete(&generate, json!({"prompt": "a", "router": "topk:1"})).await.json();
    assert_eq!((&answer["usage"]["moe"]["router"], answer["usage"]["moe"].get("budget")), (&json!("topk:1"), None));
    let versions: Vec<_> = generate.submitted.lock().unwrap().iter().map(|r| r.budget_version).collect();
    assert_eq!(versions, [Some(7), Some(7), None]);
}

#[tokio::test]
async fn dropping_a_streamed_body_abandons_its_prompts() {
    let ((first, a), (second, b)) = (live(), live());
    let generate = Scripted::new([a, b]);
    let mut parts = Parts::begin(&generate, json!({"prompt": ["a", "b"], "stream": true})).await;
    first.send(text("x"));
    parts.json().await;
    assert!(!first.is_closed() && !second.is_closed());
    drop(parts);
    for sender in [first, second] {
        tokio::time::timeout(Duration::from_secs(10), sender.closed()).await.expect("the events are dropped");
    }
}

#[tokio::test]
async fn dropping_the_request_for_a_whole_answer_abandons_its_prompts() {
    let ((first, a), (second, b)) = (live(), live());
    let generate = Scripted::new([a, b]);
    let asked = tokio::spawn({
        let generate = generate.clone();
        async move { complete(&generate, json!({"prompt": ["a", "b"]})).await.status }
    });
    while generate.submitted.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    asked.abort();
    for sender in [first, second] {
        tokio::time::timeout(Duration::from_secs(10), sender.closed()).await.expect("the events are dropped");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413_that_names_it_and_one_below_is_read() {
    const LIMIT: usize = 16 << 20;
    let generate = Scripted::new([]);
    let too_large = answer(&generate, Method::POST, "/v1/completions", vec![b' '; LIMIT + 1]).await;
    assert_eq!(too_large.status, StatusCode::PAYLOAD_TOO_LARGE);
    let error = too_large.error();
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["message"].as_str().unwrap().contains(&LIMIT.to_string()), "{error}");
    let at_limit = answer(&generate, Method::POST, "/v1/completions", vec![b' '; LIMIT]).await;
    assert_eq!(at_limit.status, StatusCode::BAD_REQUEST);
    assert!(at_limit.error()["message"].as_str().unwrap().contains("not valid JSON"));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_errors_in_openais_shape() {
    let generate = Scripted::new([]);
    for path in ["/v1", "/v1/completion", "/v1/completions/", "/v1/chat", "/assets/x.js", "/metrics/x"] {
        let answer = answer(&generate, Method::GET, path, Body::empty()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.error()["type"], "invalid_request_error", "{path}");
    }
    for (method, path, allowed) in [
        (Method::GET, "/v1/completions", "POST"),
        (Method::GET, "/v1/chat/completions", "POST"),
        (Method::GET, "/tokenize", "POST"),
        (Method::POST, "/", "GET,HEAD"),
        (Method::PUT, "/v1/completions", "POST"),
        (Method::POST, "/v1/models", "GET,HEAD"),
        (Method::DELETE, "/v1/models/org/double", "GET,HEAD"),
        (Method::POST, "/health", "GET,HEAD"),
        (Method::POST, "/metrics", "GET,HEAD"),
    ] {
        let answer = answer(&generate, method, path, Body::empty()).await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
        assert_eq!(answer.error()["type"], "invalid_request_error", "{path}");
        assert_eq!(answer.headers["allow"], allowed, "{path}");
    }
}

#[tokio::test]
async fn models_are_found_by_ids_with_slashes_and_no_other() {
    let generate = Scripted::new([]);
    let list = answer(&generate, Method::GET, "/v1/models", Body::empty()).await.json();
    assert_eq!((&list["object"], list["data"].as_array().unwrap().len()), (&json!("list"), 1));
    let want = json!({"id": "org/double", "object": "model", "created": 7, "owned_by": "moe-serve",
        "max_model_len": 64, "router": "native: k = 2"});
    assert_eq!(list["data"][0], want);
    for path in ["/v1/models/org/double", "/v1/models/org%2Fdouble"] {
        assert_eq!(answer(&generate, Method::GET, path, Body::empty()).await.json(), want, "{path}");
    }
    let other = answer(&generate, Method::GET, "/v1/models/org/other", Body::empty()).await;
    assert_eq!(other.status, StatusCode::NOT_FOUND);
    let error = other.error();
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("`org/other`") && message.contains("`org/double`"), "{message}");
}

#[tokio::test]
async fn health_follows_the_generator() {
    let mut generate = Scripted::new([]);
    assert_eq!(answer(&generate, Method::GET, "/health", Body::empty()).await.status, StatusCode::OK);
    Arc::get_mut(&mut generate).unwrap().ready = false;
    let sick = answer(&generate, Method::GET, "/health", Body::empty()).await;
    assert_eq!(sick.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(sick.error()["type"], "server_error");
    let metrics = answer(&generate, Method::GET, "/metrics", Body::empty()).await;
    assert_eq!(metrics.body, "double_total 1\n");
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
}
