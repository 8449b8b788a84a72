//! The engine in process: batching changes nothing, blocks come back, the books are right.

use crate::support::{engine, repo};
use moe_serve::engine::api::{Event, Events, Generate, PromptReport, SubmitError};
use moe_serve::engine::{Engine, EngineConfig, KvSize, RequestRouters};
use moe_serve::types::{DtypeChoice, FinishReason, GenerateRequest, PromptScoring, SamplingParams, Usage};
use std::time::{Duration, Instant};

fn bundled(router: &str, config: EngineConfig) -> Engine {
    let request_routers = Some(RequestRouters { experts_max: Some(8), ..Default::default() });
    let config = EngineConfig { request_routers, ..config };
    engine(&repo("models/stories"), DtypeChoice::Auto, router, config)
}

/// Requests of many kinds: lengths, seeds, routers, penalties.
fn requests(engine: &Engine, n: usize) -> Vec<GenerateRequest> {
    let text =
        "Once upon a time there was a king who had three sons and a garden full of golden apples, and every night";
    let ids = engine.encode(&format!("{text} {text} {text}"), true).unwrap();
    let routers = [None, Some("topk:1"), Some("dynk:0.7"), Some("dynk:0.9,mass=full"), Some("uniform:3")];
    let one = |i: usize| GenerateRequest {
        ignore_eos: true,
        router: routers[i % routers.len()].map(|r| r.parse().unwrap()),
        sampling: SamplingParams {
            temperature: [0.0, 0.7, 1.2][i % 3],
            top_p: [1.0, 0.9][i % 2],
            top_k: [0, 20, 0, 5][i % 4],
            frequency_penalty: [0.0, 0.4][i % 2],
            seed: Some(i as u64),
            ..Default::default()
        },
        ..GenerateRequest::greedy(ids[i % 5..5 + (i * 7) % 60].to_vec(), 4 + (i * 5) % 30)
    };
    (0..n).map(one).collect()
}

fn run_together(engine: &Engine, requests: &[GenerateRequest]) -> Vec<(String, FinishReason, Usage)> {
    let events: Vec<Events> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    events.into_iter().map(|e| e.wait().unwrap()).collect()
}

fn run_alone(engine: &Engine, requests: &[GenerateRequest]) -> Vec<(String, FinishReason, Usage)> {
    requests.iter().map(|r| engine.submit(r.clone()).unwrap().wait().unwrap()).collect()
}

/// The value of a series without labels, or with exactly these.
fn metric(engine: &Engine, series: &str) -> f64 {
    let text = engine.metrics();
    let line = text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no series {series}")).parse().unwrap()
}

#[test]
fn what_a_request_is_batched_with_changes_nothing() {
    let config = EngineConfig { max_batched_tokens: 48, prefix_cache: false, ..Default::default() };
    let engine = bundled("native", config);
    let requests = requests(&engine, 40);
    let alone = run_alone(&engine, &requests);
    assert_eq!(run_together(&engine, &requests), alone);
    let different =
        |f: fn(&Usage) -> u64| alone.iter().map(|r| f(&r.2)).collect::<std::collections::HashSet<_>>().len();
    assert!(different(|u| u.work.expert_rows) > 5, "the requests are too alike to prove anything");
}

#[test]
fn preempted_requests_give_the_same_text_and_the_blocks_come_back() {
    let block_bytes = 2 * 4 * 16 * 2 * 32 * 2;
    let kv_size = Some(KvSize::Bytes(12 * block_bytes));
    let config = EngineConfig { kv_size, max_batched_tokens: 64, prefix_cache: false, ..Default::default() };
    let small = bundled("native", config);
    let requests = requests(&small, 24);
    let together = run_together(&small, &requests);
    assert!(metric(&small, "moe_preemptions_total") > 0.0, "nothing was preempted: the test proves nothing");
    let roomy = bundled("native", EngineConfig { prefix_cache: false, ..Default::default() });
    let alone = run_alone(&roomy, &requests);
    let texts = |runs: &[(String, FinishReason, Usage)]| runs.iter().map(|r| r.0.clone()).collect::<Vec<_>>();
    assert_eq!(texts(&together), texts(&alone));
    assert_eq!(metric(&small, "moe_kv_cache_usage_ratio"), 0.0);
    let work = |runs: &[(String, FinishReason, Usage)]| runs.iter().map(|r| r.2.work.tokens).sum::<u64>();
    assert!(work(&together) > work(&alone), "recomputed tokens are work too");
}

