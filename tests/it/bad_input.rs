//! Requests that must be refused: each with its status, the field at fault, the limit and what was given.

use crate::support::Server;
use serde_json::{Value, json};

/// A body, the status it must get, the field it is about, and texts the message must hold.
struct Case {
    body: Vec<u8>,
    status: u16,
    param: Option<&'static str>,
    texts: Vec<&'static str>,
}

/// A refusal of a body that is not what it should be as a whole.
fn whole(body: impl Into<Vec<u8>>, text: &'static str) -> Case {
    Case { body: body.into(), status: 400, param: None, texts: vec![text] }
}

/// A refusal of one field of a request that is otherwise good.
fn field(name: &'static str, value: Value, texts: &[&'static str]) -> Case {
    let mut body = json!({"prompt": "Once", "max_tokens": 2});
    body[name] = value;
    Case { body: body.to_string().into(), status: 400, param: Some(name), texts: texts.to_vec() }
}

/// The same for a value that is no [`Value`].
fn raw(name: &'static str, value: &str, texts: &[&'static str]) -> Case {
    let body = format!("{{\"prompt\": \"Once\", \"{name}\": {value}}}");
    Case { body: body.into(), status: 400, param: Some(name), texts: texts.to_vec() }
}

fn not_json() -> Vec<Case> {
    let nested = |open: &str, close: &str| format!("{{\"prompt\": {}1{}}}", open.repeat(50_000), close.repeat(50_000));
    vec![
        whole("", "EOF"),
        whole(" ", "EOF"),
        whole("{", "EOF"),
        whole("{\"prompt\": \"Once\"", "EOF"),
        whole("{\"prompt\": \"Once\"}}", "trailing"),
        whole("{\"prompt\": \"Once\",}", "not valid JSON"),
        whole("{'prompt': 'Once'}", "not valid JSON"),
        whole("prompt=Once", "not valid JSON"),
        whole("null", "must be a JSON object"),
        whole("[]", "must be a JSON object"),
        whole("\"Once\"", "must be a JSON object"),
        whole("7", "must be a JSON object"),
        whole("\0", "not valid JSON"),
        whole("\u{FEFF}{\"prompt\": \"Once\"}", "not valid JSON"),
        whole(*b"{\"prompt\": \"\xff\xfe\"}", "not valid JSON"),
        whole(*b"\x1f\x8b\x08\x00", "not valid JSON"),
        whole("{\"prompt\": \"\\ud800\"}", "not valid JSON"),
        whole(nested("[", "]"), "recursion limit"),
        whole(nested("{\"a\":", "}"), "recursion limit"),
        // What some languages print for numbers that are none, and numbers that none can hold.
        whole("{\"prompt\": \"Once\", \"temperature\": NaN}", "not valid JSON"),
        whole("{\"prompt\": \"Once\", \"temperature\": Infinity}", "not valid JSON"),
        whole("{\"prompt\": \"Once\", \"temperature\": -inf}", "not valid JSON"),
        whole("{\"prompt\": \"Once\", \"temperature\": 1e400}", "out of range"),
        whole("{\"prompt\": \"Once\", \"max_tokens\": 01}", "not valid JSON"),
        whole("{\"prompt\": \"Once\", \"max_tokens\": 0x10}", "not valid JSON"),
        whole("{\"prompt\": \"Once\", \"max_tokens\": +1}", "not valid JSON"),
    ]
}

