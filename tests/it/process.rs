//! The built binary over real sockets: what its flags do, and what clients that leave, stall or crowd do to it.

use crate::binary::{Process, Serving, refusal, refusal_with};
use crate::http_transport::pair;
use crate::mock_hub::{Fault, ID, MockHub};
use crate::support::{Series, client};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The one line that a start with `args` is refused with.
#[track_caller]
fn one_line(args: &[&str], env: &[(&str, &str)]) -> String {
    let stderr = refusal_with(&[&["--port", "0"], args].concat(), env, 1);
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{args:?}: {stderr}");
    stderr
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A port for a process whose own choice cannot be asked for yet, below those that the system gives away meanwhile.
fn free_port() -> String {
    let first = 20_000 + (std::process::id() % 10_000) as u16;
    let port = (first..first + 500).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    port.expect("a free port").to_string()
}

async fn when(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "never {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Asks for everything while there is no model yet.
async fn is_loading(port: &str) {
    let client = client();
    let url = |path: &str| format!("http://127.0.0.1:{port}{path}");
    let reads = ["/health", "/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/v1/models/x", "/nowhere"];
    let reads = reads.map(|path| client.get(url(path)));
    let posts = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/health"];
    let posts = posts.map(|path| client.post(url(path)).body("{"));
    for request in reads.into_iter().chain(posts) {
        let response = request.header("x-request-id", "early").send().await.unwrap();
        let path = response.url().path().to_string();
        assert_eq!(response.status(), 503, "{path}");
        let seconds: u32 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..60).contains(&seconds), "{path}: Retry-After: {seconds}");
        assert_eq!(response.headers()["x-request-id"], "early", "{path}");
        let error = response.json::<Value>().await.unwrap()["error"].clone();
        assert_eq!((&error["code"], &error["type"]), (&json!("loading"), &json!("server_error")), "{path}");
    }
}

// Not asynchronous: the hub brings its own runtime.
#[test]
fn while_the_model_loads_every_route_says_so_and_sigterm_ends_it_with_0() {
    let files = ["config.json", "tokenizer.json", "model.safetensors"].map(|name| (name.to_string(), vec![b' '; 1000]));
    let hub = MockHub::start(BTreeMap::from(files));
    hub.world().faults.insert("model.safetensors".into(), (Fault::Stall(100), usize::MAX));
    let home = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut process = Process::start_with(
        &["--model", ID, "--port", &port],
        &[("HF_ENDPOINT", &hub.url), ("HF_HOME", text(home.path()))],
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // The request that stalls is not the one that asks for the size alone.
    let stalls = async || {
        hub.world().requests.iter().any(|r| r.path.ends_with(".safetensors") && r.range.as_deref() != Some("bytes=0-0"))
    };
    runtime.block_on(when("a request for the weights", stalls));
    runtime.block_on(is_loading(&port));
    process.signal("TERM");
    let (status, stderr) = process.end(Duration::from_secs(60));
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("while the model was being loaded"), "{stderr}");
    assert_eq!(process.stdout.iter().count(), 0, "nothing was served, so nothing is announced");
}

async fn status_with_key(serving: &Serving, path: &str, key: Option<&str>) -> u16 {
    let mut request = client().get(format!("{}{path}", serving.url));
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    if status == 401 {
        assert!(response.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "invalid_api_key");
    }
    status
}

#[tokio::test]
async fn keys_of_flag_file_and_environment_open_the_api_and_are_never_printed() {
    let dir = tempfile::tempdir().unwrap();
    let key = |name: &str| format!("sk-{name}-3f9c27d1a45be860");
    let [flag, second, filed, last, variable] = ["flag", "second", "filed", "last", "variable"].map(key);
    let file = write(dir.path(), "keys", &format!("# of two clients\n{filed}\n\n  {last}  \n"));
    let both = ["--api-key", &flag, "--api-key", &second, "--api-key-file", text(&file)];
    let all = [&flag, &second, &filed, &last, &variable];
    for (args, env, right) in [
        (&both[..], &[][..], &all[..4]),
        (&[], &[("MOE_SERVE_API_KEY", variable.as_str())], &all[4..]),
        (&["--api-key", &flag], &[("MOE_SERVE_API_KEY", &variable)], &all[..1]),
    ] {
        let serving = Serving::start_with(args, &[env, &[("RUST_LOG", "trace")]].concat());
        assert_eq!(status_with_key(&serving, "/health", None).await, 200, "{args:?}: /health asks for a key");
        for path in ["/v1/models", "/metrics", "/openapi.json", "/nowhere"] {
            assert_eq!(status_with_key(&serving, path, None).await, 401, "{args:?}: {path} without a key");
        }
        for key in all {
            let wanted = if right.contains(&key) { 200 } else { 401 };
            assert_eq!(status_with_key(&serving, "/v1/models", Some(key)).await, wanted, "{args:?}: {key}");
        }
        let (printed, _) = serving.finish();
        for key in all {
            assert!(!printed.contains(key.as_str()), "{args:?}: {key} is in {printed}");
        }
    }
    let mut help = Process::start_with(&["--help"], &[("MOE_SERVE_API_KEY", &variable)]);
    assert!(!help.stdout.iter().any(|line| line.contains(&variable)), "the help shows the key");
    assert_eq!(help.end(Duration::from_secs(60)).0.code(), Some(0));
}