#[test]
fn the_books_agree_with_a_count_by_hand_on_a_tiny_model() {
    // tests/golden/mixtral_gqa: two numbers per layer and token are all that varies with the router.
    let dir = repo("tests/golden/mixtral_gqa");
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
    let field = |name: &str| config[name].as_u64().unwrap();
    let (d, f, e, k0) =
        (field("hidden_size"), field("intermediate_size"), field("num_local_experts"), field("num_experts_per_tok"));
    let (layers, vocab, heads, kv) =
        (field("num_hidden_layers"), field("vocab_size"), field("num_attention_heads"), field("num_key_value_heads"));
    let hd = d / heads;
    let (prompt, generated) = (7u64, 5u64);

    let engine = engine(&dir, DtypeChoice::F32, "topk:3", EngineConfig::default());
    let mut request = GenerateRequest::greedy((0..prompt as u32).collect(), generated as usize);
    request.ignore_eos = true;
    let (_, _, usage) = engine.submit(request).unwrap().wait().unwrap();

    // The last token is sampled and never computed. Token at position p sees p + 1 keys.
    let tokens = prompt + generated - 1;
    let keys: u64 = (1..=tokens).sum();
    let attention = tokens * (2 * d * heads * hd * 2 + 2 * d * kv * hd * 2) + keys * 4 * heads * hd;
    let other = layers * (attention + tokens * 2 * d * e) + generated * 2 * d * vocab;
    let expert = 3 * 2 * d * f;
    let (ran, native) = (layers * tokens * 3 * expert, layers * tokens * k0 * expert);
    assert_eq!(usage.work.experts.ran, ran);
    assert_eq!(usage.work.experts.native, native);
    assert_eq!(usage.work.forward.ran, other + ran);
    assert_eq!(usage.work.forward.native, other + native);
    assert_eq!(usage.work.experts_per_token(), 3.0);

    assert_eq!(metric(&engine, "moe_flops_total{scope=\"experts\"}"), ran as f64);
    assert_eq!(metric(&engine, "moe_flops_native_total{scope=\"experts\"}"), native as f64);
    assert_eq!(metric(&engine, "moe_flops_total{scope=\"forward\"}"), (other + ran) as f64);
    assert_eq!(metric(&engine, "moe_flops_native_total{scope=\"forward\"}"), (other + native) as f64);
    assert_eq!(metric(&engine, "moe_flops_saved_ratio{scope=\"experts\"}"), 1.0 - 3.0 / k0 as f64);
    assert_eq!(metric(&engine, "moe_experts_per_token_count"), (layers * tokens) as f64);
    assert_eq!(metric(&engine, "moe_experts_per_token_sum"), (3 * layers * tokens) as f64);
    let per_expert: f64 = (0..layers)
        .flat_map(|l| (0..e).map(move |x| (l, x)))
        .map(|(l, x)| metric(&engine, &format!("moe_expert_tokens_total{{expert=\"{x}\",layer=\"{l}\"}}")))
        .sum();
    assert_eq!(per_expert, (3 * layers * tokens) as f64);
    // One prefill step and one per token after the first; each read at least three experts of every layer.
    assert_eq!(metric(&engine, "moe_unique_experts_per_step_count"), generated as f64);
    let unique = metric(&engine, "moe_unique_experts_per_step_sum");
    assert!(unique >= (generated * layers * 3) as f64 && unique <= (generated * layers * e) as f64);
    let entropy = metric(&engine, "moe_router_entropy{layer=\"0\"}");
    assert!(entropy > 0.0 && entropy < 1.0);
}