fn wrong_types() -> Vec<Case> {
    let mut cases = Vec::new();
    let numbers = [
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "max_tokens",
        "min_tokens",
        "top_k",
        "seed",
    ];
    for name in numbers {
        let kind = if name.starts_with(['m', 's']) && name != "min_p" || name == "top_k" {
            "whole number"
        } else {
            "a number"
        };
        cases.push(field(name, json!("1"), &[name, kind, "got \"1\""]));
        cases.push(field(name, json!([1]), &[name, kind, "got [1]"]));
        cases.push(field(name, json!({"a": 1}), &[name, kind, "got {\"a\":1}"]));
        cases.push(field(name, json!(true), &[name, kind, "got true"]));
    }
    for name in ["max_tokens", "min_tokens", "top_k", "seed"] {
        cases.push(field(name, json!(1.5), &["whole number", "got 1.5"]));
        cases.push(raw(name, "99999999999999999999", &["whole number", "got 1e+20"]));
    }
    for name in ["stream", "ignore_eos", "skip_special_tokens"] {
        for value in [json!("true"), json!(1), json!([])] {
            cases.push(field(name, value, &[name, "true or false", "got "]));
        }
    }
    for name in ["model", "user"] {
        cases.push(field(name, json!(7), &[name, "a string", "got 7"]));
    }
    cases.extend([
        field("prompt", json!(7), &["a string, an array", "got 7"]),
        field("prompt", json!({}), &["got {}"]),
        field("prompt", json!(true), &["got true"]),
        field("prompt", json!([1, "a"]), &["array of token ids", "got [1,\"a\"]"]),
        field("prompt", json!([[["a"]]]), &["array of token ids"]),
        field("prompt", json!([null]), &["array of token ids", "got [null]"]),
        field("prompt", json!([1.5]), &["got [1.5]"]),
        field("prompt", json!([-1]), &["got [-1]"]),
        field("prompt", json!([4294967296u64]), &["got [4294967296]"]),
        field("stop", json!(7), &["a string or an array of strings", "got 7"]),
        field("stop", json!([7]), &["a string or an array of strings", "got [7]"]),
        field("stop_token_ids", json!(7), &["array of token ids", "got 7"]),
        field("stop_token_ids", json!([-1]), &["array of token ids", "got [-1]"]),
        field("stop_token_ids", json!(["a"]), &["array of token ids", "got [\"a\"]"]),
        field("stream_options", json!(true), &["include_usage", "got true"]),
        field("stream_options", json!({"include_usage": 1}), &["include_usage", "got {"]),
        field("stream_options", json!({"other": true}), &["include_usage", "got {\"other\":true}"]),
        field("stream_options", json!({"include_usage": true}), &["\"stream\": true"]),
    ]);
    cases
}

fn out_of_range() -> Vec<Case> {
    let mut cases = vec![
        field("max_tokens", json!(-1), &["at least 0", "got -1"]),
        field("max_tokens", json!(0), &["at least 1 without echo", "got 0"]),
        field("max_tokens", json!(1024), &["at most 10", "1024 tokens", "got 1024"]),
        field("max_tokens", json!(u64::MAX), &["at most 10", "got 18446744073709551615"]),
        field("min_tokens", json!(-1), &["at least 0", "got -1"]),
        field("min_tokens", json!(3), &["at most max_tokens (2)", "got 3"]),
        field("min_tokens", json!(u64::MAX), &["at most max_tokens (2)", "got 18446744073709551615"]),
        field("temperature", json!(-0.1), &["between 0 and 2", "got -0.1"]),
        field("temperature", json!(2.1), &["between 0 and 2", "got 2.1"]),
        field("temperature", json!(1e300), &["between 0 and 2", "got "]),
        field("top_p", json!(0), &["above 0 and at most 1"]),
        field("top_p", json!(-0.1), &["between 0 and 1", "got -0.1"]),
        field("top_p", json!(1.1), &["between 0 and 1", "got 1.1"]),
        field("top_k", json!(-2), &["-1 or 0", "got -2"]),
        field("top_k", json!(4294967296u64), &["up to 4294967295", "got 4294967296"]),
        field("min_p", json!(-0.1), &["between 0 and 1", "got -0.1"]),
        field("min_p", json!(1.1), &["between 0 and 1", "got 1.1"]),
        field("repetition_penalty", json!(0), &["between 0.01 and 100", "got 0"]),
        field("repetition_penalty", json!(-1), &["between 0.01 and 100", "got -1"]),
        field("repetition_penalty", json!(101), &["between 0.01 and 100", "got 101"]),
        field("seed", json!(u64::MAX), &["64 bits", "got 18446744073709551615"]),
    ];
    for name in ["presence_penalty", "frequency_penalty"] {
        cases.push(field(name, json!(2.1), &["between -2 and 2", "got 2.1"]));
        cases.push(field(name, json!(-2.1), &["between -2 and 2", "got -2.1"]));
    }
    cases
}

