//! `/v1/completions` in full: several completions, scores, biases, grammars, routers by request, the prefix cache.

use crate::support::{Runner, Server, ServerOptions, argmax, repo, try_load};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, RequestRouters};
use moe_serve::http::ServiceOptions;
use moe_serve::types::DtypeChoice;
use moe_serve::wire::{Choice, CompletionResponse, Logprobs, MoeTrace};
use serde_json::{Value, json};

const PROMPT: &str = "Once upon a time there was a little girl who had a red ball. She";

/// The error of a refused request.
async fn refused(server: &Server, body: Value) -> Value {
    let response = server.post(&body).await;
    assert_eq!(response.status(), 400, "{body}");
    response.json::<Value>().await.unwrap()["error"].clone()
}

fn logprobs(choice: &Choice) -> &Logprobs {
    choice.logprobs.as_ref().expect("log-probabilities")
}

fn mean(values: &[Option<f64>]) -> f64 {
    values.iter().flatten().sum::<f64>() / values.len() as f64
}

#[tokio::test]
async fn each_of_n_completions_is_what_its_own_seed_gives_alone() {
    let server = Server::native();
    // Long enough for the prompt's last block to be shared and copied, and for further ones.
    let body = |n: usize, seed: usize| json!({"prompt": PROMPT, "n": n, "seed": seed, "max_tokens": 24, "logprobs": 1});
    let together = server.complete(body(5, 40)).await;
    assert_eq!(together.choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let mut tokens = 0;
    for (i, choice) in together.choices.iter().enumerate() {
        let alone = server.complete(body(1, 40 + i)).await;
        assert_eq!((&choice.text, &choice.logprobs), (&alone.choices[0].text, &alone.choices[0].logprobs), "{i}");
        tokens += alone.usage.completion_tokens;
        assert_eq!(together.usage.prompt_tokens, alone.usage.prompt_tokens, "the prompt counts once");
    }
    assert_eq!(together.usage.completion_tokens, tokens);
    assert_ne!(together.choices[0].text, together.choices[1].text);
    server.series_when("idle", |s| s.sum("moe_kv_cache_usage_ratio", &[]) == 0.0).await;
}

#[tokio::test]
async fn more_completions_than_may_run_at_once_all_come_out_right() {
    let config = EngineConfig { max_num_seqs: 2, max_queue: 30, ..ServerOptions::default().config };
    let small = Server::start(ServerOptions { config, ..Default::default() });
    let body = json!({"prompt": [PROMPT, "The dog"], "n": 6, "seed": 3, "max_tokens": 12});
    let texts = |r: CompletionResponse| r.choices.into_iter().map(|c| c.text).collect::<Vec<_>>();
    assert_eq!(texts(small.complete(body.clone()).await), texts(Server::native().complete(body).await));
}

#[tokio::test]
async fn the_best_of_several_are_those_whose_tokens_are_likeliest() {
    let server = Server::native();
    let all = server.complete(json!({"prompt": PROMPT, "n": 6, "seed": 1, "max_tokens": 16, "logprobs": 0})).await;
    let best = server.complete(json!({"prompt": PROMPT, "n": 2, "best_of": 6, "seed": 1, "max_tokens": 16})).await;
    let mut ranked: Vec<(f64, &str)> =
        all.choices.iter().map(|c| (mean(&logprobs(c).token_logprobs), c.text.as_str())).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    assert_eq!(best.choices.iter().map(|c| c.text.as_str()).collect::<Vec<_>>(), [ranked[0].1, ranked[1].1]);
    assert_eq!(best.usage.completion_tokens, all.usage.completion_tokens, "what was made counts, not what is shown");
    assert_eq!(best.choices[0].logprobs, None, "they were not asked for");
    let error = refused(&server, json!({"prompt": "a", "n": 3, "best_of": 2})).await;
    assert_eq!(error["param"], "best_of");
    let error = refused(&server, json!({"prompt": "a", "best_of": 2, "stream": true})).await;
    assert_eq!(error["param"], "best_of");
}

#[tokio::test]
async fn prompts_are_scored_as_the_model_alone_scores_them() {
    let loaded = try_load(&repo("models/stories"), DtypeChoice::F32).unwrap();
    let server = Server::native();
    let ids = server.engine.encode(&[PROMPT; 4].join(" "), true).unwrap();
    let logits = Runner::new(&loaded.model, 1, ids.len(), "native").step(&[(0, &ids)]);
    let log_softmax = |z: &[f32], id: u32| {
        let max = z.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = z.iter().map(|x| f64::from(x - max).exp()).sum();
        f64::from(z[id as usize] - max) - sum.ln()
    };
    // Small steps and a warm prefix cache must change nothing.
    let config = EngineConfig { max_batched_tokens: 7, max_num_seqs: 4, ..ServerOptions::default().config };
    let chunked = Server::start(ServerOptions { config, ..Default::default() });
    chunked.complete(json!({"prompt": ids, "max_tokens": 1})).await;
    for (server, max_tokens) in [(&server, 1), (&chunked, 1), (&server, 0)] {
        let body = json!({"prompt": [ids], "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": true});
        let answer = server.complete(body).await;
        let told = logprobs(&answer.choices[0]);
        assert_eq!(told.tokens.len(), ids.len() + max_tokens);
        assert_eq!((told.token_logprobs[0], &told.top_logprobs[0]), (None, &None));
        for i in 1..ids.len() {
            let (got, want) = (told.token_logprobs[i].unwrap(), log_softmax(&logits[i - 1], ids[i]));
            assert!((got - want).abs() < 1e-5, "token {i}: {got} for {want}");
            let top = told.top_logprobs[i].as_ref().unwrap();
            let best = top.values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert_eq!(best == got, argmax(&logits[i - 1]) == ids[i], "token {i}: greedy or not can be told");
            assert!((1..=2).contains(&top.len()));
        }
        assert_eq!(answer.usage.prompt_tokens_details.cached_tokens, 0, "what is scored is computed");
        assert_eq!(answer.usage.completion_tokens, max_tokens);
    }
}

#[tokio::test]
async fn echoed_text_and_offsets_fit_together() {
    let server = Server::native();
    for prompt in [json!(PROMPT), json!([server.engine.encode(PROMPT, true).unwrap()])] {
        let body = json!({"prompt": prompt, "max_tokens": 9, "temperature": 0, "echo": true, "logprobs": 2});
        let answer = server.complete(body.clone()).await;
        let choice = &answer.choices[0];
        assert!(choice.text.starts_with(PROMPT) && choice.text.len() > PROMPT.len());
        let told = logprobs(choice);
        assert_eq!(told.tokens.concat(), choice.text);
        for (token, offset) in told.tokens.iter().zip(&told.text_offset) {
            let at: String = choice.text.chars().skip(*offset).take(token.chars().count()).collect();
            assert_eq!(at, *token);
        }
        for (i, top) in told.top_logprobs.iter().enumerate().skip(1) {
            let top = top.as_ref().unwrap();
            assert_eq!(top[&told.tokens[i]].as_f64(), told.token_logprobs[i], "the token itself is among them");
            assert!((2..=3).contains(&top.len()));
        }
        let mut plain = body.clone();
        plain["echo"] = false.into();
        let plain = server.complete(plain).await;
        assert_eq!(format!("{PROMPT}{}", plain.choices[0].text), choice.text);
        assert_eq!(logprobs(&plain.choices[0]).text_offset[0], 0);

        let streamed = server.stream(body).await;
        assert_eq!(streamed.text(0), choice.text);
        let mut joined = Logprobs::default();
        for part in streamed.chunks.iter().flat_map(|c| &c.choices).filter_map(|c| c.logprobs.clone()) {
            joined.tokens.extend(part.tokens);
            joined.token_logprobs.extend(part.token_logprobs);
            joined.top_logprobs.extend(part.top_logprobs);
            joined.text_offset.extend(part.text_offset);
        }
        assert_eq!(&joined, told, "a stream tells the same");
    }
    let ids = json!({"prompt": "The dog", "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": true});
    let answer = server.complete(ids).await;
    assert!(logprobs(&answer.choices[0]).tokens.iter().all(|t| t.starts_with("token_id:")));
}

#[tokio::test]
async fn the_end_token_has_its_log_probability_too() {
    let plain = Server::native();
    let first = plain.complete(json!({"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 0})).await;
    let token = plain.engine.encode(&first.choices[0].text, false).unwrap()[0];
    let server = Server::start(ServerOptions { eos: Some(vec![token]), ..Default::default() });
    let body = json!({"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true});
    let answer = server.complete(body).await;
    assert_eq!((answer.choices[0].text.as_str(), answer.choices[0].finish_reason.as_str()), (PROMPT, "stop"));
    assert_eq!(logprobs(&answer.choices[0]).tokens.len(), answer.usage.prompt_tokens + 1);
}

#[tokio::test]
async fn prompt_logprobs_come_by_token_id_with_ranks() {
    let server = Server::native();
    let ids = server.engine.encode(PROMPT, true).unwrap();
    let answer = server.complete(json!({"prompt": PROMPT, "max_tokens": 0, "prompt_logprobs": 2})).await;
    let told = answer.choices[0].prompt_logprobs.as_ref().unwrap();
    assert_eq!((told.len(), &told[0], answer.choices[0].text.as_str()), (ids.len(), &None, ""));
    for (id, entry) in ids.iter().zip(told).skip(1) {
        let entry = entry.as_ref().unwrap();
        let own = &entry[&id.to_string()];
        let better = entry.values().filter(|e| e.logprob > own.logprob).count() as u32;
        assert!(entry.len() == 2 + usize::from(own.rank > 2) && better == (own.rank - 1).min(2), "{entry:?}");
    }
    assert_eq!(refused(&server, json!({"prompt": "a", "max_tokens": 0})).await["param"], "max_tokens");
    let streamed = json!({"prompt": "a", "prompt_logprobs": 1, "stream": true});
    assert_eq!(refused(&server, streamed).await["param"], "prompt_logprobs");
}

#[tokio::test]
async fn biases_force_and_forbid_tokens() {
    let server = Server::native();
    let ball = server.engine.encode(" ball", true).unwrap()[0];
    let body = |bias: Value| json!({"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logit_bias": bias});
    let forced = server.complete(body(json!({ball.to_string(): 100}))).await;
    assert_eq!(forced.choices[0].text, " ball ball ball");
    let free = server.complete(body(json!({}))).await;
    let first = server.engine.encode(&free.choices[0].text, true).unwrap()[0];
    let without = server.complete(body(json!({first.to_string(): -100}))).await;
    assert_ne!(server.engine.encode(&without.choices[0].text, true).unwrap()[0], first);
    assert_eq!(refused(&server, body(json!({"99999": 1}))).await["param"], "logit_bias");
}

#[tokio::test]
async fn a_prompt_takes_over_what_an_earlier_one_computed_and_gives_the_same_text() {
    let server = Server::native();
    let cold = EngineConfig { prefix_cache: false, ..ServerOptions::default().config };
    let cold = Server::start(ServerOptions { config: cold, ..Default::default() });
    let start = [PROMPT; 5].join(" ");
    let body = |end: &str, extra: Value| {
        let mut body = json!({"prompt": format!("{start} {end}"), "max_tokens": 20, "temperature": 0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let cached = |r: &CompletionResponse| r.usage.prompt_tokens_details.cached_tokens;
    let first = server.complete(body("ran", json!({}))).await;
    assert_eq!(cached(&first), 0);
    for (end, extra, shares) in [
        ("ran", json!({}), true),
        ("ate", json!({}), true),
        ("ate", json!({"cache_salt": "tenant"}), false),
        ("ate", json!({"cache_salt": "tenant"}), true),
        ("ate", json!({"router": "dynk:0.8"}), false),
        ("ate", json!({"router": "dynk:0.8"}), true),
        ("ate", json!({"router": "dynk:0.7"}), false),
    ] {
        let warm = server.complete(body(end, extra.clone())).await;
        assert_eq!(cached(&warm) > 60, shares, "{end} {extra}: {} cached", cached(&warm));
        let want = cold.complete(body(end, extra.clone())).await;
        assert_eq!((&warm.choices, cached(&want)), (&want.choices, 0), "{end} {extra}");
        let tokens = |r: &CompletionResponse| r.usage.prompt_tokens;
        assert_eq!(tokens(&warm), tokens(&want), "cached tokens are prompt tokens");
    }
    let series = server.series().await;
    assert!(series.sum("moe_prefix_cache_hits_total", &[]) > 100.0);
    let names = ["moe_prefix_cache_hits_total", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"];
    assert!(names.iter().all(|n| series.sum(n, &[]) == series.sum(names[0], &[])));
    assert!(series.sum("moe_prefix_cache_queries_total", &[]) > series.sum(names[0], &[]));
}

#[tokio::test]
async fn a_trace_tells_the_experts_that_the_books_count() {
    let server = Server::start(ServerOptions { router: "dynk:0.8", ..Default::default() });
    let long = [PROMPT; 2].join(" ");
    for (n, stream) in [(1, false), (3, false), (1, true)] {
        let salt = format!("{n}{stream}");
        let body = json!({"prompt": long, "max_tokens": 8, "seed": 5, "n": n, "moe_trace": true, "ignore_eos": true,
            "cache_salt": salt, "stream_options": if stream { json!({"include_usage": true}) } else { Value::Null }});
        let (traces, usage): (Vec<MoeTrace>, _) = if stream {
            let streamed = server.stream(body).await;
            let mut whole = MoeTrace::default();
            for part in streamed.chunks.iter().flat_map(|c| &c.choices).filter_map(|c| c.moe_trace.clone()) {
                whole.prompt = whole.prompt.or(part.prompt);
                whole.completion.extend(part.completion);
            }
            (vec![whole], streamed.chunks.last().unwrap().usage.clone().unwrap())
        } else {
            let answer = server.complete(body).await;
            (answer.choices.into_iter().map(|c| c.moe_trace.unwrap()).collect(), answer.usage)
        };
        let layers = 6;
        let rows = |k_l: &Vec<u16>| {
            assert_eq!(k_l.len(), layers);
            k_l.iter().map(|k| u64::from(*k)).sum::<u64>()
        };
        let prompt = traces[0].prompt.as_ref().unwrap();
        assert_eq!(prompt.len(), usage.prompt_tokens);
        let last = prompt.last().unwrap().clone().unwrap();
        let mut total: u64 = prompt.iter().flatten().map(rows).sum();
        for trace in &traces {
            assert_eq!(trace.completion.len(), 8);
            assert_eq!(trace.completion[0], last, "the prompt's last pass draws the first token");
            total += trace.completion[1..].iter().map(rows).sum::<u64>();
        }
        let passes = (usage.prompt_tokens + n * 7) * layers;
        assert!((usage.moe.experts_per_token - total as f64 / passes as f64).abs() < 1e-12);
        assert!(total < 2 * passes as u64, "the router is dynamic");
    }
    let again = json!({"prompt": long, "max_tokens": 2, "moe_trace": true, "cache_salt": "1false"});
    let answer = server.complete(again).await;
    let prompt = answer.choices[0].moe_trace.clone().unwrap().prompt.unwrap();
    let cached = answer.usage.prompt_tokens_details.cached_tokens;
    assert!(cached > 0 && prompt.iter().take_while(|k| k.is_none()).count() == cached, "cached tokens ran nothing");
}

#[tokio::test]
async fn requests_choose_routers_within_the_operators_bounds() {
    let only = |names: &[&str], experts_max| {
        let names = names.iter().map(|n| n.to_string()).collect();
        let request_routers = Some(RequestRouters { names, experts_max, files: false });
        let config = EngineConfig { request_routers, ..ServerOptions::default().config };
        Server::start(ServerOptions { config, ..Default::default() })
    };
    let body = |router: &str| json!({"prompt": "The dog", "max_tokens": 4, "temperature": 0, "router": router});
    let open = only(&[], None);
    let dynamic = open.complete(body("dynk:0.5")).await;
    assert_eq!((dynamic.usage.moe.router.as_str(), dynamic.usage.moe.experts_per_token), ("dynk:0.5", 1.0));
    for (router, message) in [
        ("topk:3", "can use 3 experts per token, but this server allows requests 2"),
        ("dynk:0.8,mass=full", "--request-experts-max"),
        ("topk:99", "from 1 to 8"),
        ("dynk", "is missing"),
        ("best", "there is no such router"),
        ("", "no router name"),
    ] {
        let error = refused(&open, body(router)).await;
        assert_eq!(error["param"], "router", "{router}");
        assert!(error["message"].as_str().unwrap().contains(message), "{router}: {error}");
    }
    let some = only(&["topk", "native"], Some(4));
    assert_eq!(some.complete(body("topk:4")).await.usage.moe.experts_per_token, 4.0);
    let error = refused(&some, body("dynk:0.5")).await;
    assert!(error["message"].as_str().unwrap().contains("topk, native alone"), "{error}");
    let config = EngineConfig { request_routers: None, ..ServerOptions::default().config };
    let service = ServiceOptions { moe_trace: false };
    let closed = Server::start(ServerOptions { router: "topk:1", config, service, ..Default::default() });
    let error = refused(&closed, body("dynk:0.5")).await;
    assert!(error["message"].as_str().unwrap().contains("--allow-request-router"), "{error}");
    assert_eq!(closed.complete(body("topk:1")).await.usage.moe.router, "topk:1", "what is served anyway is no choice");
    let error = refused(&closed, json!({"prompt": "a", "moe_trace": true})).await;
    assert!(error["message"].as_str().unwrap().contains("--allow-moe-trace"), "{error}");
}

#[tokio::test]
async fn output_is_held_to_json_and_to_schemas() {
    let server = Server::native();
    let body = |format: Value, seed: usize| json!({"prompt": PROMPT, "max_tokens": 400, "seed": seed, "temperature": 1.0, "response_format": format});
    let schema = json!({"type": "object", "properties": {"name": {"enum": ["Tom", "Lily"]},
        "age": {"type": "integer", "minimum": 3, "maximum": 9}, "toys": {"type": "array", "maxItems": 2, "items":
        {"type": "string", "maxLength": 8}}}, "required": ["name", "age", "toys"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "child", "schema": schema, "strict": true}});
    for seed in 0..6 {
        let answer = server.complete(body(format.clone(), seed)).await;
        assert_eq!(answer.choices[0].finish_reason, "stop", "{}", answer.choices[0].text);
        let child: Value = serde_json::from_str(&answer.choices[0].text).unwrap();
        assert!(["Tom", "Lily"].contains(&child["name"].as_str().unwrap()), "{child}");
        assert!((3..=9).contains(&child["age"].as_i64().unwrap()), "{child}");
        assert!(child["toys"].as_array().unwrap().len() <= 2 && child.as_object().unwrap().len() == 3, "{child}");
    }
    let mut finished = 0;
    let ends: Vec<String> =
        ["\"", "}"].iter().map(|t| server.engine.encode(t, false).unwrap()[0].to_string()).collect();
    for seed in 0..8 {
        // Stories know few quotes and no braces: some help to come to an end.
        let mut body = body(json!({"type": "json_object"}), seed);
        body["logit_bias"] = json!({&ends[0]: 4, &ends[1]: 6});
        let answer = server.complete(body).await;
        if answer.choices[0].finish_reason == "stop" {
            finished += 1;
            assert!(serde_json::from_str::<Value>(&answer.choices[0].text).unwrap().is_object());
        }
        assert!(answer.choices[0].text.trim_start().starts_with('{'));
    }
    assert!(finished > 0, "none ended: the test proves little");
    let long = json!({"description": "x".repeat(70_000)});
    for schema in [json!({"type": "objekt"}), json!({"$ref": "https://example.org/schema"}), json!(5), long] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let error = refused(&server, body(format, 0)).await;
        assert_eq!(error["param"], "response_format", "{error}");
    }
    assert_eq!(server.complete(json!({"prompt": "a", "max_tokens": 1})).await.choices.len(), 1);
}

#[tokio::test]
async fn fan_out_beyond_what_the_server_holds_is_refused_before_anything_is_queued() {
    let config = EngineConfig { max_num_seqs: 4, max_queue: 4, ..ServerOptions::default().config };
    let server = Server::start(ServerOptions { config, ..Default::default() });
    for (body, param) in [
        (json!({"prompt": ["a", "b", "c"], "n": 3}), "n"),
        (json!({"prompt": "a", "n": 129}), "n"),
        (json!({"prompt": "a", "best_of": 129}), "best_of"),
        (json!({"prompt": "a", "n": 0}), "n"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
    ] {
        assert_eq!(refused(&server, body.clone()).await["param"], param, "{body}");
    }
    assert_eq!(server.complete(json!({"prompt": ["a", "b"], "n": 4, "max_tokens": 2})).await.choices.len(), 8);
}

#[tokio::test]
async fn text_becomes_tokens_and_tokens_text() {
    let server = Server::native();
    let post = async |path: &str, body: Value| {
        let response = server.client.post(format!("{}{path}", server.url)).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (_, tokens) = post("/tokenize", json!({"prompt": "a ☃ ball", "return_token_strs": true})).await;
    let ids = server.engine.encode("a ☃ ball", true).unwrap();
    assert_eq!((&tokens["tokens"], &tokens["count"]), (&json!(ids), &json!(ids.len())));
    assert_eq!(tokens["max_model_len"], 1024);
    assert_eq!(tokens["token_strs"].as_array().unwrap().len(), ids.len());
    assert!(tokens["token_strs"].as_array().unwrap().iter().any(|t| t.as_str().unwrap().starts_with("bytes:\\x")));
    assert_eq!(post("/detokenize", json!({"tokens": ids})).await, (200, json!({"prompt": "a ☃ ball"})));
    for (path, body, param) in [
        ("/tokenize", json!({}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "messages": []}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "model": "other"}), json!("model")),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "hi"}]}), json!("messages")),
        ("/detokenize", json!({"tokens": [99999]}), json!("tokens")),
        ("/detokenize", json!({"token": [1]}), json!("token")),
    ] {
        let (status, answer) = post(path, body.clone()).await;
        assert!((400..=404).contains(&status), "{body}");
        assert_eq!(answer["error"]["param"], param, "{body}: {answer}");
    }
}
