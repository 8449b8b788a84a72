//! The bundled checkpoint over HTTP: what is asked for is what comes.

use crate::support::{Series, Server, ServerOptions, repo};
use futures::StreamExt;
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, KvSize};
use moe_serve::types::DtypeChoice;
use moe_serve::wire::{CompletionResponse, MoeUsage, UsageBody};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const PROMPT: &str = "Once upon a time, there was a little girl named";

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

fn with(mut body: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// What does not change from one answer to the next.
fn gist(answer: &CompletionResponse) -> (Vec<(usize, &str, &str)>, &UsageBody) {
    (answer.choices.iter().map(|c| (c.index, c.text.as_str(), c.finish_reason.as_str())).collect(), &answer.usage)
}

#[tokio::test]
async fn whole_and_streamed_answers_are_the_same() {
    let server = Server::native();
    let prompts = json!([PROMPT, "Tom had a red ball.", "The sun"]);
    let seeded = json!({"prompt": prompts, "max_tokens": 30, "seed": 11, "temperature": 0.8});
    for body in [greedy(PROMPT, 40), seeded, with(greedy(PROMPT, 60), json!({"stop": ["the", "."]}))] {
        let whole = server.complete(body.clone()).await;
        let streamed = server.stream(with(body, json!({"stream_options": {"include_usage": true}}))).await;
        for choice in &whole.choices {
            assert_eq!(streamed.text(choice.index), choice.text);
            assert_eq!(streamed.finish_reasons(choice.index), [choice.finish_reason.as_str()]);
        }
        let (last, rest) = streamed.chunks.split_last().unwrap();
        assert_eq!((last.choices.len(), last.usage.as_ref()), (0, Some(&whole.usage)));
        assert!(rest.iter().all(|c| c.choices.len() == 1 && c.usage.is_none()));
    }
}

#[tokio::test]
async fn a_stream_sends_text_while_it_is_made() {
    let server = Server::native();
    let streamed = server.stream(greedy(PROMPT, 24)).await;
    let pieces = streamed.chunks.iter().filter(|c| !c.choices[0].text.is_empty()).count();
    assert!(pieces > 12, "24 tokens came in {pieces} pieces");
    assert!(!streamed.raw.contains("\"usage\""), "the usage was not asked for");
    let (last, rest) = streamed.chunks.split_last().unwrap();
    assert_eq!(last.choices[0].finish_reason.as_deref(), Some("length"));
    assert!(rest.iter().all(|c| c.choices[0].finish_reason.is_none()));
}

#[tokio::test]
async fn the_four_kinds_of_prompt_mean_the_same_tokens() {
    let server = Server::native();
    let texts = [PROMPT, "Tom had a red ball."];
    let ids: Vec<Vec<u32>> = texts.iter().map(|t| server.engine.encode(t, true).unwrap()).collect();
    let ask = |prompt: Value| server.complete(with(greedy("", 20), json!({"prompt": prompt})));
    let many = ask(json!(texts)).await;
    assert_eq!(many.choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1]);
    assert_ne!(many.choices[0].text, many.choices[1].text);
    assert_eq!(gist(&ask(json!(ids)).await), gist(&many));
    assert_eq!(gist(&ask(json!([ids[0], texts[1]])).await), gist(&many));
    for (index, (text, ids)) in texts.iter().zip(&ids).enumerate() {
        let one = ask(json!(text)).await;
        assert_eq!(gist(&ask(json!(ids)).await), gist(&one));
        assert_eq!((one.choices[0].index, &one.choices[0].text), (0, &many.choices[index].text));
        assert_eq!((one.usage.prompt_tokens, one.usage.completion_tokens), (ids.len(), 20));
        assert_eq!(one.usage.total_tokens, ids.len() + 20);
    }
    assert_eq!(many.usage.prompt_tokens, ids.concat().len());
    let reversed = ask(json!([texts[1], texts[0]])).await;
    assert_eq!(reversed.choices[0].text, many.choices[1].text);
}