fn prompts() -> Vec<Case> {
    let empty = ["empty", "at least one token"];
    let none = |body: &str| Case { param: Some("prompt"), ..whole(body, "required") };
    vec![
        none("{}"),
        none("{\"prompt\": null}"),
        none("{\"model\": \"stories\"}"),
        field("prompt", json!(""), &empty),
        field("prompt", json!([]), &empty),
        field("prompt", json!([""]), &empty),
        field("prompt", json!([[]]), &empty),
        field("prompt", json!(["Once", ""]), &empty),
        field("prompt", json!([4096]), &["token id 4096", "0 to 4095"]),
        field("prompt", json!([[1], [2, u32::MAX]]), &["token id 4294967295", "0 to 4095"]),
        field("prompt", json!(vec![5; 1024]), &["has 1024 tokens", "context of this model is 1024", "at most 1023"]),
        field("prompt", json!("dog ".repeat(5000)), &["tokens", "context of this model is 1024"]),
        field("prompt", json!(vec![5; 200_000]), &["has 200000 tokens"]),
        field("prompt", json!(vec!["Once"; 129]), &["1 to 128 prompts", "got 129"]),
        field("prompt", json!(vec![[5]; 100_000]), &["1 to 128 prompts", "got 100000"]),
        Case {
            param: Some("max_tokens"),
            ..field("prompt", json!(vec![5; 1023]), &["at most 1 ", "1023 of the prompt", "got 2"])
        },
    ]
}

fn other_fields() -> Vec<Case> {
    let unsupported = ["not supported", "leave it out", "got "];
    vec![
        Case { status: 404, ..field("model", json!("gpt-4"), &["`gpt-4`", "`stories`"]) },
        Case { status: 404, ..field("model", json!(""), &["``", "`stories`"]) },
        field("n", json!(0), &["between 1 and 128", "got 0"]),
        field("n", json!(129), &["between 1 and 128", "got 129"]),
        field("best_of", json!(0), &["between n (1) and 128", "got 0"]),
        field("echo", json!(1), &["true or false", "got 1"]),
        field("logprobs", json!(21), &["between 0 and 20", "got 21"]),
        field("prompt_logprobs", json!(-1), &["at least 0", "got -1"]),
        field("logit_bias", json!({"4096": -100}), &["token 4096", "0 to 4095"]),
        field("logit_bias", json!({"5": -101}), &["between -100 and 100", "got -101"]),
        field("cache_salt", json!("x".repeat(257)), &["at most 256 bytes", "got 257"]),
        field("router", json!("topk:0"), &["topk:0", "from 1 to 8"]),
        field("response_format", json!("json"), &["json_schema", "got \"json\""]),
        field("suffix", json!("the end"), &unsupported),
        field("temprature", json!(1), &["unknown field `temprature`", "temperature"]),
        field("messages", json!([]), &["unknown field `messages`", "prompt"]),
        field("", json!(1), &["unknown field ``"]),
        field("stop", json!(vec!["a"; 17]), &["at most 16", "got 17"]),
        field("stop", json!(vec!["a"; 100_000]), &["at most 16", "got 100000"]),
        field("stop", json!(""), &["1 to 256 bytes", "got 0"]),
        field("stop", json!(["a", ""]), &["1 to 256 bytes", "got 0"]),
        field("stop", json!("a".repeat(257)), &["1 to 256 bytes", "got 257"]),
        field("stop_token_ids", json!([4096]), &["4096", "0 to 4095"]),
        field("stop_token_ids", json!(vec![1; 65]), &["at most 64", "got 65"]),
    ]
}