#[test]
fn a_dropped_request_frees_its_blocks_and_others_go_on() {
    let engine = bundled("native", EngineConfig::default());
    let mut long = GenerateRequest::greedy(engine.encode("Once upon a time", true).unwrap(), 900);
    long.ignore_eos = true;
    let (dropped, kept) = (engine.submit(long.clone()).unwrap(), engine.submit(long).unwrap());
    drop(dropped);
    let (_, reason, usage) = kept.wait().unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 900));
    let deadline = Instant::now() + Duration::from_secs(5);
    while metric(&engine, "vllm:num_requests_running{model_name=\"test\"}") > 0.0 {
        assert!(Instant::now() < deadline, "the dropped request still runs");
        std::thread::yield_now();
    }
    assert_eq!(metric(&engine, "moe_requests_total{finished_reason=\"abort\"}"), 1.0);
    assert_eq!(metric(&engine, "moe_kv_cache_usage_ratio"), 0.0);
}

#[test]
fn a_draining_engine_finishes_what_it_has_and_refuses_the_rest() {
    let engine = bundled("native", EngineConfig::default());
    let request =
        GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(engine.encode("One day", true).unwrap(), 100) };
    let accepted = engine.submit(request.clone()).unwrap();
    assert!(engine.ready());
    engine.drain();
    assert!(!engine.ready());
    assert!(matches!(engine.submit(request), Err(SubmitError::Stopping)));
    assert_eq!(accepted.wait().unwrap().2.completion_tokens, 100);
    engine.stop();
}

