//! What the engine offers: submit a request, read its events.

use crate::types::{FinishReason, GenerateRequest, LimitError, Limits, SpecError, TokenId, Usage};
use futures::Stream;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Something that generates: the engine, or a scripted double in tests.
pub trait Generate: Send + Sync {
    /// What is served.
    fn info(&self) -> &ModelInfo;

    /// Token ids of a text, with the special tokens the checkpoint's tokenizer adds.
    ///
    /// # Errors
    /// A text the tokenizer cannot take.
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String>;

    /// Queues a request. Dropping the [`Events`] abandons it: its sequence is gone within a step.
    ///
    /// # Errors
    /// A request outside the limits, a full queue, or an engine that is stopping.
    fn submit(&self, request: GenerateRequest) -> Result<Events, SubmitError>;

    /// Whether requests are accepted.
    fn ready(&self) -> bool;

    /// The series of this generator in Prometheus' text format.
    fn metrics(&self) -> String;
}

/// What is served, as clients may know it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Name that requests give.
    pub name: String,
    /// The default router: its specification, and what it means in words.
    pub router: String,
    pub limits: Limits,
    /// Requests that can be unfinished at the same time.
    pub unfinished_max: usize,
    /// Seconds since 1970.
    pub created: u64,
}

/// Why a request was not queued.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    Router(#[from] SpecError),
    #[error("the server is busy: {unfinished} requests are unfinished and {limit} is the limit; try again later")]
    QueueFull { unfinished: usize, limit: usize },
    #[error("the server is shutting down")]
    Stopping,
}

/// What happens to a request, in order: texts, then one end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text: whole characters, never a part of a stop string.
    Text(String),
    /// The end, with what it used.
    Done { reason: FinishReason, usage: Usage },
    /// The end because the engine failed; the message is for the client.
    Failed(String),
}

/// The events of one request. Its channel has room for all events the request can have, so that a client that
/// reads slowly delays no one.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Event>,
}

impl Events {
    /// Events that come through `receiver`.
    pub fn new(receiver: mpsc::Receiver<Event>) -> Self {
        Self { receiver }
    }

    /// Waits for the end on a thread that is not asynchronous: the text, why it ended, what it used.
    ///
    /// # Errors
    /// The engine's message if it failed.
    pub fn wait(mut self) -> Result<(String, FinishReason, Usage), String> {
        let mut text = String::new();
        while let Some(event) = self.receiver.blocking_recv() {
            match event {
                Event::Text(more) => text.push_str(&more),
                Event::Done { reason, usage } => return Ok((text, reason, usage)),
                Event::Failed(message) => return Err(message),
            }
        }
        Err("the engine stopped".into())
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(cx)
    }
}
