//! The OpenAI API's JSON, shared by the server and by clients of it.

mod completions;
mod error;

pub use completions::{
    Choice, Chunk, ChunkChoice, CompletionRequest, CompletionResponse, MoeUsage, Prompt, PromptItem, RequestError,
    Stop, StreamOptions, UsageBody,
};
pub use error::{ErrorBody, ErrorDetail};
