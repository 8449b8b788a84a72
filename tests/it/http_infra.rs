//! The layers around the routes: keys, CORS, request ids and their log lines, panics, start-up and draining.

use crate::site::{Log, Site, routes};
use moe_serve::http::{ApiKeys, CorsError, Switch, cors, wrap};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;

const KEY: &str = "sk-0123456789abcdef";
const OTHER: &str = "sk-another-key-that-is-longer-than-the-first";

fn keys(keys: &[&str]) -> Option<ApiKeys> {
    let keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
    ApiKeys::gather(&keys, None).unwrap()
}

fn origins(origins: &[&str]) -> Result<Option<tower_http::cors::CorsLayer>, CorsError> {
    cors(&origins.iter().map(|o| o.to_string()).collect::<Vec<_>>())
}

/// The error of a response, checked for its shape.
async fn error(response: reqwest::Response) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    let mut body: Value = response.json().await.unwrap();
    let error = body["error"].take();
    let mut names: Vec<&String> = error.as_object().unwrap().keys().collect();
    names.sort();
    assert_eq!(names, ["code", "message", "param", "type"], "{error}");
    error
}

#[tokio::test]
async fn without_keys_every_path_is_open() {
    assert!(keys(&[]).is_none());
    let site = Site::plain(wrap(routes(), None, None)).await;
    assert_eq!(site.get("/hello").await.text().await.unwrap(), "hello");
}

#[tokio::test]
async fn only_a_right_key_opens_the_api() {
    let site = Site::plain(wrap(routes(), keys(&[KEY, OTHER]), None)).await;
    let ask = async |path: &str, authorization: Option<&str>| {
        let request = site.client.get(site.url(path));
        authorization.into_iter().fold(request, |r, a| r.header("authorization", a)).send().await.unwrap()
    };
    for good in [format!("Bearer {KEY}"), format!("bearer {OTHER}"), format!("BEARER   {KEY} ")] {
        assert_eq!(ask("/hello", Some(&good)).await.status(), 200, "{good}");
        assert_eq!(ask("/nowhere", Some(&good)).await.status(), 404, "{good}");
    }
    let longer = format!("Bearer {KEY}0");
    let both = format!("Bearer {KEY}{OTHER}");
    let wrong = ["Bearer sk-0123456789abcdeX", &longer, &both, "Bearer sk", "Bearer \u{e9}"];
    for wrong in wrong {
        let response = ask("/hello", Some(wrong)).await;
        assert_eq!(response.status(), 401, "{wrong}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer error=\"invalid_token\"");
        let error = error(response).await;
        assert_eq!((&error["type"], &error["code"]), (&json!("invalid_request_error"), &json!("invalid_api_key")));
    }
    let basic = format!("Basic {KEY}");
    for none in [None, Some(KEY), Some(&basic), Some("Bearer"), Some("Bearer "), Some(""), Some("Bearér")] {
        let response = ask("/hello", none).await;
        assert_eq!(
            (response.status(), &response.headers()["www-authenticate"]),
            (StatusCode::UNAUTHORIZED, &"Bearer".parse().unwrap())
        );
        assert!(error(response).await["message"].as_str().unwrap().contains("Authorization: Bearer"), "{none:?}");
    }
    for open in ["/", "/health", "/health?deep=1"] {
        assert_eq!(ask(open, None).await.status(), 200, "{open}");
    }
    for closed in ["/health/", "//health", "/%68ealth", "/hello?/health", "/nowhere", "/metrics", "/docs/x"] {
        assert_eq!(ask(closed, None).await.status(), 401, "{closed}");
    }
}

#[tokio::test]
async fn a_key_is_neither_logged_nor_shown() {
    let log = Log::json();
    let keys = keys(&[KEY]);
    assert_eq!(format!("{keys:?}"), "Some(ApiKeys(1))");
    let site = Site::plain(wrap(routes(), keys, None)).await;
    for key in [KEY, OTHER] {
        let answer = site.client.get(site.url("/hello")).bearer_auth(key).send().await.unwrap();
        assert!(!answer.text().await.unwrap().contains(key));
    }
    log.wait("request over", 2).await;
    assert!(!log.text().contains("sk-"), "{}", log.text());
}