#[test]
fn keys_that_protect_nothing_are_refused_at_start_without_being_shown() {
    let dir = tempfile::tempdir().unwrap();
    let empty = write(dir.path(), "empty", "# none yet\n\n");
    let short = write(dir.path(), "short", "# one\nhunter2hunter2\n");
    let missing = dir.path().join("missing");
    for (args, env, texts) in [
        (&["--api-key", "hunter2hunter2"][..], "", &["14 bytes", "16", "openssl rand"][..]),
        (&["--api-key", ""], "", &["0 bytes", "16"]),
        (&["--api-key", "hunter2 hunter2 hunter2"], "", &["visible ASCII"]),
        (&[], "hunter2hunter2", &["14 bytes", "16"]),
        (&["--api-key-file", text(&empty)], "", &["empty", "no API key", "one per line"]),
        (&["--api-key-file", text(&short)], "", &["line 2", "short", "14 bytes"]),
        (&["--api-key-file", text(&missing)], "", &["missing", "No such file"]),
    ] {
        let set = [("MOE_SERVE_API_KEY", env)];
        let stderr = one_line(args, if env.is_empty() { &[] } else { &set });
        for text in texts {
            assert!(stderr.contains(text), "{args:?}: no {text:?} in {stderr}");
        }
        assert!(!stderr.contains("hunter2"), "{args:?}: {stderr}");
    }
    let stderr = one_line(&[], &[("MOE_SERVE_API_KEY", "")]);
    assert!(stderr.contains("0 bytes"), "a variable that was meant to hold a key opens the server: {stderr}");
}

#[tokio::test]
async fn with_a_certificate_it_serves_https_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(dir.path(), "a");
    let serving = Serving::start(&["--tls-cert", text(&pair.cert), "--tls-key", text(&pair.key)]);
    assert!(serving.url.starts_with("https://127.0.0.1:"), "{}", serving.url);
    let body = json!({"prompt": "Once", "max_tokens": 2}).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n", body.len());
    let request = format!("{head}connection: close\r\n\r\n{body}");
    let mut stream = pair.connect(serving.address().parse().unwrap(), &["http/1.1"]).await;
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"text_completion\""), "{answer}");
    let mut plain = TcpStream::connect(serving.address()).await.unwrap();
    plain.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // A reset is a refusal as well.
    let _ = plain.read_to_end(&mut bytes).await;
    assert!(!String::from_utf8_lossy(&bytes).contains("HTTP/1.1 200"), "served in the clear");
    let (printed, _) = serving.finish();
    assert!(!printed.contains("PRIVATE KEY"), "{printed}");
}

#[test]
fn tls_files_that_are_missing_or_wrong_are_named_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (pair(dir.path(), "a"), pair(dir.path(), "b"));
    let missing = dir.path().join("missing");
    for (cert, key, texts) in [
        (&missing, &a.key, &["missing", "No such file"][..]),
        (&a.cert, &missing, &["missing", "No such file"]),
        (&a.key, &a.key, &["a.key", "no certificate"]),
        (&a.cert, &b.key, &["b.key", "does not belong", "a.crt"]),
    ] {
        let stderr = one_line(&["--tls-cert", text(cert), "--tls-key", text(key)], &[]);
        for text in texts {
            assert!(stderr.contains(text), "no {text:?} in {stderr}");
        }
    }
    for alone in ["--tls-cert", "--tls-key"] {
        let stderr = refusal(&[alone, text(&a.cert)], 2);
        assert!(stderr.contains("--tls-cert") && stderr.contains("--tls-key"), "{stderr}");
    }
}

