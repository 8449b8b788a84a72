//! `/v1/chat/completions` over HTTP: the bundled checkpoint with templates of our own.

use crate::support::{Server, ServerOptions};
use moe_serve::engine::api::Generate;
use moe_serve::wire::{ChatChunk, ChatResponse};
use serde_json::{Value, json};

pub const PLAIN: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                     {% if messages[0].role == 'system' and messages | length == 1 %}\
                     {{ raise_exception('a system message alone says nothing') }}{% endif %}\
                     {% if add_generation_prompt %}assistant:{% endif %}";

/// Teaches calls as Hermes models write them.
pub const WITH_TOOLS: &str = r#"{% if tools %}Tools: {{ tools | tojson }}
Call one as <tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"#;

fn server(template: &str) -> Server {
    Server::start(ServerOptions { chat: Some(template.into()), ..Default::default() })
}

fn body(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Tell me of the dog."}], "temperature": 0,
        "max_completion_tokens": 12, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

async fn post(server: &Server, body: &Value) -> reqwest::Response {
    server.client.post(format!("{}/v1/chat/completions", server.url)).json(body).send().await.unwrap()
}

async fn chat(server: &Server, fields: Value) -> ChatResponse {
    let response = post(server, &body(fields)).await;
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

async fn stream(server: &Server, fields: Value) -> Vec<ChatChunk> {
    let mut body = body(fields);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let response = post(server, &body).await;
    assert_eq!(response.status(), 200, "{body}");
    let text = response.text().await.unwrap();
    let events = text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no [DONE] at the end of {text}"));
    let json = |event: &str| event.strip_prefix("data: ").map(str::to_string).unwrap_or_else(|| panic!("{event:?}"));
    events.split_terminator("\n\n").map(|e| serde_json::from_str(&json(e)).unwrap()).collect()
}

async fn refused(server: &Server, body: Value) -> Value {
    let response = post(server, &body).await;
    assert_eq!(response.status(), 400, "{body}");
    response.json::<Value>().await.unwrap()["error"].clone()
}

fn says(error: &Value, param: &str, message: &str) {
    assert_eq!(error["param"], param, "{error}");
    assert!(error["message"].as_str().unwrap().contains(message), "{error}");
}

#[tokio::test]
async fn a_base_model_says_how_to_give_it_a_template() {
    let error = refused(&Server::native(), body(json!({}))).await;
    says(&error, "messages", "--chat-template FILE");
    says(&error, "messages", "/v1/completions");
}

#[tokio::test]
async fn chat_is_the_completion_of_the_rendered_prompt() {
    let server = server(PLAIN);
    let messages = json!([{"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "more."}]}]);
    let answer = chat(&server, json!({"messages": messages})).await;
    let prompt = "system: Be kind.\nuser: Tell me\nmore.\nassistant:";
    let want = json!({"prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": true});
    let want = server.complete(want).await;
    let choice = &answer.choices[0];
    assert_eq!(choice.message.content.as_deref(), Some(want.choices[0].text.as_str()));
    assert_eq!((answer.object.as_str(), choice.message.role.as_str()), ("chat.completion", "assistant"));
    assert!(answer.id.starts_with("chatcmpl-") && choice.finish_reason == "length");
    assert_eq!(answer.usage.prompt_tokens, want.usage.prompt_tokens);
    let tokens = server.client.post(format!("{}/tokenize", server.url)).json(&json!({"messages": messages}));
    let tokens: Value = tokens.send().await.unwrap().json().await.unwrap();
    assert_eq!(tokens["tokens"], json!(server.engine.encode(prompt, false).unwrap()));
}

#[tokio::test]
async fn a_stream_begins_with_the_roles_in_order_and_tells_the_same_as_a_whole_answer() {
    let server = server(PLAIN);
    let fields = json!({"n": 3, "temperature": 0.9, "seed": 4, "logprobs": true, "top_logprobs": 2});
    let whole = chat(&server, fields.clone()).await;
    let chunks = stream(&server, fields).await;
    for (i, chunk) in chunks[..3].iter().enumerate() {
        assert_eq!((chunk.choices[0].index, chunk.choices[0].delta.role.as_deref()), (i, Some("assistant")));
    }
    assert!(chunks.iter().all(|c| c.object == "chat.completion.chunk" && c.id == chunks[0].id));
    for choice in &whole.choices {
        let parts = || chunks.iter().flat_map(|c| &c.choices).filter(|c| c.index == choice.index);
        let text: String = parts().filter_map(|c| c.delta.content.clone()).collect();
        assert_eq!(Some(text.as_str()), choice.message.content.as_deref());
        let told: Vec<_> = parts().filter_map(|c| c.logprobs.clone()).flat_map(|l| l.content).collect();
        assert_eq!(&told, &choice.logprobs.as_ref().unwrap().content);
        assert_eq!((told.len(), told[0].top_logprobs.len()), (12, 2));
        assert_eq!(told.iter().flat_map(|t| t.token.bytes.clone()).collect::<Vec<u8>>(), text.as_bytes());
        let reasons: Vec<_> = parts().filter_map(|c| c.finish_reason.clone()).collect();
        assert_eq!(reasons.concat(), choice.finish_reason);
        assert_eq!(parts().filter(|c| c.delta.role.is_some()).count(), 1, "clients add texts up");
    }
    let last = chunks.last().unwrap();
    assert_eq!((last.choices.len(), last.usage.as_ref().unwrap().completion_tokens), (0, 36));
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 5}}, "required": ["city", "days"],
        "additionalProperties": false});
    json!([{"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "now"}}])
}

#[tokio::test]
async fn a_call_that_is_asked_for_is_made_and_fits_its_schema_streamed_or_not() {
    let server = server(WITH_TOOLS);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, seed) in [(json!("required"), 1), (json!("required"), 2), (named.clone(), 3)] {
        let fields = json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false, "temperature": 1.0,
            "seed": seed, "max_completion_tokens": 200, "logprobs": true});
        let answer = chat(&server, fields.clone()).await;
        let message = &answer.choices[0].message;
        assert_eq!((answer.choices[0].finish_reason.as_str(), &message.content), ("tool_calls", &None));
        let [call] = &message.tool_calls[..] else { panic!("one call: {message:?}") };
        assert!(call.id.starts_with("call-") && call.kind == "function" && call.index.is_none());
        let arguments: Value = serde_json::from_str(&call.function.arguments).unwrap();
        if call.function.name == "weather" {
            assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");
            assert!((1..=5).contains(&arguments["days"].as_i64().unwrap()), "{arguments}");
        } else {
            assert_eq!((call.function.name.as_str(), &arguments), ("now", &json!({})));
            assert_ne!(choice, named);
        }
        let chunks = stream(&server, fields).await;
        let calls: Vec<_> = chunks.iter().flat_map(|c| &c.choices).flat_map(|c| &c.delta.tool_calls).collect();
        assert_eq!((calls.len(), calls[0].index), (1, Some(0)));
        assert_eq!(calls[0].function, call.function);
        let told = chunks.iter().flat_map(|c| &c.choices).filter_map(|c| c.logprobs.as_ref()).map(|l| l.content.len());
        assert_eq!(told.sum::<usize>(), answer.usage.completion_tokens, "held back text delays no log-probability");
        let text: String = chunks.iter().flat_map(|c| &c.choices).filter_map(|c| c.delta.content.clone()).collect();
        assert_eq!(text, "");
    }
}

#[tokio::test]
async fn tools_reach_the_template_unless_they_must_not_be_called() {
    let server = server(WITH_TOOLS);
    let tokens = async |fields: Value| chat(&server, fields).await.usage.prompt_tokens;
    let without = tokens(json!({})).await;
    assert!(tokens(json!({"tools": tools()})).await > without + 50);
    assert_eq!(tokens(json!({"tools": tools(), "tool_choice": "none"})).await, without);
    assert_eq!(tokens(json!({"tools": []})).await, without);
    for (fields, param, message) in [
        (json!({"tool_choice": "required"}), "tool_choice", "tools is empty"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "dance"}}}),
            "tool_choice",
            "dance",
        ),
        (
            json!({"tools": tools(), "tool_choice": "required", "response_format": {"type": "json_object"}}),
            "response_format",
            "exclude each other",
        ),
    ] {
        says(&refused(&server, body(fields)).await, param, message);
    }
    let plain = self::server(PLAIN);
    says(&refused(&plain, body(json!({"tools": tools()}))).await, "tools", "no format for calls");
    assert_eq!(chat(&plain, json!({"tools": tools(), "tool_choice": "none"})).await.choices.len(), 1);
}