#[test]
fn key_files_are_read_by_line_and_refused_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    let gather = |text: &str, given: &[&str]| {
        std::fs::write(&path, text).unwrap();
        ApiKeys::gather(&given.iter().map(|g| g.to_string()).collect::<Vec<_>>(), Some(&path))
    };
    let good = gather(&format!("# team a\n{KEY}\r\n\n  {OTHER}  \n"), &["0123456789abcdef"]).unwrap();
    assert_eq!(format!("{good:?}"), "Some(ApiKeys(3))");
    for (text, given, wanted) in [
        ("", &[][..], "holds no API key"),
        ("# nothing\n\n", &[KEY], "holds no API key"),
        ("# x\nshort\n", &[], "in line 2 of "),
        ("# x\nshort\n", &[], "has 5 bytes; it must have 16 to 1024"),
        ("0123456789 abcdefghi\n", &[], "not visible ASCII"),
        (KEY, &[""], "given as number 1 has 0 bytes"),
        (KEY, &[KEY, "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}"], "given as number 2 holds a character"),
    ] {
        let error = gather(text, given).unwrap_err().to_string();
        assert!(error.contains(wanted) && !error.contains(KEY), "{error}");
    }
    let missing = ApiKeys::gather(&[], Some(&dir.path().join("none"))).unwrap_err().to_string();
    assert!(missing.contains("cannot read the API keys of") && missing.contains("none"), "{missing}");
}

#[tokio::test]
async fn a_preflight_is_answered_without_a_key_and_errors_can_be_read() {
    let page = "https://chat.example.org";
    let layer = origins(&[page, "http://localhost:3000"]).unwrap();
    let site = Site::plain(wrap(routes(), keys(&[KEY]), layer)).await;
    let preflight = async |origin: &str| {
        let request = site.client.request(Method::OPTIONS, site.url("/hello")).header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        request.header("access-control-request-headers", "authorization,x-stainless-lang").send().await.unwrap()
    };
    let allowed = preflight(page).await;
    assert_eq!(allowed.status(), 200);
    let header = |name: &str| allowed.headers()[name].to_str().unwrap().to_lowercase();
    assert_eq!(header("access-control-allow-origin"), page);
    assert_eq!(header("access-control-allow-methods"), "get,post");
    assert_eq!(header("access-control-allow-headers"), "authorization,x-stainless-lang", "clients' own too");
    assert!(header("vary").contains("origin"));
    assert!(!allowed.headers().contains_key("access-control-allow-credentials"));
    let foreign = preflight("https://evil.example.org").await;
    assert!(!foreign.headers().contains_key("access-control-allow-origin"));

    let refused = site.client.get(site.url("/hello")).header("origin", page).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    assert_eq!(refused.headers()["access-control-allow-origin"], page);
    assert_eq!(refused.headers()["access-control-expose-headers"], "x-request-id,retry-after");
    assert!(refused.headers().contains_key("x-request-id"));

    let off = Site::plain(wrap(routes(), keys(&[KEY]), None)).await;
    let request = off.client.request(Method::OPTIONS, off.url("/hello")).header("origin", page);
    assert_eq!(request.send().await.unwrap().status(), 401, "without CORS there is no preflight");

    let any = Site::plain(wrap(routes(), None, origins(&["*"]).unwrap())).await;
    let answer = any.client.get(any.url("/hello")).header("origin", page).send().await.unwrap();
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
    assert!(!answer.headers().contains_key("access-control-allow-credentials"));
}

#[test]
fn origins_are_what_a_browser_would_send() {
    assert!(origins(&[]).unwrap().is_none());
    for good in
        ["https://a.b", "http://localhost:3000", "http://[::1]:8080", "tauri://localhost", "http://127.0.0.1", "*"]
    {
        assert!(origins(&[good]).unwrap().is_some(), "{good}");
    }
    for bad in [
        "",
        "a.b",
        "https://",
        "://a",
        "https://a/b",
        "https://a?x",
        "https://a#x",
        "null",
        "https://u@a",
        "https://u:p@a",
        "https://*.a.b",
        "https://a:port",
        "https://a:",
        "https://a:99999",
        "https://a b",
        "https://é.de",
        "ht!tp://a",
        "https://a//",
    ] {
        assert_eq!(origins(&[bad]).unwrap_err(), CorsError::NotAnOrigin(bad.into()), "{bad}");
    }
    for (given, sent) in [
        ("https://A.b", "https://a.b"),
        ("https://a.b/", "https://a.b"),
        ("https://a:443", "https://a"),
        ("HTTP://a:80", "http://a"),
    ] {
        assert_eq!(origins(&[given]).unwrap_err(), CorsError::NotAsSent(given.into(), sent.into()));
    }
    assert_eq!(origins(&["*", "https://a"]).unwrap_err(), CorsError::AnyAndMore);
}