#[tokio::test]
async fn a_log_in_json_is_objects_alone_with_request_ids_and_without_prompts() {
    let serving = Serving::start_with(&["--log-format", "json"], &[("RUST_LOG", "trace")]);
    let post = async |id: &str, body: Value| {
        let request = client().post(format!("{}/v1/completions", serving.url)).header("x-request-id", id);
        let response = request.json(&body).send().await.unwrap();
        let status = response.status().as_u16();
        response.text().await.unwrap();
        status
    };
    let prompt = "The zebra of Zanzibar";
    assert_eq!(post("whole-7", json!({"prompt": prompt, "max_tokens": 4})).await, 200);
    assert_eq!(post("stream-7", json!({"prompt": prompt, "max_tokens": 4, "stream": true})).await, 200);
    assert_eq!(post("bad-7", json!({"prompt": prompt, "max_tokens": 9999})).await, 400);
    assert_eq!(post("worse-7", json!({"promt": prompt})).await, 400);
    let (_, stderr) = serving.finish();
    let lines: Vec<Value> =
        stderr.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    assert!(lines.iter().all(|l| l.is_object() && l["level"].is_string() && l["timestamp"].is_string()), "{stderr}");
    for (id, status) in [("whole-7", 200), ("stream-7", 200), ("bad-7", 400), ("worse-7", 400)] {
        let over = |l: &&Value| l["message"] == "request over" && l["span"]["request_id"] == id;
        let line = lines.iter().find(over).unwrap_or_else(|| panic!("no end of {id} in {stderr}"));
        assert_eq!((&line["status"], &line["client_left"]), (&json!(status), &json!(false)), "{line}");
    }
    assert!(!stderr.contains("Zanzibar") && !stderr.contains("zebra"), "{stderr}");
    assert!(lines.iter().any(|l| l["message"].as_str().is_some_and(|m| m.contains("shutting down"))), "{stderr}");
}

#[tokio::test]
async fn a_chat_template_file_lets_a_base_model_chat() {
    let dir = tempfile::tempdir().unwrap();
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let file = write(dir.path(), "own.jinja", source);
    let serving = Serving::start(&["--chat-template", text(&file)]);
    let messages = json!([{"role": "user", "content": "Tell me of the dog."}]);
    let asked = json!({"messages": messages, "temperature": 0, "max_completion_tokens": 8, "ignore_eos": true});
    let (status, answer) = serving.ask("/v1/chat/completions", asked).await;
    assert_eq!((status, &answer["object"]), (200, &json!("chat.completion")), "{answer}");
    let prompt = "user: Tell me of the dog.\nassistant:";
    let same = json!({"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": true});
    let want: Value = serving.post(same).await.json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], want["choices"][0]["text"]);
}

#[test]
fn a_chat_template_that_cannot_be_used_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let open = write(dir.path(), "open.jinja", "{% for m in messages %}\n{{ m.role }}\n{{ m.content }\n{% endfor %}");
    let endless = write(dir.path(), "endless.jinja", "{% for m in messages %}\n{{ m.content }}\n");
    let missing = dir.path().join("missing.jinja");
    for (file, texts) in [
        (&open, &["open.jinja", "line 3"][..]),
        (&endless, &["endless.jinja", "line "]),
        (&missing, &["missing.jinja", "No such file"]),
    ] {
        let stderr = one_line(&["--chat-template", text(file)], &[]);
        for text in texts {
            assert!(stderr.contains(text), "no {text:?} in {stderr}");
        }
    }
}

