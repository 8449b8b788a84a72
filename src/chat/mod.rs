//! Chat: from messages to the prompt a model was trained on, and from what it wrote back to tool calls.
//!
//! [`ChatTemplate`] renders a checkpoint's own Jinja template as Hugging Face transformers does. [`ToolFormat`] knows
//! the ways of writing a tool call that templates teach; [`ToolStream`] reads them, [`ToolFormat::grammar`] demands
//! them. Nothing here knows of tokens, engines or HTTP.

mod load;
mod messages;
mod python;
mod source;
mod template;
mod tool_stream;
mod tools;

pub use load::{ChatTemplates, Specials};
pub use messages::adapt;
pub use template::{ChatError, ChatTemplate, TemplateInput};
pub use tool_stream::{Piece, ToolCall, ToolStream};
pub use tools::{ToolError, ToolFormat, tool_names};