#[tokio::test]
async fn a_sane_request_id_of_the_client_is_kept_and_any_other_replaced() {
    let site = Site::plain(wrap(routes(), None, None)).await;
    let ask = async |id: Option<&[u8]>| {
        let request = site.client.get(site.url("/hello"));
        let response = id.into_iter().fold(request, |r, id| r.header("x-request-id", id)).send().await.unwrap();
        assert_eq!(response.headers().get_all("x-request-id").iter().count(), 1);
        response.headers()["x-request-id"].to_str().unwrap().to_string()
    };
    let longest = "a".repeat(128);
    for good in ["a", "A-b_c.9", &longest] {
        assert_eq!(ask(Some(good.as_bytes())).await, good);
    }
    let mut fresh = vec![ask(None).await];
    let too_long = "a".repeat(129);
    for bad in [&b""[..], b"a b", b"a\"b", b"a/b", b"{}", "é".as_bytes(), b"a\tb", too_long.as_bytes()] {
        fresh.push(ask(Some(bad)).await);
    }
    let sane = |id: &String| id.starts_with("req-") && id.len() <= 64;
    assert!(fresh.iter().all(sane), "{fresh:?}");
    fresh.sort();
    fresh.dedup();
    assert_eq!(fresh.len(), 9, "each is new");
}

#[tokio::test]
async fn every_error_has_a_request_id() {
    let switch = Switch::new();
    let loading = Site::plain(wrap(switch.router(), keys(&[KEY]), None)).await;
    assert!(loading.get("/health").await.headers().contains_key("x-request-id"));
    let site = Site::plain(wrap(routes(), keys(&[KEY]), None)).await;
    for (path, key, status) in
        [("/hello", false, 401), ("/nowhere", true, 404), ("/echo", true, 405), ("/panic", true, 500)]
    {
        let request = site.client.get(site.url(path)).header("x-request-id", "mine");
        let response = if key { request.bearer_auth(KEY) } else { request }.send().await.unwrap();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["x-request-id"]),
            (status, &"mine".parse().unwrap())
        );
    }
}

#[tokio::test]
async fn a_request_is_logged_at_its_head_and_at_its_end_and_never_its_text() {
    let log = Log::json();
    let site = Site::plain(wrap(routes(), None, None)).await;
    let request = site.client.post(site.url("/echo?secret=query")).header("x-request-id", "mine");
    let body = request.body("secret prompt").send().await.unwrap().text().await.unwrap();
    assert_eq!(body, "secret prompt");
    let head = log.wait("response head ready", 1).await.remove(0);
    let over = log.wait("request over", 1).await.remove(0);
    for line in [&head, &over] {
        assert_eq!(line["span"]["request_id"], "mine", "{line}");
        assert_eq!((&line["span"]["method"], &line["span"]["path"]), (&json!("POST"), &json!("/echo")));
        assert_eq!((&line["level"], &line["status"]), (&json!("INFO"), &json!(200)));
        assert!(line["duration_ms"].as_f64().unwrap() >= 0.0);
    }
    assert_eq!((&over["bytes"], &over["client_left"]), (&json!(13), &json!(false)));
    site.get("/numbers/5").await.text().await.unwrap();
    let over = log.wait("request over", 2).await.remove(1);
    assert_eq!((&over["bytes"], &over["client_left"]), (&json!(10), &json!(false)));
    assert!(over["duration_ms"].as_f64().unwrap() >= 50.0, "{over}");
    site.client.head(site.url("/hello")).send().await.unwrap();
    let over = log.wait("request over", 3).await.remove(2);
    assert_eq!((&over["bytes"], &over["client_left"]), (&json!(0), &json!(false)));
    site.get("/health").await;
    assert_eq!(log.wait("request over", 4).await.remove(3)["level"], "DEBUG");
    assert!(!log.text().contains("secret"), "{}", log.text());
}

