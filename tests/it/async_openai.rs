//! The crate async-openai, as its users call it: what it sends is taken, and what it gets fits its types.

use crate::chat_api::{PLAIN, WITH_TOOLS};
use crate::support::{Server, ServerOptions, client};
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::{ApiErrorResponse, OpenAIError};
use async_openai::types::chat::{
    ChatCompletionMessageToolCall, ChatCompletionMessageToolCalls, ChatCompletionRequestAssistantMessage,
    ChatCompletionRequestMessage, ChatCompletionRequestSystemMessage, ChatCompletionRequestToolMessage,
    ChatCompletionRequestUserMessage, ChatCompletionStreamOptions, ChatCompletionTool, ChatCompletionToolChoiceOption,
    ChatCompletionTools, CompletionFinishReason, CreateChatCompletionRequest, CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse, FinishReason, FunctionObject, Prompt, ResponseFormat, ResponseFormatJsonSchema,
    Role, ToolChoiceOptions,
};
use async_openai::types::completions::CreateCompletionRequest;
use futures::TryStreamExt;
use serde_json::{Value, json};

/// The bundled checkpoint with a chat template, and the crate's client for it.
fn start(template: &str) -> (Server, Client<OpenAIConfig>) {
    let server = Server::start(ServerOptions { chat: Some(template.into()), ..Default::default() });
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("not asked for");
    let openai = Client::with_config(config).with_http_client(client());
    (server, openai)
}

const WITH_USAGE: Option<ChatCompletionStreamOptions> =
    Some(ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None });

fn completion() -> CreateCompletionRequest {
    CreateCompletionRequest {
        model: "stories".into(),
        prompt: Prompt::String("Once upon a time".into()),
        max_tokens: Some(12),
        temperature: Some(0.8),
        seed: Some(7),
        logprobs: Some(2),
        ..Default::default()
    }
}

fn chat() -> CreateChatCompletionRequest {
    let system = ChatCompletionRequestSystemMessage::from("Be kind.");
    let user = ChatCompletionRequestUserMessage::from("Tell me of the dog.");
    CreateChatCompletionRequest {
        model: "stories".into(),
        messages: vec![system.into(), user.into()],
        max_completion_tokens: Some(12),
        temperature: Some(0.0),
        ..Default::default()
    }
}

async fn chunks(
    openai: &Client<OpenAIConfig>,
    request: CreateChatCompletionRequest,
) -> Vec<CreateChatCompletionStreamResponse> {
    let request = CreateChatCompletionRequest { stream_options: WITH_USAGE, ..request };
    openai.chat().create_stream(request).await.unwrap().try_collect().await.unwrap()
}

fn content(answer: &CreateChatCompletionResponse) -> &str {
    answer.choices[0].message.content.as_deref().unwrap()
}

#[track_caller]
fn refusal<T>(result: Result<T, OpenAIError>) -> ApiErrorResponse {
    match result {
        Err(OpenAIError::ApiError(error)) => error,
        Err(other) => panic!("no error of the API: {other:?}"),
        Ok(_) => panic!("it was taken"),
    }
}

#[tokio::test]
async fn completions_come_whole_and_streamed_with_their_usage() {
    let (server, openai) = start(PLAIN);
    let body = serde_json::to_value(completion()).unwrap();
    let raw = server.client.post(format!("{}/v1/completions", server.url)).json(&body).send().await.unwrap();
    let raw: Value = raw.json().await.unwrap();
    let whole = openai.completions().create(completion()).await.unwrap();
    let choice = &whole.choices[0];
    assert_eq!((whole.object.as_str(), whole.model.as_str()), ("text_completion", "stories"));
    assert_eq!(choice.text, raw["choices"][0]["text"].as_str().unwrap());
    assert_eq!(choice.finish_reason, Some(CompletionFinishReason::Length));
    let logprobs = choice.logprobs.as_ref().unwrap();
    assert_eq!((logprobs.tokens.len(), logprobs.tokens.concat()), (12, choice.text.clone()));
    assert!(logprobs.token_logprobs.iter().all(|l| l.is_some_and(|l| l <= 0.0)));
    assert!(logprobs.top_logprobs.iter().all(|t| t.as_object().is_some_and(|t| t.len() >= 2)));
    let usage = whole.usage.unwrap();
    assert_eq!((usage.completion_tokens, usage.total_tokens), (12, usage.prompt_tokens + 12));

    let request = CreateCompletionRequest { stream_options: WITH_USAGE, ..completion() };
    let chunks: Vec<_> = openai.completions().create_stream(request).await.unwrap().try_collect().await.unwrap();
    let choices = || chunks.iter().flat_map(|c| &c.choices);
    assert_eq!(choices().map(|c| c.text.as_str()).collect::<String>(), choice.text);
    let told: usize = choices().filter_map(|c| c.logprobs.as_ref()).map(|l| l.tokens.len()).sum();
    assert_eq!(told, 12);
    let reasons: Vec<_> = choices().filter_map(|c| c.finish_reason).collect();
    assert_eq!(reasons, [CompletionFinishReason::Length]);
    let (last, others) = chunks.split_last().unwrap();
    assert!(last.choices.is_empty() && others.iter().all(|c| c.usage.is_none()));
    assert_eq!(last.usage.as_ref().unwrap().completion_tokens, 12);
}