#[tokio::test]
async fn a_seed_fixes_sampled_text_and_another_seed_changes_it() {
    let server = Server::native();
    let ask = async |seed: Value| {
        let body = json!({"prompt": PROMPT, "max_tokens": 40, "seed": seed, "top_p": 0.95, "ignore_eos": true});
        server.complete(body).await.choices.remove(0).text
    };
    let (one, two) = (ask(json!(1)).await, ask(json!(2)).await);
    assert_eq!(ask(json!(1)).await, one);
    assert_eq!(ask(json!(-1)).await, ask(json!(-1)).await);
    assert_ne!(one, two);
    assert_ne!(ask(json!(null)).await, ask(json!(null)).await, "no seed draws anew every time");
}

#[tokio::test]
async fn a_stop_string_over_several_tokens_ends_the_text_before_it_and_streams_nothing_of_it() {
    let server = Server::native();
    let whole = server.complete(greedy(PROMPT, 60)).await.choices.remove(0).text;
    // Cut out at every fifth character, so that beginnings and ends lie within tokens and words.
    let at = |from: usize, len: usize| whole.get(from..from + len);
    let stops: Vec<&str> = (10..whole.len()).step_by(17).filter_map(|from| at(from, 9)).collect();
    assert!(stops.len() > 5, "too little text to cut stops from: {whole:?}");
    for stop in stops {
        let want = &whole[..whole.find(stop).unwrap()];
        let streamed = server.stream(with(greedy(PROMPT, 60), json!({"stop": ["not in there", stop]}))).await;
        assert_eq!(streamed.text(0), want, "stop {stop:?}");
        assert_eq!(streamed.finish_reasons(0), ["stop"], "stop {stop:?}");
    }
    let missed = server.complete(with(greedy(PROMPT, 60), json!({"stop": format!("{whole}!")}))).await;
    assert_eq!((missed.choices[0].text.as_str(), missed.choices[0].finish_reason.as_str()), (whole.as_str(), "length"));
}

#[tokio::test]
async fn of_several_stop_strings_the_first_in_the_text_counts() {
    let server = Server::native();
    let whole = server.complete(greedy(PROMPT, 60)).await.choices.remove(0).text;
    let (early, late) = (&whole[20..26], &whole[60..66]);
    let want = &whole[..whole.find(early).unwrap().min(whole.find(late).unwrap())];
    for stop in [json!([early, late]), json!([late, early])] {
        let answer = server.complete(with(greedy(PROMPT, 60), json!({"stop": stop}))).await;
        assert_eq!((answer.choices[0].text.as_str(), answer.choices[0].finish_reason.as_str()), (want, "stop"));
    }
}

/// A server whose model ends every sentence with EOS: the full stop is one of two EOS tokens.
fn ends_at_full_stop() -> Server {
    let plain = ServerOptions::default();
    let full_stop = Server::start(plain.clone()).engine.encode("end.", true).unwrap().pop().unwrap();
    Server::start(ServerOptions { eos: Some(vec![0, full_stop]), ..plain })
}

#[tokio::test]
async fn eos_ends_a_completion_unless_ignored_or_too_early() {
    let server = ends_at_full_stop();
    let ignoring = server.complete(greedy(PROMPT, 50)).await;
    let text = &ignoring.choices[0].text;
    assert_eq!((ignoring.choices[0].finish_reason.as_str(), ignoring.usage.completion_tokens), ("length", 50));
    let sentence = &text[..text.find('.').expect("50 tokens hold a full stop")];

    let body = json!({"prompt": PROMPT, "max_tokens": 50, "temperature": 0});
    let ended = server.complete(body.clone()).await;
    assert_eq!((ended.choices[0].text.as_str(), ended.choices[0].finish_reason.as_str()), (sentence, "stop"));
    let tokens = ended.usage.completion_tokens;
    assert!((1..50).contains(&tokens), "EOS is counted and ends it: {tokens}");

    let exact = server.complete(with(body.clone(), json!({"max_tokens": tokens}))).await;
    assert_eq!(exact.choices[0].finish_reason, "stop", "EOS as the last token allowed");
    let short = server.complete(with(body.clone(), json!({"max_tokens": tokens - 1}))).await;
    assert_eq!((short.choices[0].text.as_str(), short.choices[0].finish_reason.as_str()), (sentence, "length"));

    let early = server.complete(with(body.clone(), json!({"min_tokens": tokens - 1}))).await;
    assert_eq!(early.choices[0].text, sentence, "the EOS is not within the first min_tokens");
    let later = server.complete(with(body, json!({"min_tokens": tokens + 5}))).await;
    assert!(later.usage.completion_tokens > tokens + 5, "{:?}", later.usage);
    assert!(later.choices[0].text.starts_with(sentence) && !later.choices[0].text.starts_with(text.as_str()));
}