#[tokio::test]
async fn bad_requests_are_refused_with_reasons_and_the_server_goes_on_as_before() {
    let server = Server::native();
    let good = json!({"prompt": "Once upon a time", "max_tokens": 12, "seed": 5});
    let before = server.complete(good.clone()).await;
    let cases = [not_json(), wrong_types(), out_of_range(), prompts(), other_fields()];
    let mut many = 0;
    for case in cases.into_iter().flatten() {
        many += 1;
        let shown: String = String::from_utf8_lossy(&case.body).chars().take(120).collect();
        let response = server.client.post(format!("{}/v1/completions", server.url)).body(case.body).send();
        let response = response.await.unwrap_or_else(|e| panic!("{shown}: {e}"));
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status, case.status, "{shown} gave {text}");
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{shown} gave {text}: {e}"));
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{shown} gave {text}"));
        assert_eq!(error["type"], "invalid_request_error", "{shown} gave {text}");
        assert_eq!(error["param"], json!(case.param), "{shown} gave {text}");
        assert_eq!(error["code"], if case.status == 404 { json!("model_not_found") } else { Value::Null }, "{shown}");
        let message = error["message"].as_str().unwrap();
        for part in case.texts {
            assert!(message.contains(part), "{shown}: no {part:?} in {message:?}");
        }
        assert!(text.len() < 1000, "{shown}: an answer of {} bytes", text.len());
    }
    assert!(many > 120, "{many} cases");
    let after = server.complete(good).await;
    assert_eq!((&after.choices, &after.usage), (&before.choices, &before.usage));
}

#[tokio::test]
async fn what_a_client_sends_in_bulk_does_not_come_back_in_bulk() {
    let server = Server::native();
    let bulk = "x".repeat(1 << 20);
    let mut unknown = json!({"prompt": "Once"});
    unknown[bulk.as_str()] = 1.into();
    let bodies = [
        unknown,
        json!({"prompt": "Once", "model": bulk}),
        json!({"prompt": "Once", "temperature": bulk}),
        json!({"prompt": {"a": bulk}}),
        json!({"prompt": "Once", "suffix": bulk}),
    ];
    for body in bodies {
        let response = server.post(&body).await;
        assert!(response.status().is_client_error());
        let text = response.text().await.unwrap();
        assert!(text.len() < 2000, "an answer of {} bytes: {:.300}", text.len(), text);
    }
    let path = format!("/v1/models/{}", &bulk[..50_000]);
    let text = server.get(&path).await.text().await.unwrap();
    assert!(text.len() < 2000, "an answer of {} bytes", text.len());
}

#[tokio::test]
async fn values_at_their_limits_are_taken() {
    let server = Server::native();
    let ids = vec![5; 1023];
    for (field, value) in [
        ("max_tokens", json!(1)),
        ("min_tokens", json!(2)),
        ("temperature", json!(0)),
        ("temperature", json!(2)),
        ("temperature", json!(1e-30)),
        ("temperature", json!(1e-300)),
        ("temperature", json!(-0.0)),
        ("top_p", json!(1e-30)),
        ("top_p", json!(1)),
        ("top_k", json!(-1)),
        ("top_k", json!(0)),
        ("top_k", json!(u32::MAX)),
        ("min_p", json!(0)),
        ("min_p", json!(1)),
        ("presence_penalty", json!(-2)),
        ("frequency_penalty", json!(2)),
        ("repetition_penalty", json!(0.01)),
        ("repetition_penalty", json!(100)),
        ("seed", json!(i64::MIN)),
        ("seed", json!(i64::MAX)),
        ("stop", json!([])),
        ("stop", json!(["a".repeat(256), "b", "c", "d"])),
        ("stop_token_ids", json!(vec![4095; 64])),
        ("prompt", json!(vec!["Once"; 128])),
        ("prompt", json!([[0], [4095]])),
        ("prompt", json!("\u{0}\u{7f}\u{feff}\u{202e}🦀")),
        ("prompt", json!("<|endoftext|>")),
        ("model", json!(null)),
        ("n", json!(1)),
        ("user", json!("someone")),
    ] {
        let mut body = json!({"prompt": "Once", "max_tokens": 2, "ignore_eos": true});
        body[field] = value.clone();
        let answer = server.complete(body).await;
        assert!(answer.usage.completion_tokens > 0, "{field} {value}");
    }
    let full = server.complete(json!({"prompt": ids, "max_tokens": 1})).await;
    assert_eq!(full.usage.total_tokens, 1024);
}