#[tokio::test]
async fn requests_choose_among_the_routers_that_the_flags_allow() {
    let named = ["--allow-request-router", "dynk,topk", "--request-experts-max", "4"];
    let some = Serving::start(&named);
    let any = Serving::start(&["--allow-request-router"]);
    let none = Serving::start(&[]);
    for (serving, router, wanted) in [
        (&some, "dynk:0.5", Ok(1.0)),
        (&some, "topk:4", Ok(4.0)),
        (&some, "topk:5", Err("--request-experts-max")),
        (&some, "ratio:0.5", Err("dynk, topk")),
        (&any, "topk:1", Ok(1.0)),
        (&any, "topk:3", Err("--request-experts-max")),
        (&none, "dynk:0.5", Err("--allow-request-router")),
    ] {
        let body = json!({"prompt": "The dog", "max_tokens": 4, "temperature": 0, "router": router});
        let (status, answer) = serving.ask("/v1/completions", body).await;
        match wanted {
            Ok(experts) => {
                let moe = &answer["usage"]["moe"];
                assert_eq!((status, &moe["router"]), (200, &json!(router)), "{answer}");
                assert_eq!(moe["experts_per_token"], experts, "{router}: {answer}");
            }
            Err(text) => {
                assert_eq!((status, &answer["error"]["param"]), (400, &json!("router")), "{router}: {answer}");
                assert!(answer["error"]["message"].as_str().unwrap().contains(text), "{router}: {answer}");
            }
        }
    }
    let stderr = refusal(&["--allow-request-router", "dynk,best"], 2);
    assert!(stderr.contains("best") && stderr.contains("uniform"), "{stderr}");
    let stderr = refusal(&["--request-experts-max", "4"], 2);
    assert!(stderr.contains("--allow-request-router"), "{stderr}");
}

#[tokio::test]
async fn the_kv_cache_is_as_large_as_num_blocks_says_and_keeps_prompts_unless_told_not_to() {
    let cached = async |serving: &Serving| {
        let mut told = Vec::new();
        for _ in 0..2 {
            let body = json!({"prompt": "Once upon a time there was a little girl who had a red ball. She had a dog. \
                One day the dog ran to the park and", "max_tokens": 4});
            let answer: Value = serving.post(body).await.json().await.unwrap();
            assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 16, "a block is not full: {answer}");
            told.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
        }
        (told[0], told[1])
    };
    let small = Serving::start(&["--num-blocks", "4"]);
    assert!(small.line("context").contains("64 tokens of 1024"), "{}", small.line("context"));
    let models: Value = client().get(format!("{}/v1/models", small.url)).send().await.unwrap().json().await.unwrap();
    assert_eq!(models["data"][0]["max_model_len"], 64);
    assert_eq!(small.series().await.sum("vllm:cache_config_info", &["num_gpu_blocks=\"4\""]), 1.0);
    let (status, answer) = small.ask("/v1/completions", json!({"prompt": "Once", "max_tokens": 100})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("max_tokens")), "{answer}");
    let (first, second) = cached(&small).await;
    assert!(first == 0 && second >= 16, "{first} and {second} tokens were cached");
    let cold = Serving::start(&["--no-prefix-cache"]);
    assert_eq!(cached(&cold).await, (0, 0));
    assert_eq!(cold.series().await.sum("moe_prefix_cache_hits_total", &[]), 0.0);
    let stderr = refusal(&["--num-blocks", "4", "--kv-cache-gb", "0.1"], 2);
    assert!(stderr.contains("--num-blocks") && stderr.contains("--kv-cache-gb"), "{stderr}");
    let stderr = refusal(&["--num-blocks", "0"], 2);
    assert!(stderr.contains("--num-blocks"), "{stderr}");
}

/// A connection of its own on which `body` has been sent to `/v1/completions`.
async fn posted(serving: &Serving, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(serving.address()).await.unwrap();
    let body = body.to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n", body.len());
    stream.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes()).await.unwrap();
    stream
}

/// Reads from `stream` until `text` has come; all that came.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(text) {
        let n = tokio::time::timeout(Duration::from_secs(60), stream.read_buf(&mut read)).await;
        let n = n.unwrap_or_else(|_| panic!("no {text:?} in {}", String::from_utf8_lossy(&read))).unwrap();
        assert!(n > 0, "ended before {text:?}: {}", String::from_utf8_lossy(&read));
    }
    String::from_utf8(read).unwrap()
}

fn steps(series: &Series) -> f64 {
    series.sum("moe_step_seconds_count", &[])
}

fn idle(series: &Series) -> bool {
    let gauges = ["moe_requests_running", "moe_requests_waiting", "moe_kv_cache_usage_ratio"];
    gauges.iter().all(|name| series.sum(name, &[]) == 0.0)
}

