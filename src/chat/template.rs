//! A chat template, rendered as transformers' `apply_chat_template` does.

use super::load::Specials;
use super::{python, source};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};
use std::error::Error as _;
use std::io::Write;

/// Bytes a template may have; those of models in use stay below 50 000.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Stack to compile on. A chain of `elif` is compiled one in the other, and a template of nothing else needs a quarter;
/// what is not touched costs nothing.
const COMPILE_STACK: usize = 256 << 20;
/// Steps a rendering may take: some hundred per message are usual.
const FUEL: u64 = 2_000_000;
/// Scopes and calls within each other; a call of a macro counts for several.
const DEPTH_MAX: usize = 200;
/// Bytes a rendered prompt may have.
const OUTPUT_BYTES_MAX: usize = 8 << 20;
/// What transformers marks the end of the final message with, to find where to cut.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Names that are arguments of their own, and so cannot be among the keyword arguments.
const RESERVED: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"];

/// Why a template cannot be used, or cannot render a request. `Source`, `Config` and `Syntax` are found at start-up;
/// all others are errors of the request.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ChatError {
    #[error("the chat template has {0} bytes; at most {SOURCE_BYTES_MAX} are taken")]
    Source(usize),
    #[error("the chat template cannot be read: {0}")]
    Config(String),
    #[error("the chat template has an error in line {line}: {message}")]
    Syntax { line: usize, message: String },
    #[error("messages must hold at least one message; got none")]
    NoMessages,
    #[error("chat_template_kwargs must not set `{0}`; it is a field of the request itself")]
    Reserved(String),
    #[error("{0}")]
    Continue(String),
    /// The template itself refused the messages, with its own words.
    #[error("{0}")]
    Raised(String),
    /// The template did with the messages what their types do not allow.
    #[error("the model's chat template cannot render these messages: {0}")]
    Render(String),
    #[error("the model's chat template took more than {FUEL} steps; send fewer messages")]
    Steps,
    #[error("the model's chat template nests more than {DEPTH_MAX} scopes")]
    Depth,
    #[error("the prompt is longer than {OUTPUT_BYTES_MAX} bytes; send less text")]
    Output,
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct TemplateInput<'a> {
    /// Objects with `role` and `content`; passed on as they are.
    pub messages: &'a [Json],
    pub tools: Option<&'a Json>,
    pub add_generation_prompt: bool,
    /// Leaves the final message open, for the model to go on with.
    pub continue_final_message: bool,
    /// Further variables of the template, as `enable_thinking`.
    pub kwargs: Map<String, Json>,
}

/// A compiled template with the special tokens it may name.
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    specials: Specials,
    takes_parts: bool,
}

