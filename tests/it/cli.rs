//! The built binary: its help, its refusals, and its end.

use crate::binary::{Process, Serving, refusal};
use crate::support::{Series, client, repo};
use futures::StreamExt;
use moe_serve::moe::router::ROUTERS;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[test]
fn help_explains_every_router_and_flag() {
    let mut process = Process::start(&["--help"]);
    let help: Vec<String> = process.stdout.iter().collect();
    assert_eq!(process.end(Duration::from_secs(20)).0.code(), Some(0));
    let help = help.join("\n");
    for router in ROUTERS {
        for text in [router.usage, router.formula, router.summary] {
            assert!(help.contains(text), "{}: {text:?} is not in\n{help}", router.name);
        }
    }
    for flag in ["--model", "--router", "--dtype", "--device", "--host", "--port", "--max-model-len", "--offline"] {
        assert!(help.contains(flag), "{flag} is not in\n{help}");
    }
    let mut version = Process::start(&["--version"]);
    let line = version.stdout.iter().next().unwrap();
    assert_eq!(
        (line, version.end(Duration::from_secs(20)).0.code()),
        (format!("moe-serve {}", env!("CARGO_PKG_VERSION")), Some(0))
    );
}

#[test]
fn flags_that_cannot_be_read_are_refused_with_what_they_take() {
    for (args, texts) in [
        (&["--dtype", "int8"][..], &["--dtype", "int8", "bf16"][..]),
        (&["--device", "tpu"], &["--device", "tpu", "cuda:N"]),
        (&["--device", "cuda:x"], &["--device", "`x`", "cuda:0"]),
        (&["--router", "dynk:"], &["--router", "`dynk:`", "empty"]),
        (&["--router", ""], &["--router"]),
        (&["--port", "70000"], &["--port", "70000", "65535"]),
        (&["--max-num-seqs", "0"], &["--max-num-seqs", "0", "1..=65536"]),
        (&["--max-batched-tokens", "0"], &["--max-batched-tokens", "0"]),
        (&["--kv-cache-gb=-1"], &["--kv-cache-gb", "-1", "above 0"]),
        (&["--kv-cache-gb", "nan"], &["--kv-cache-gb", "nan", "above 0"]),
        (&["--modle", "x"], &["--modle", "--model"]),
        (&["surplus"], &["surplus"]),
    ] {
        let stderr = refusal(args, 2);
        for text in texts {
            assert!(stderr.contains(text), "{args:?}: no {text:?} in {stderr}");
        }
    }
}

#[test]
fn choices_that_do_not_fit_the_model_or_machine_are_refused_with_the_range() {
    let nothing = tempfile::tempdir().unwrap();
    let empty = nothing.path().to_str().unwrap();
    let missing = nothing.path().join("missing");
    let file = repo("Cargo.toml");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut cases = vec![
        (vec!["--router", "best:3"], vec!["`best:3`", "there is no such router", "native", "dynk"]),
        (vec!["--router", "dynk:1.5"], vec!["`dynk:1.5`", "1.5", "0", "1"]),
        (vec!["--router", "dynk:0"], vec!["`dynk:0`"]),
        (vec!["--router", "dynk:nan"], vec!["`dynk:nan`"]),
        (vec!["--router", "dynk"], vec!["`dynk`", "τ"]),
        (vec!["--router", "dynk:0.8,mas=full"], vec!["mas", "mass"]),
        (vec!["--router", "topk:0"], vec!["`topk:0`", "1", "8"]),
        (vec!["--router", "topk:9"], vec!["`topk:9`", "1", "8"]),
        (vec!["--router", "layers:1,2"], vec!["`layers:1,2`", "6"]),
        (vec!["--model", missing.to_str().unwrap()], vec!["missing", "no such directory"]),
        (vec!["--model", file.to_str().unwrap()], vec!["Cargo.toml", "is a file"]),
        (vec!["--model", empty], vec![empty, "config.json"]),
        (vec!["--model", ""], vec!["--model"]),
        (vec!["--model", "nobody/nothing", "--offline"], vec!["nobody/nothing", "--offline", "cache"]),
        (vec!["--revision", "main"], vec!["--revision", "directory"]),
        (vec!["--max-model-len", "4096"], vec!["--max-model-len", "1024", "4096"]),
        (vec!["--max-model-len", "0"], vec!["--max-model-len", "1024", "0"]),
        (vec!["--kv-cache-gb", "0.0000001"], vec!["--kv-cache-gb", "1024"]),
        (vec!["--max-model-len", "1024", "--kv-cache-gb", "0.0001"], vec!["--kv-cache-gb", "--max-model-len", "1024"]),
        (vec!["--host", "999.1.1.1"], vec!["cannot listen on 999.1.1.1"]),
    ];
    if !cfg!(feature = "cuda") {
        cases.push((vec!["--device", "cuda:0"], vec!["cuda:0", "--features cuda"]));
    }
    for (args, texts) in &cases {
        let stderr = refusal(&[&["--port", "0"], &args[..]].concat(), 1);
        for text in texts {
            assert!(stderr.contains(text), "{args:?}: no {text:?} in {stderr}");
        }
    }
    let stderr = refusal(&["--port", &port], 1);
    assert!(stderr.contains(&format!("127.0.0.1:{port}")) && stderr.contains("in use"), "{stderr}");
}