#[test]
fn a_full_queue_refuses_and_has_room_again_when_requests_end() {
    let engine = bundled("native", EngineConfig { max_num_seqs: 1, max_queue: 1, ..Default::default() });
    let request =
        GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(engine.encode("One day", true).unwrap(), 400) };
    let running: Vec<Events> = (0..2).map(|_| engine.submit(request.clone()).unwrap()).collect();
    assert_eq!(engine.submit(request.clone()).unwrap_err(), SubmitError::QueueFull { unfinished: 2, limit: 2 });
    running.into_iter().for_each(|e| drop(e.wait().unwrap()));
    let deadline = Instant::now() + Duration::from_secs(5);
    // The slot is given back just after the last event is sent.
    while engine.submit(request.clone()).is_err() {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn a_request_with_a_bad_router_is_refused_and_the_engine_goes_on() {
    let engine = bundled("native", EngineConfig::default());
    let mut request = GenerateRequest::greedy(engine.encode("One day", true).unwrap(), 3);
    request.router = Some("topk:99".parse().unwrap());
    let error = engine.submit(request.clone()).unwrap_err();
    assert!(matches!(error, SubmitError::Router(_)), "{error}");
    request.router = None;
    assert!(engine.submit(request).unwrap().wait().is_ok());
}

#[test]
fn events_are_texts_and_then_one_end() {
    use futures::StreamExt;
    let engine = bundled("dynk:0.8", EngineConfig::default());
    let request = GenerateRequest::greedy(engine.encode("Once upon a time", true).unwrap(), 20);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (whole, ..) = engine.submit(request.clone()).unwrap().wait().unwrap();
    let events: Vec<Event> = runtime.block_on(engine.submit(request).unwrap().collect());
    let (end, texts) = events.split_last().unwrap();
    assert!(matches!(end, Event::Done { .. }));
    let texts: Vec<&str> =
        texts.iter().map(|e| if let Event::Text { text, .. } = e { text.as_str() } else { panic!("{e:?}") }).collect();
    assert_eq!(texts.concat(), whole);
}

#[test]
fn text_is_the_same_whether_stop_strings_are_watched_for_or_not() {
    let engine = bundled("native", EngineConfig::default());
    let prompt = engine.encode("Once upon a time", true).unwrap();
    let told = |stop: Vec<String>| {
        let request = GenerateRequest { stop, n: 2, logprobs: Some(0), ..GenerateRequest::greedy(prompt.clone(), 40) };
        let mut events = engine.submit(request).unwrap();
        let (mut texts, mut offsets) = (vec![String::new(); 2], vec![Vec::new(); 2]);
        while let Some(event) = events.blocking_next() {
            if let Event::Text { choice, text, tokens } = event {
                texts[choice].push_str(&text);
                offsets[choice].extend(tokens.iter().map(|token| (token.id, token.offset)));
            }
        }
        (texts, offsets)
    };
    let (texts, offsets) = told(Vec::new());
    assert!(offsets.iter().all(|offsets| offsets.len() == 40) && texts[0].len() > 40, "{texts:?}");
    assert_eq!(told(vec!["a string that no story holds".into()]), (texts, offsets));
}

/// What was told of a prompt, and what it used.
fn prompt_report(engine: &Engine, request: GenerateRequest) -> (PromptReport, Usage) {
    let mut events = engine.submit(request).unwrap();
    let mut report = PromptReport::default();
    loop {
        match events.blocking_next() {
            Some(Event::Prompt(told)) => report = told,
            Some(Event::Done { usage, .. }) => return (report, usage),
            other => drop(other.expect("a prompt ends with its usage")),
        }
    }
}

#[test]
fn whole_distributions_agree_with_the_scores_and_with_the_next_token() {
    let engine = bundled("native", EngineConfig { max_batched_tokens: 16, ..Default::default() });
    let prompt = engine.encode("Once upon a time there was a king who had three sons and a garden", true).unwrap();
    for from in [1, 5, prompt.len()] {
        let scoring = Some(PromptScoring { top: 1, from, whole: true });
        let request = GenerateRequest { scoring, ..GenerateRequest::greedy(prompt.clone(), 0) };
        let (report, _) = prompt_report(&engine, request);
        assert_eq!((report.scores.len(), report.distributions.len()), (prompt.len(), prompt.len() - from + 1));
        for (i, distribution) in report.distributions.iter().enumerate() {
            let sum: f64 = distribution.iter().map(|p| f64::from(*p).exp()).sum();
            assert!((sum - 1.0).abs() < 1e-5, "position {i}: probabilities sum to {sum}");
            let score = report.scores.get(from + i).map(|score| score.as_ref().unwrap().logprob);
            assert!(score.is_none_or(|score| score == distribution[prompt[from + i] as usize]));
        }
        let last = report.distributions.last().unwrap();
        let next = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        let greedy = GenerateRequest { logprobs: Some(0), ..GenerateRequest::greedy(prompt.clone(), 1) };
        let Some(Event::Text { tokens, .. }) = engine.submit(greedy).unwrap().blocking_next() else {
            panic!("a token")
        };
        assert_eq!(tokens[0].id as usize, next);
        assert!((tokens[0].score.as_ref().unwrap().logprob - last[next]).abs() < 1e-6);
    }
}

#[test]
fn what_reuse_max_names_is_computed_and_traced_although_the_cache_has_it() {
    let engine = bundled("dynk:0.8", EngineConfig::default());
    let prompt = engine.encode(&"there was a king who had three sons. ".repeat(8), true).unwrap();
    assert!(prompt.len() > 48);
    let request = |reuse_max| GenerateRequest { trace: true, reuse_max, ..GenerateRequest::greedy(prompt.clone(), 0) };
    let (first, usage) = prompt_report(&engine, request(None));
    assert_eq!(usage.cached_tokens, 0);
    for (reuse_max, cached) in [(None, (prompt.len() - 1) / 16 * 16), (Some(35), 32), (Some(0), 0)] {
        let (report, usage) = prompt_report(&engine, request(reuse_max));
        assert_eq!(usage.cached_tokens, cached);
        assert!(report.experts[..cached].iter().all(Option::is_none));
        assert_eq!(report.experts[cached..], first.experts[cached..]);
    }
}

#[test]
fn a_profiled_engine_tells_where_its_steps_spend_their_time() {
    let engine = bundled("native", EngineConfig { profile: true, ..Default::default() });
    run_together(&engine, &requests(&engine, 4));
    let text = engine.metrics();
    let seconds = |part: &str| -> f64 {
        let series = format!("moe_step_part_seconds_total{{layer=\"0\",part=\"{part}\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&series)).map_or(0.0, |v| v.parse().unwrap())
    };
    for part in ["attention", "routing", "experts", "lm_head", "sampling"] {
        assert!(seconds(part) > 0.0, "{part}");
    }
    assert_eq!(seconds("dense"), 0.0, "the model has no dense part");
    let all: f64 = text
        .lines()
        .filter(|l| l.starts_with("moe_step_part_seconds_total"))
        .map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert!(all <= metric(&engine, "moe_step_seconds_sum"), "parts lie within steps");
    let plain = bundled("native", EngineConfig::default());
    run_together(&plain, &requests(&plain, 4));
    assert!(!plain.metrics().contains("moe_step_part_seconds_total{"));
}
