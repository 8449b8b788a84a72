//! The OpenAI API's JSON, shared by the server and by clients of it.

mod chat;
mod common;
mod completions;
mod error;
mod fields;
mod tokenize;
mod usage;

pub use chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprob, ChatLogprobs, ChatRequest, ChatResponse,
    Delta, FunctionCall, FunctionName, NamedTool, TokenLogprob, ToolCallBody, ToolChoice, ToolMode,
};
pub use common::{Common, JsonSchema, ResponseFormat, Stop, StreamOptions};
pub use completions::{
    Choice, Chunk, ChunkChoice, CompletionRequest, CompletionResponse, Logprobs, Prompt, PromptItem, PromptLogprob,
};
pub use error::{ErrorBody, ErrorDetail};
pub use fields::RequestError;
pub use tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeInput, TokenizeRequest, TokenizeResponse};
pub use usage::{BudgetUsage, MoeTrace, MoeUsage, PromptTokensDetails, Routed, UsageBody};