#[tokio::test]
async fn a_client_that_leaves_is_logged_as_such() {
    let log = Log::json();
    let site = Site::plain(wrap(routes(), None, None)).await;
    let mut streaming = site.get("/numbers/100000").await;
    streaming.chunk().await.unwrap();
    drop(streaming);
    let over = log.wait("request over", 1).await.remove(0);
    assert_eq!((&over["client_left"], &over["status"]), (&json!(true), &json!(200)));

    let slow = axum::Router::new().route("/slow", axum::routing::get(std::future::pending::<&str>));
    let site = Site::plain(wrap(slow, None, None)).await;
    let asked = site.client.get(site.url("/slow")).timeout(Duration::from_millis(100)).send().await;
    assert!(asked.unwrap_err().is_timeout());
    let over = log.wait("request over", 2).await.remove(1);
    assert_eq!((&over["client_left"], &over["status"]), (&json!(true), &Value::Null), "before the head: no status");
}

#[tokio::test]
async fn a_panic_is_one_failed_request_and_is_logged() {
    let log = Log::json();
    let site = Site::plain(wrap(routes(), None, None)).await;
    let response = site.client.get(site.url("/panic")).header("x-request-id", "mine").send().await.unwrap();
    assert_eq!(response.status(), 500);
    let error = error(response).await;
    assert_eq!(error["type"], "server_error");
    assert!(!error["message"].as_str().unwrap().contains("on purpose"), "{error}");
    let line = log.wait("a handler panicked", 1).await.remove(0);
    assert_eq!((&line["panic"], &line["level"]), (&json!("on purpose: 7"), &json!("ERROR")));
    assert_eq!(line["span"]["request_id"], "mine");
    assert_eq!(log.wait("request over", 1).await[0]["level"], "WARN");
    assert_eq!(site.get("/hello").await.status(), 200);
}

#[tokio::test]
async fn while_the_model_is_loaded_every_path_says_so_and_afterwards_answers() {
    let switch = Switch::new();
    let site = Site::plain(wrap(switch.router(), keys(&[KEY]), None)).await;
    assert_eq!(site.get("/v1/models").await.status(), 401, "the key is asked for first");
    for path in ["/health", "/metrics", "/v1/models", "/"] {
        let response = site.client.get(site.url(path)).bearer_auth(KEY).send().await.unwrap();
        assert_eq!(
            (response.status(), &response.headers()["retry-after"]),
            (StatusCode::SERVICE_UNAVAILABLE, &"5".parse().unwrap())
        );
        assert_eq!(error(response).await["code"], "loading");
    }
    switch.open(routes());
    assert_eq!(site.get("/health").await.text().await.unwrap(), "healthy");
    let hello = site.client.get(site.url("/hello")).bearer_auth(KEY).send().await.unwrap();
    assert_eq!(hello.headers()["content-length"], "5");
    assert_eq!(hello.text().await.unwrap(), "hello");
}

#[tokio::test]
async fn a_draining_server_finishes_what_runs_and_takes_nothing_new() {
    let switch = Switch::new();
    switch.open(routes());
    let site = Site::plain(wrap(switch.router(), None, None)).await;
    switch.idle().await;
    let mut running = site.get("/numbers/50").await;
    running.chunk().await.unwrap();
    switch.drain();
    for path in ["/health", "/hello"] {
        let refused = site.get(path).await;
        assert_eq!(
            (refused.status(), &refused.headers()["connection"]),
            (StatusCode::SERVICE_UNAVAILABLE, &"close".parse().unwrap())
        );
        assert_eq!(error(refused).await["code"], "draining");
    }
    assert_eq!(site.get("/metrics").await.text().await.unwrap(), "metrics");
    let early = tokio::time::timeout(Duration::from_millis(50), switch.idle()).await;
    assert!(early.is_err(), "one is running");
    let rest = running.text().await.unwrap();
    assert!(rest.ends_with("49\n"), "{rest}");
    tokio::time::timeout(Duration::from_secs(5), switch.idle()).await.unwrap();
}