#[tokio::test]
async fn stop_token_ids_end_a_completion_even_where_eos_is_ignored() {
    let server = Server::native();
    let full_stop = server.engine.encode("end.", true).unwrap().pop().unwrap();
    let text = server.complete(greedy(PROMPT, 50)).await.choices.remove(0).text;
    let answer = server.complete(with(greedy(PROMPT, 50), json!({"stop_token_ids": [3, full_stop]}))).await;
    assert_eq!(answer.choices[0].text, text[..text.find('.').unwrap()]);
    assert_eq!(answer.choices[0].finish_reason, "stop");
}

#[tokio::test]
async fn no_stop_string_ends_a_completion_before_min_tokens() {
    let server = Server::native();
    let whole = server.complete(greedy(PROMPT, 40)).await.choices.remove(0).text;
    let min_tokens = 30;
    let answer = server.complete(with(greedy(PROMPT, 40), json!({"stop": " ", "min_tokens": min_tokens}))).await;
    let text = &answer.choices[0].text;
    assert!(answer.usage.completion_tokens > min_tokens, "ended after {} tokens", answer.usage.completion_tokens);
    assert_eq!(answer.choices[0].finish_reason, "stop");
    assert!(text.contains(' ') && whole.starts_with(text.as_str()), "{text:?} of {whole:?}");
    assert!(whole[text.len()..].starts_with(' '), "{text:?} of {whole:?}");
}

#[tokio::test]
async fn max_tokens_is_16_when_not_given() {
    let server = Server::native();
    let answer = server.complete(json!({"prompt": PROMPT, "ignore_eos": true})).await;
    assert_eq!((answer.usage.completion_tokens, answer.choices[0].finish_reason.as_str()), (16, "length"));
}

#[tokio::test]
async fn a_request_may_fill_the_context_to_its_last_token() {
    let config = EngineConfig { kv_size: Some(KvSize::Bytes(1 << 18)), ..Default::default() };
    let server = Server::start(ServerOptions { config, ..Default::default() });
    let context = server.engine.info().limits.max_model_len;
    assert!(context < 1024, "the context is cut to what the cache holds; got {context}");
    let ids = vec![5; context - 3];
    let answer = server.complete(with(greedy("", 3), json!({"prompt": ids}))).await;
    assert_eq!((answer.usage.completion_tokens, answer.choices[0].finish_reason.as_str()), (3, "length"));
    let refused = server.post(&with(greedy("", 4), json!({"prompt": ids}))).await;
    assert_eq!(refused.status(), 400);
}

#[tokio::test]
async fn usage_tells_what_each_router_saved_and_what_it_cost() {
    let mut saved = Vec::new();
    for router in ["topk:1", "dynk:0.8", "native", "topk:2", "topk:4"] {
        let server = Server::start(ServerOptions { router, ..Default::default() });
        let answer = server.complete(greedy(PROMPT, 24)).await;
        saved.push((router, answer.usage.moe, answer.choices[0].text.clone()));
    }
    let [(_, one, _), (_, dynamic, _), (_, native, native_text), (_, two, two_text), (_, four, _)] = &saved[..] else {
        panic!("five routers")
    };
    assert_eq!((native.experts_per_token, native.expert_flops_saved, native.forward_flops_saved), (2.0, 0.0, 0.0));
    let two = MoeUsage { router: native.router.clone(), ..two.clone() };
    assert_eq!((&two, two_text), (native, native_text), "topk of the checkpoint's own k is its own router");
    assert_eq!((one.experts_per_token, one.expert_flops_saved), (1.0, 0.5));
    assert_eq!((four.experts_per_token, four.expert_flops_saved), (4.0, -1.0), "more experts are a cost");
    assert!((1.0..2.0).contains(&dynamic.experts_per_token) && dynamic.experts_per_token > 1.0, "{dynamic:?}");
    assert_eq!(dynamic.expert_flops_saved, 1.0 - dynamic.experts_per_token / 2.0);
    for moe in [one, dynamic, four] {
        let (experts, forward) = (moe.expert_flops_saved, moe.forward_flops_saved);
        assert!(forward != 0.0 && forward.signum() == experts.signum(), "{moe:?}");
        assert!(forward.abs() < experts.abs(), "experts are a part of the forward pass: {moe:?}");
    }
}

