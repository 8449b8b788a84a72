//! What browsers and dashboards get: pages, the API's description, the Grafana dashboard.

use crate::support::{Server, repo};
use moe_serve::wire::{ChatRequest, CompletionRequest};
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::collections::BTreeSet;

async fn document(server: &Server, path: &str) -> Value {
    let response = server.get(path).await;
    assert_eq!(response.status(), StatusCode::OK, "{path}");
    assert_eq!(response.headers()["content-type"], "application/json");
    response.json().await.unwrap()
}

/// A schema, followed where it refers to another part of the document.
fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => resolve(document, document.pointer(path.trim_start_matches('#')).unwrap()),
        None => schema,
    }
}

fn request_fields(document: &Value, path: &str) -> BTreeSet<String> {
    let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
    let schema = resolve(document, schema);
    assert_eq!(schema["additionalProperties"], false, "{path}: unknown fields are refused");
    schema["properties"].as_object().unwrap().keys().cloned().collect()
}

fn fields_of(request: &impl serde::Serialize) -> BTreeSet<String> {
    serde_json::to_value(request).unwrap().as_object().unwrap().keys().cloned().collect()
}

#[tokio::test]
async fn the_description_of_the_api_has_every_route_and_every_field() {
    let server = Server::native();
    let document = document(&server, "/openapi.json").await;
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys().filter(|m| ["get", "post"].contains(&m.as_str())) {
            let url = format!("{}{}", server.url, path.replace("{id}", "stories"));
            let method: reqwest::Method = method.to_uppercase().parse().unwrap();
            let response = server.client.request(method.clone(), url).body("{}").send().await.unwrap();
            assert!(![404, 405, 500].contains(&response.status().as_u16()), "{method} {path}: {}", response.status());
        }
    }
    let described: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let source = std::fs::read_to_string(repo("src/http/mod.rs")).unwrap();
    let routed = source.split(".route(\"").skip(1).map(|r| r.split('"').next().unwrap().replace("{*id}", "{id}"));
    for route in routed {
        assert!(described.contains(route.as_str()), "{route} is not described");
    }
    assert_eq!(request_fields(&document, "/v1/completions"), {
        let mut fields = fields_of(&CompletionRequest::default());
        fields.insert("suffix".into());
        fields
    });
    let chat = request_fields(&document, "/v1/chat/completions");
    let read = fields_of(&ChatRequest::default());
    assert!(chat.is_superset(&read), "not described: {:?}", read.difference(&chat));
    for field in chat.difference(&read) {
        let body = json!({"messages": [], field.clone(): null}).to_string();
        assert!(ChatRequest::parse(body.as_bytes()).is_ok(), "{field} is described, but not known");
    }
}

#[tokio::test]
async fn every_example_of_the_description_is_accepted() {
    let server = Server::native();
    let document = document(&server, "/openapi.json").await;
    let mut seen = 0;
    for path in ["/v1/completions", "/tokenize", "/detokenize"] {
        let content = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"];
        let examples = content["examples"].as_object().into_iter().flatten().map(|(_, e)| &e["value"]);
        for example in examples.chain(content.get("example")) {
            let url = format!("{}{path}", server.url);
            let response = server.client.post(url).body(example.to_string()).send().await.unwrap();
            let (status, text) = (response.status(), response.text().await.unwrap());
            let chat = text.contains("no chat template");
            // Without its own name; the model's is another here.
            assert!(status == 200 || status == 404 || chat, "{path} {example}: {text}");
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen} examples");
}

#[tokio::test]
async fn the_dashboard_asks_for_series_and_labels_that_the_server_has() {
    let server = Server::native();
    for prompt in ["One day", "One day"] {
        server.complete(json!({"prompt": prompt, "max_tokens": 4})).await;
    }
    let metrics = server.get("/metrics").await.text().await.unwrap();
    let lines: Vec<&str> = metrics.lines().filter(|l| !l.starts_with('#')).collect();
    let names: BTreeSet<&str> = lines.iter().map(|l| l.split(['{', ' ']).next().unwrap()).collect();
    let declared: BTreeSet<&str> =
        metrics.lines().filter_map(|l| l.strip_prefix("# TYPE ")).map(|l| l.split(' ').next().unwrap()).collect();
    let dashboard = document(&server, "/grafana.json").await;
    let mut asked = BTreeSet::new();
    expressions(&dashboard, &mut asked);
    assert!(asked.len() > 20);
    let mut series = BTreeSet::new();
    for expression in &asked {
        for word in expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':') {
            if word.starts_with("moe_") || word.starts_with("vllm:") {
                // A series of a vector comes with its first value, which may be a refusal.
                assert!(names.contains(word) || declared.contains(word), "no series {word}, in {expression}");
                series.insert(word.to_string());
            }
        }
        for by in expression.split("by (").skip(1) {
            for label in by.split(')').next().unwrap().split(',').map(str::trim).filter(|l| !l.contains(['$', ' '])) {
                let external = ["instance", "job", "le"].contains(&label);
                let known = metrics.contains(&format!("{label}=\"")) || label == "reason";
                assert!(external || known, "no label {label}, in {expression}");
            }
        }
    }
    assert!(series.len() > 20, "{series:?}");
    let ids: Vec<_> = dashboard["panels"].as_array().unwrap().iter().map(|p| p["id"].clone()).collect();
    assert_eq!(ids.iter().map(Value::to_string).collect::<BTreeSet<_>>().len(), ids.len(), "panel ids are unique");
}

/// All texts under the keys `expr` and `query` of a dashboard.
fn expressions(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|v| expressions(v, out)),
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str() {
                    Some(text) if key == "expr" || key == "query" => drop(out.insert(text.to_string())),
                    _ => expressions(value, out),
                }
            }
        }
        _ => {}
    }
}

#[tokio::test]
async fn pages_load_nothing_from_elsewhere_and_all_they_load_is_there() {
    let server = Server::native();
    for page in ["/", "/docs"] {
        let response = server.get(page).await;
        assert!(response.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
        assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8");
        let html = response.text().await.unwrap();
        assert!(!html.contains("https://") && !html.contains("http://"), "{page} names another server");
        let mut loaded = 0;
        for attribute in ["src=\"", "href=\""] {
            for path in html.split(attribute).skip(1).map(|rest| rest.split('"').next().unwrap()) {
                if path.starts_with('/') {
                    assert_eq!(server.get(path).await.status(), 200, "{page} loads {path}");
                    loaded += 1;
                }
            }
        }
        assert!(loaded >= 3, "{page}");
    }
    for script in ["pages.js", "playground.js", "charts.js", "docs.js"] {
        let response = server.get(&format!("/assets/{script}")).await;
        assert_eq!(response.headers()["content-type"], "text/javascript; charset=utf-8");
    }
}