/// What `raise_exception` was called with, on its way through the engine's own error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`ChatError::Source`] for one that is too long, [`ChatError::Syntax`] for one that is wrong.
    pub fn new(source: &str, specials: Specials) -> Result<Self, ChatError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(ChatError::Source(source.len()));
        }
        let rewritten = source::rewrite(source)?;
        let compile = std::thread::Builder::new().stack_size(COMPILE_STACK).spawn(move || environment(rewritten));
        let failed = |what: &str| ChatError::Config(format!("the thread that compiles it {what}"));
        let env = compile.map_err(|_| failed("did not start"))?.join().map_err(|_| failed("panicked"))?;
        let syntax = |e: Error| ChatError::Syntax {
            line: e.line().unwrap_or(0),
            message: e.detail().map_or_else(|| e.kind().to_string(), str::to_string),
        };
        let env = env.map_err(syntax)?;
        let mut template = Self { env, source: source.to_string(), specials, takes_parts: false };
        template.takes_parts = template.shows_parts();
        Ok(template)
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template reads content that is an array of parts; if not, it is to be given text.
    pub fn takes_parts(&self) -> bool {
        self.takes_parts
    }

    /// Finds out by trying: the text of a part comes out, and not as part of the printed object.
    fn shows_parts(&self) -> bool {
        let message = serde_json::json!({"role": "user", "content": [{"type": "text", "text": "a part"}]});
        let input = TemplateInput { messages: &[message], ..Default::default() };
        self.render(&input).is_ok_and(|prompt| prompt.contains("a part") && !prompt.contains("'text'"))
    }

    /// The prompt for `input`.
    ///
    /// # Errors
    /// Messages that the template refuses or cannot take, or that go beyond a limit: errors of the request.
    pub fn render(&self, input: &TemplateInput<'_>) -> Result<String, ChatError> {
        let Some(last) = input.messages.last() else { return Err(ChatError::NoMessages) };
        if let Some(name) = RESERVED.iter().find(|name| input.kwargs.contains_key(**name)) {
            return Err(ChatError::Reserved(name.to_string()));
        }
        if !input.continue_final_message {
            return self.rendered(input, input.messages);
        }
        if input.add_generation_prompt {
            let text = "continue_final_message and add_generation_prompt cannot both be true; give false for one";
            return Err(ChatError::Continue(text.into()));
        }
        if !self.source.contains("content") {
            return Err(ChatError::Continue("the model's chat template has no content to continue".into()));
        }
        let mut messages = input.messages.to_vec();
        let mut marked = last.clone();
        let open = mark(&mut marked)?;
        if let Some(slot) = messages.last_mut() {
            *slot = marked;
        }
        cut(self.rendered(input, &messages)?, &open)
    }

    fn rendered(&self, input: &TemplateInput<'_>, messages: &[Json]) -> Result<String, ChatError> {
        let own = [
            ("messages", Value::from(Serde(messages))),
            ("tools", Value::from(Serde(input.tools))),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(input.add_generation_prompt)),
        ];
        let kwargs = input.kwargs.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let specials = self.specials.iter().map(|(name, token)| (name, Value::from(token)));
        let context = Value::from_pairs(specials.chain(kwargs).chain(own));
        let mut out = Bounded { bytes: Vec::new(), full: false };
        let template = self.env.get_template("chat").map_err(|e| ChatError::Config(e.to_string()))?;
        match template.render_captured_to(context, &mut out) {
            _ if out.full => Err(ChatError::Output),
            Ok(_) => String::from_utf8(out.bytes).map_err(|e| ChatError::Render(e.to_string())),
            Err(error) => Err(render_error(&error)),
        }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(DEPTH_MAX);
    env.set_debug(false);
    python::setup(&mut env);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::from(ErrorKind::InvalidOperation).with_source(Raised(message)))
    });
    env.add_template_owned("chat", source)?;
    Ok(env)
}

fn render_error(error: &Error) -> ChatError {
    let sources = std::iter::successors(error.source(), |e| (*e).source());
    if let Some(Raised(message)) = sources.filter_map(|e| e.downcast_ref()).next() {
        return ChatError::Raised(message.clone());
    }
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => ChatError::Steps,
        (_, Some("recursion limit exceeded")) => ChatError::Depth,
        (kind, detail) => {
            let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
            ChatError::Render(format!("{kind}{}{}{line}", detail.map_or("", |_| ": "), detail.unwrap_or_default()))
        }
    }
}

/// Output that ends at a limit.
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.full |= self.bytes.len() + buf.len() > OUTPUT_BYTES_MAX;
        if self.full {
            return Err(std::io::Error::other("the prompt is too long"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Marks the end of the last text of the final message, and gives that text as it was.
fn mark(message: &mut Json) -> Result<String, ChatError> {
    let none = |what: &str| ChatError::Continue(format!("continue_final_message: the final message has no {what}"));
    let text = match message.get_mut("content") {
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        content => content,
    };
    match text {
        Some(Json::String(text)) => {
            let open = text.clone();
            text.push_str(CONTINUE_TAG);
            Ok(open)
        }
        _ => Err(none("text to continue")),
    }
}

/// Cuts a prompt where the mark stands; what the template trimmed from the message's end stays trimmed.
fn cut(mut prompt: String, open: &str) -> Result<String, ChatError> {
    let tag = CONTINUE_TAG.trim_end();
    let Some(at) = prompt.rfind(tag).filter(|_| prompt.contains(open.trim_matches(python::is_space))) else {
        let text = "continue_final_message: the model's chat template does not show the final message as it is";
        return Err(ChatError::Continue(text.into()));
    };
    let kept = prompt[at..].starts_with(CONTINUE_TAG);
    prompt.truncate(at);
    if !kept {
        prompt.truncate(prompt.trim_end_matches(python::is_space).len());
    }
    Ok(prompt)
}