#[tokio::test]
async fn requests_at_the_same_time_give_exactly_what_each_gives_alone() {
    // Few sequences and few tokens at a time, so that requests wait, join and leave in mid-flight.
    let config = EngineConfig {
        max_num_seqs: 10,
        max_batched_tokens: 24,
        kv_size: Some(KvSize::Bytes(4 << 20)),
        // What the cache had is not computed again, and counts no work.
        prefix_cache: false,
        ..Default::default()
    };
    for (router, dtype) in [("native", DtypeChoice::F32), ("dynk:0.8", DtypeChoice::Bf16)] {
        let server = Server::start(ServerOptions { router, dtype, config: config.clone(), ..Default::default() });
        let starts =
            ["Once upon a time", "Tom and Lily", "A big dog", "The moon was", "\"Hello,\" said the", "One day"];
        let body = |i: usize| {
            let prompt = [starts[i % 6], " in the garden", &" and then".repeat(i % 7)].concat();
            let temperature = [0.0, 0.7, 1.0, 1.3][i % 4];
            json!({"prompt": prompt, "seed": i, "temperature": temperature, "max_tokens": 8 + i % 16,
                "repetition_penalty": 1.0 + (i % 3) as f64 / 10.0})
        };
        let mut alone = Vec::new();
        for i in 0..24 {
            alone.push(server.complete(body(i)).await);
        }
        let together = futures::future::join_all((0..24).map(|i| server.complete(body(i)))).await;
        for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert_eq!(gist(together), gist(alone), "{router}: request {i}");
        }
    }
}