#[tokio::test]
async fn a_client_that_disconnects_gives_its_blocks_back_and_ends_the_work() {
    let serving = Serving::start(&[]);
    let mut abandoned = 0.0;
    for stream in [true, false] {
        let body = json!({"prompt": vec!["Once"; 16], "max_tokens": 1000, "ignore_eos": true, "stream": stream});
        let mut connection = posted(&serving, &body).await;
        if stream {
            read_until(&mut connection, "data: {").await;
        }
        let running = |s: &Series| s.sum("moe_requests_running", &[]) == 16.0;
        let busy = serving.series_when("running", running).await;
        assert!(busy.sum("moe_kv_cache_usage_ratio", &[]) > 0.0);
        drop(connection);
        let left = Instant::now();
        let after = serving.series_when("idle", idle).await;
        let took = left.elapsed();
        // By the engine's own measure, so that a busy machine does not matter: the whole would take a thousand steps.
        let more = steps(&after) - steps(&busy);
        assert!(more < 300.0, "stream {stream}: {more} steps and {took:?} for a client that left");
        abandoned += 16.0;
        let ended = |reason: &str| after.sum("moe_requests_total", &[&format!("finished_reason=\"{reason}\"")]);
        assert_eq!((ended("abort"), ended("length")), (abandoned, 0.0), "stream {stream}");
        // Time for many steps, were there any.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(steps(&serving.series().await), steps(&after), "stream {stream}: it still steps");
    }
    let (_, stderr) = serving.finish();
    assert_eq!(stderr.matches("client_left=true").count(), 2, "{stderr}");
}

#[tokio::test]
async fn clients_that_never_read_hold_up_neither_the_engine_nor_another_client() {
    let serving = Serving::start(&["--max-num-seqs", "2048", "--num-blocks", "4096"]);
    // More clients than the server has threads for sockets, each with more bytes than the system's buffers take: long
    // words, repeated before every one of many completions.
    let prompt = " disappeared".repeat(900);
    let body = json!({"prompt": vec![prompt; 4], "n": 128, "max_tokens": 1, "ignore_eos": true, "stream": true,
        "echo": true});
    let length = |s: &Series| s.sum("moe_requests_total", &["finished_reason=\"length\""]);
    let mut unread = Vec::new();
    for i in 1..=3 {
        unread.push(posted(&serving, &body).await);
        // The engine comes to its end with what no one reads.
        serving.series_when("done with the unread", |s| length(s) == f64::from(i) * 512.0 && idle(s)).await;
    }
    for _ in 0..3 {
        let quick = json!({"prompt": "The dog", "max_tokens": 8, "ignore_eos": true});
        let answer = tokio::time::timeout(Duration::from_secs(60), serving.post(quick)).await;
        let answer: Value = answer.expect("an answer beside the unread ones").json().await.unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 8);
    }
    let marker = client().get(format!("{}/v1/models", serving.url)).header("x-request-id", "marker");
    assert_eq!(marker.send().await.unwrap().status(), 200);
    for mut stream in unread {
        let mut raw = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut raw)).await;
        read.expect("the rest in time").unwrap();
        let raw = String::from_utf8(raw).unwrap();
        assert_eq!(raw.matches("\"finish_reason\":\"length\"").count(), 512);
        assert_eq!(raw.matches("data: [DONE]").count(), 1);
    }
    let (_, stderr) = serving.finish();
    let (before, after) = stderr.split_once("request_id=\"marker\"").unwrap();
    let ends = |log: &str| log.lines().filter(|l| l.contains("/v1/completions") && l.contains("request over")).count();
    assert_eq!((ends(before), ends(after)), (3, 3), "buffers took what was not read: the test proves nothing");
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_retry_after_and_places_come_back() {
    let serving = Serving::start(&["--max-num-seqs", "1", "--max-queue", "1"]);
    let long = json!({"prompt": "Once", "max_tokens": 1000, "ignore_eos": true, "stream": true});
    let (running, waiting) = (serving.post(long.clone()).await, serving.post(long.clone()).await);
    let short = json!({"prompt": "Once", "max_tokens": 1, "stream": true});
    let ask = async || {
        let request = client().post(format!("{}/v1/completions", serving.url)).json(&short);
        request.send().await.unwrap()
    };
    let refused = ask().await;
    assert_eq!(refused.status(), 429);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap() >= 1);
    let error = refused.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("queue_full")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("2 is the limit"), "{error}");
    let series = serving.series().await;
    assert_eq!(series.sum("moe_requests_rejected_total", &["reason=\"queue_full\""]), 1.0);
    drop(waiting);
    when("a place for one more", async || ask().await.status() == 200).await;
    assert_eq!(serving.series().await.sum("moe_requests_running", &[]), 1.0, "the first one still runs");
    drop(running);
}