#[tokio::test]
async fn it_says_what_it_serves_and_serves_it() {
    let serving = Serving::start(&["--router", "dynk:0.8", "--served-model-name", "tale", "--max-model-len", "512"]);
    let line = |name: &str| serving.line(name);
    for (name, texts) in [
        ("model", &["tale", "6 layers", "8 experts"][..]),
        ("runs", &["cpu"]),
        ("router", &["dynk:0.8", "0.8", "k in"]),
        ("memory", &["weights", "KV cache"]),
        ("context", &["512 tokens"]),
        ("address", &["http://127.0.0.1:", "/v1/completions"]),
    ] {
        for text in texts {
            assert!(line(name).contains(text), "no {text:?} in {:?}", line(name));
        }
    }
    let models: Value = client().get(format!("{}/v1/models", serving.url)).send().await.unwrap().json().await.unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("tale"), &json!(512)));
    let router = models["data"][0]["router"].as_str().unwrap();
    assert!(line("router").contains(router), "{router:?} is not what was printed: {:?}", line("router"));
    let answer: Value = serving.post(json!({"prompt": "Once", "model": "tale"})).await.json().await.unwrap();
    assert!(answer["usage"]["moe"]["experts_per_token"].as_f64().unwrap() < 2.0, "{answer}");
}

#[tokio::test]
async fn a_signal_lets_a_running_stream_finish_and_the_exit_code_is_0() {
    for signal in ["TERM", "INT"] {
        let mut serving = Serving::start(&[]);
        let body = json!({"prompt": "Once", "max_tokens": 300, "ignore_eos": true, "stream": true, "seed": 1,
            "stream_options": {"include_usage": true}});
        let mut pieces = serving.post(body).await.bytes_stream();
        let mut raw = pieces.next().await.unwrap().unwrap().to_vec();
        serving.process.signal(signal);
        while let Some(piece) = pieces.next().await {
            raw.extend(piece.unwrap());
        }
        let raw = String::from_utf8(raw).unwrap();
        assert!(raw.ends_with("data: [DONE]\n\n"), "{signal}: cut off: {raw}");
        assert!(
            raw.contains("\"finish_reason\":\"length\"") && raw.contains("\"completion_tokens\":300"),
            "{signal}: {raw}"
        );
        let (status, stderr) = serving.process.end(Duration::from_secs(10));
        assert_eq!(status.code(), Some(0), "{signal}: {stderr}");
        assert!(stderr.contains("shutting down") && !stderr.contains("cut off"), "{signal}: {stderr}");
        assert!(client().get(format!("{}/health", serving.url)).send().await.is_err(), "{signal}: still listening");
    }
}

#[tokio::test]
async fn an_idle_server_ends_at_once_even_with_connections_open() {
    let mut serving = Serving::start(&[]);
    let client = client();
    let health = client.get(format!("{}/health", serving.url)).send().await.unwrap();
    assert_eq!(health.text().await.unwrap(), "{\"status\":\"ok\"}");
    // One that has been accepted and has sent nothing.
    let silent = tokio::net::TcpStream::connect(serving.url.strip_prefix("http://").unwrap()).await.unwrap();
    client.get(format!("{}/health", serving.url)).send().await.unwrap();
    serving.process.signal("TERM");
    let (status, stderr) = serving.process.end(Duration::from_secs(5));
    assert_eq!(status.code(), Some(0), "{stderr}");
    drop((client, silent));
}

/// 32 completions of nearly a whole context, for a client that reads nothing: far more than buffers take.
async fn endless(serving: &Serving) -> reqwest::Response {
    let body = json!({"prompt": vec!["Once"; 32], "max_tokens": 1000, "ignore_eos": true, "stream": true});
    let response = serving.post(body).await;
    loop {
        let metrics = client().get(format!("{}/metrics", serving.url)).send().await.unwrap().text().await.unwrap();
        if Series::read(&metrics).sum("vllm:num_requests_running", &[]) == 32.0 {
            return response;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_never_reads_cannot_hold_the_end_beyond_the_timeout() {
    let mut serving = Serving::start(&["--shutdown-timeout", "1"]);
    let unread = endless(&serving).await;
    let began = Instant::now();
    serving.process.signal("TERM");
    let (status, stderr) = serving.process.end(Duration::from_secs(4));
    let took = began.elapsed();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(took >= Duration::from_millis(900), "it gave {took:?} of the second it was told to give");
    assert!(stderr.contains("did not finish in time"), "{stderr}");
    drop(unread);
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut serving = Serving::start(&["--shutdown-timeout", "600"]);
    let unread = endless(&serving).await;
    serving.process.signal("TERM");
    // Signals of one kind merge while pending: the second must wait until the first was noticed.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let health = client().get(format!("{}/health", serving.url)).send().await.unwrap();
        if health.status() == 503 {
            assert!(health.text().await.unwrap().contains("\"draining\""));
            break;
        }
        assert!(Instant::now() < deadline, "the server says that it is well");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let refused = client().post(format!("{}/v1/completions", serving.url)).body("{}").send().await.unwrap();
    assert_eq!(refused.status(), 503, "new work is refused");
    let metrics = client().get(format!("{}/metrics", serving.url)).send().await.unwrap();
    assert_eq!(metrics.status(), 200, "what still runs can be seen");
    serving.process.signal("INT");
    let (status, stderr) = serving.process.end(Duration::from_secs(4));
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("second signal"), "{stderr}");
    drop(unread);
}