/// The bundled tokenizer with every `every`th token changed to begin with the second byte of é and end with the first.
fn splitting_tokenizer(dir: &Path, every: u64) -> PathBuf {
    let json = std::fs::read_to_string(repo("models/stories/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&json).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let change = |(token, id): (&String, &Value)| match id.as_u64().unwrap() {
        n if n > 0 && n % every == 0 => (format!("©{token}Ã"), id.clone()),
        _ => (token.clone(), id.clone()),
    };
    json["model"]["vocab"] = vocab.iter().map(change).collect::<serde_json::Map<_, _>>().into();
    json["model"]["merges"] = json!([]);
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

#[tokio::test]
async fn characters_that_lie_across_tokens_are_never_split() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Server::native();
    let prompt = plain.engine.encode(PROMPT, true).unwrap();
    let body = with(greedy("", 60), json!({"prompt": prompt}));
    let text = plain.complete(body.clone()).await.choices.remove(0).text;
    let tokenizer = Some(splitting_tokenizer(dir.path(), 1));
    let server = Server::start(ServerOptions { tokenizer, ..Default::default() });
    let whole = server.complete(body.clone()).await.choices.remove(0).text;
    // The last token leaves half a character behind.
    let all_but_end = whole.strip_suffix('\u{FFFD}').unwrap_or_else(|| panic!("no half character ends {whole:?}"));
    assert_eq!(all_but_end.matches('é').count(), 60, "{whole:?}");
    assert_eq!(all_but_end.replace('é', ""), text);
    let streamed = server.stream(body.clone()).await;
    assert_eq!(streamed.text(0), whole);
    let pieces: Vec<&str> = streamed.chunks.iter().map(|c| c.choices[0].text.as_str()).collect();
    assert!(pieces.len() > 30, "held back too long: {pieces:?}");
    assert!(pieces.iter().rev().skip(2).all(|p| !p.contains('\u{FFFD}')), "{pieces:?}");
    let stopped = server.stream(with(body, json!({"stop": "é.é"}))).await;
    assert_eq!(stopped.text(0), whole[..whole.find("é.é").unwrap()]);
}

#[tokio::test]
async fn models_health_and_version_tell_what_is_served() {
    let server = Server::start(ServerOptions { router: "dynk:0.8", ..Default::default() });
    let json = async |path: &str| server.get(path).await.json::<Value>().await.unwrap();
    let list = json("/v1/models").await;
    let model = json("/v1/models/stories").await;
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    assert_eq!((&model["id"], &model["object"]), (&json!("stories"), &json!("model")));
    assert_eq!(model["max_model_len"], 1024);
    assert!(model["router"].as_str().unwrap().contains("0.8"), "{model}");
    assert_eq!(server.get("/v1/models/other").await.status(), 404);
    assert_eq!(json("/version").await, json!({"version": env!("CARGO_PKG_VERSION")}));
    assert_eq!(json("/health").await, json!({"status": "ok"}));
    let answer = server.complete(json!({"prompt": PROMPT, "model": "stories"})).await;
    assert_eq!((answer.model.as_str(), answer.object.as_str()), ("stories", "text_completion"));
    server.engine.drain();
    assert_eq!(server.get("/health").await.status(), 503, "a server that accepts nothing is not healthy");
    assert_eq!(server.post(&greedy(PROMPT, 1)).await.status(), 503);
}

#[tokio::test]
async fn a_full_queue_is_a_429_that_says_when_to_come_back_and_frees_up_again() {
    let config = EngineConfig { max_num_seqs: 1, max_queue: 1, ..ServerOptions::default().config };
    let server = Server::start(ServerOptions { config, ..Default::default() });
    let long = with(greedy(PROMPT, 1000), json!({"stream": true}));
    let (running, waiting) = (server.post(&long).await, server.post(&long).await);
    assert_eq!((running.status(), waiting.status()), (200.try_into().unwrap(), 200.try_into().unwrap()));
    server.series_when("one waiting", |s| s.sum("vllm:num_requests_waiting", &[]) == 1.0).await;
    let refused = server.post(&greedy(PROMPT, 1)).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let error = refused.json::<Value>().await.unwrap()["error"].take();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
    assert!(error["message"].as_str().unwrap().contains("2 is the limit"), "{error}");
    drop((running, waiting));
    let idle = |s: &Series| s.sum("moe_requests_total", &["finished_reason=\"abort\""]) == 2.0;
    let series = server.series_when("both gone", idle).await;
    assert_eq!(series.sum("moe_requests_rejected_total", &["reason=\"queue_full\""]), 1.0);
    server.complete(greedy(PROMPT, 1)).await;
}

#[tokio::test]
async fn a_client_that_waits_for_its_answer_never_meets_a_full_queue() {
    let config = EngineConfig { max_num_seqs: 1, max_queue: 0, ..ServerOptions::default().config };
    let server = Server::start(ServerOptions { config, ..Default::default() });
    for _ in 0..100 {
        server.complete(greedy("A", 1)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place_and_blocks_at_once() {
    let server = Server::native();
    for stream in [true, false] {
        let before = server.series().await;
        let body = with(greedy(PROMPT, 1000), json!({"stream": stream}));
        if stream {
            let mut pieces = server.post(&body).await.bytes_stream();
            pieces.next().await.unwrap().unwrap();
        } else {
            let asked = tokio::spawn(server.client.post(format!("{}/v1/completions", server.url)).json(&body).send());
            server.series_when("running", |s| s.sum("vllm:num_requests_running", &[]) == 1.0).await;
            asked.abort();
        }
        let aborts = |s: &Series| s.sum("vllm:request_success_total", &["finished_reason=\"abort\""]);
        let after = server.series_when("aborted", |s| aborts(s) == aborts(&before) + 1.0).await;
        let generated =
            after.sum("vllm:generation_tokens_total", &[]) - before.sum("vllm:generation_tokens_total", &[]);
        assert!(generated < 900.0, "the request ran on to {generated} of its 1000 tokens");
        let idle = |s: &Series| {
            s.sum("vllm:num_requests_running", &[]) == 0.0 && s.sum("vllm:kv_cache_usage_perc", &[]) == 0.0
        };
        server.series_when("idle", idle).await;
    }
}