#[tokio::test]
async fn several_prompts_of_tokens_are_answered_in_order() {
    let (_server, openai) = start(PLAIN);
    let prompt = Prompt::ArrayOfIntegerArray(vec![vec![100, 200, 300], vec![400, 500]]);
    let request = CreateCompletionRequest { prompt, n: Some(2), logprobs: None, ..completion() };
    let answer = openai.completions().create(request).await.unwrap();
    assert_eq!(answer.choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[tokio::test]
async fn chat_comes_whole_and_streamed_with_log_probabilities() {
    let (_server, openai) = start(PLAIN);
    let request = || CreateChatCompletionRequest { logprobs: Some(true), top_logprobs: Some(2), ..chat() };
    let whole = openai.chat().create(request()).await.unwrap();
    let choice = &whole.choices[0];
    assert_eq!((whole.object.as_str(), choice.message.role), ("chat.completion", Role::Assistant));
    let told = choice.logprobs.as_ref().unwrap().content.as_ref().unwrap();
    assert!(!told.is_empty() && told.iter().all(|t| t.logprob <= 0.0 && t.top_logprobs.len() == 2));
    // At temperature 0 the likeliest token is drawn.
    assert!(told.iter().all(|t| t.top_logprobs[0].token == t.token));
    let bytes: Vec<u8> = told.iter().flat_map(|t| t.bytes.clone().unwrap()).collect();
    assert!(bytes.starts_with(content(&whole).as_bytes()));

    let chunks = chunks(&openai, request()).await;
    let deltas = || chunks.iter().flat_map(|c| &c.choices);
    assert_eq!(chunks[0].choices[0].delta.role, Some(Role::Assistant));
    assert_eq!(deltas().filter_map(|c| c.delta.content.as_deref()).collect::<String>(), content(&whole));
    assert_eq!(deltas().find_map(|c| c.finish_reason), choice.finish_reason);
    let streamed = deltas().filter_map(|c| c.logprobs.as_ref()?.content.as_ref()).flatten();
    assert!(streamed.eq(told), "a stream tells other log-probabilities");
    // The second time, some of the prompt was cached.
    let (usage, again) = (whole.usage.unwrap(), chunks.last().unwrap().usage.clone().unwrap());
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (again.prompt_tokens, again.completion_tokens));
    assert_eq!(again.prompt_tokens_details.unwrap().cached_tokens, Some(16));
}

#[tokio::test]
async fn a_required_call_is_made_and_its_result_taken_back() {
    let (_server, openai) = start(WITH_TOOLS);
    let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"], "additionalProperties": false});
    let function = FunctionObject {
        name: "weather".into(),
        description: Some("the weather".into()),
        parameters: Some(parameters),
        strict: Some(true),
    };
    let request = || CreateChatCompletionRequest {
        tools: Some(vec![ChatCompletionTools::Function(ChatCompletionTool { function: function.clone() })]),
        tool_choice: Some(ChatCompletionToolChoiceOption::Mode(ToolChoiceOptions::Required)),
        parallel_tool_calls: Some(false),
        max_completion_tokens: Some(100),
        ..chat()
    };
    let whole = openai.chat().create(request()).await.unwrap();
    let choice = &whole.choices[0];
    assert_eq!((choice.finish_reason, &choice.message.content), (Some(FinishReason::ToolCalls), &None));
    let calls = choice.message.tool_calls.clone().unwrap();
    let [ChatCompletionMessageToolCalls::Function(call)] = &calls[..] else { panic!("one call: {calls:?}") };
    assert_eq!(call.function.name, "weather");
    let arguments: Value = serde_json::from_str(&call.function.arguments).unwrap();
    assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{arguments}");

    let chunks = chunks(&openai, request()).await;
    let deltas = || chunks.iter().flat_map(|c| &c.choices);
    let pieces: Vec<_> = deltas().filter_map(|c| c.delta.tool_calls.as_ref()).flatten().collect();
    let functions = || pieces.iter().filter_map(|p| p.function.as_ref());
    assert_eq!(functions().filter_map(|f| f.name.as_deref()).collect::<String>(), "weather");
    assert_eq!(functions().filter_map(|f| f.arguments.as_deref()).collect::<String>(), call.function.arguments);
    assert_eq!(deltas().find_map(|c| c.finish_reason), Some(FinishReason::ToolCalls));

    let ChatCompletionMessageToolCall { id, .. } = call.clone();
    let said = ChatCompletionRequestAssistantMessage { tool_calls: Some(calls), ..Default::default() };
    let result = ChatCompletionRequestToolMessage { content: "It rains.".into(), tool_call_id: id };
    let mut next = CreateChatCompletionRequest {
        tool_choice: Some(ChatCompletionToolChoiceOption::Mode(ToolChoiceOptions::None)),
        ..request()
    };
    next.messages.extend([ChatCompletionRequestMessage::Assistant(said), ChatCompletionRequestMessage::Tool(result)]);
    let answer = openai.chat().create(next).await.unwrap();
    assert!(answer.choices[0].message.tool_calls.is_none());
}

#[tokio::test]
async fn an_answer_follows_the_schema_of_its_response_format() {
    let (_server, openai) = start(PLAIN);
    let schema = json!({"type": "object", "properties": {"dog": {"enum": ["Rex", "Spot"]}}, "required": ["dog"],
        "additionalProperties": false});
    let json_schema = ResponseFormatJsonSchema { name: "dog".into(), description: None, schema, strict: Some(true) };
    let request = CreateChatCompletionRequest {
        response_format: Some(ResponseFormat::JsonSchema { json_schema }),
        max_completion_tokens: None,
        ..chat()
    };
    let answer = openai.chat().create(request).await.unwrap();
    assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::Stop));
    let dog: Value = serde_json::from_str(content(&answer)).unwrap();
    assert!(["Rex", "Spot"].contains(&dog["dog"].as_str().unwrap()), "{dog}");
}