#[tokio::test]
async fn answers_are_held_to_json_and_end_by_themselves() {
    let server = server(PLAIN);
    let schema = json!({"type": "object", "properties": {"dog": {"enum": ["Rex", "Spot"]}}, "required": ["dog"],
        "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "dog", "schema": schema, "strict": true}});
    let mut request = body(json!({"response_format": format}));
    // Without a limit, an answer may be as long as the context allows.
    request.as_object_mut().unwrap().remove("max_completion_tokens");
    let answer: ChatResponse = post(&server, &request).await.json().await.unwrap();
    assert_eq!(answer.choices[0].finish_reason, "stop");
    let dog: Value = serde_json::from_str(answer.choices[0].message.content.as_ref().unwrap()).unwrap();
    assert!(["Rex", "Spot"].contains(&dog["dog"].as_str().unwrap()));
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let server = server(PLAIN);
    let alone = json!([{"role": "system", "content": "x"}]);
    for (fields, param, message) in [
        (json!({"messages": null}), "messages", "messages is required"),
        (json!({"messages": []}), "messages", "at least one message"),
        (json!({"messages": alone}), "messages", "a system message alone says nothing"),
        (json!({"top_logprobs": 2}), "top_logprobs", "\"logprobs\": true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "got 21"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens", "at least 1"),
        (json!({"max_tokens": 3}), "max_tokens", "older name"),
        (json!({"max_completion_tokens": 5000}), "max_completion_tokens", "got 5000"),
        (json!({"chat_template": "{{ messages }}"}), "chat_template", "--chat-template"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
            "cannot both be true",
        ),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs", "chat_template_kwargs"),
        (json!({"prompt": "x"}), "prompt", "unknown field"),
    ] {
        says(&refused(&server, body(fields)).await, param, message);
    }
}

#[tokio::test]
async fn a_final_message_can_be_continued() {
    let server = server(PLAIN);
    let messages = json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "The dog"}]);
    let answer = chat(&server, json!({"messages": messages, "continue_final_message": true})).await;
    let prompt = "user: Hi.\nassistant: The dog";
    let want = server.complete(json!({"prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": true})).await;
    assert_eq!(answer.choices[0].message.content.as_deref(), Some(want.choices[0].text.as_str()));
}