#[tokio::test]
async fn models_are_listed_and_told_one_by_one() {
    let (_server, openai) = start(PLAIN);
    let models = openai.models().list().await.unwrap();
    assert_eq!((models.object.as_str(), models.data.len()), ("list", 1));
    let model = openai.models().retrieve(&models.data[0].id).await.unwrap();
    assert_eq!((model.id.as_str(), model.object.as_str()), ("stories", "model"));
    assert_eq!(model, models.data[0]);
    let error = refusal(openai.models().retrieve("another").await);
    assert_eq!((error.status_code.as_u16(), error.api_error.code.as_deref()), (404, Some("model_not_found")));
}

#[tokio::test]
async fn errors_arrive_with_their_field_and_message() {
    let (_server, openai) = start(PLAIN);
    let hot = || CreateCompletionRequest { temperature: Some(3.0), ..completion() };
    let hot_chat = || CreateChatCompletionRequest { temperature: Some(3.0), ..chat() };
    for error in [
        refusal(openai.completions().create(hot()).await),
        refusal(openai.completions().create_stream(hot()).await),
        refusal(openai.chat().create(hot_chat()).await),
        refusal(openai.chat().create_stream(hot_chat()).await),
    ] {
        assert_eq!(error.status_code, 400);
        let error = error.api_error;
        assert_eq!(
            (error.param.as_deref(), error.r#type.as_deref()),
            (Some("temperature"), Some("invalid_request_error"))
        );
        assert!(error.message.contains("temperature") && error.message.contains('3'), "{}", error.message);
    }
    let other = CreateCompletionRequest { model: "another".into(), ..completion() };
    let error = refusal(openai.completions().create(other).await);
    assert_eq!((error.status_code.as_u16(), error.api_error.param.as_deref()), (404, Some("model")));
}
