//! The way of a request's events from the engine to who reads them.
//!
//! Tokens become text where they are read, so that no step waits for that. Only where stop strings may end a completion
//! does the engine need its text before the next step, and makes it itself.

use super::api::{Event, TokenReport};
use super::text::{Text, TextStream};
use crate::types::{FinishReason, GenerateRequest, TokenId, Usage};
use futures::Stream;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::sync::mpsc;

/// What the engine sends.
enum Sent {
    Event(Event),
    /// More of completion `choice`.
    Token {
        choice: usize,
        token: Token,
    },
}

/// A token that was drawn.
pub(super) struct Token {
    pub id: TokenId,
    /// That which stops a completion is none.
    pub is_text: bool,
    /// What is to be told of it, if anything; where in the text it stands is not known yet.
    pub report: Option<TokenReport>,
}

/// Makes one completion's tokens text.
pub(super) struct Detokenizer {
    choice: usize,
    text: TextStream,
    /// Tokens whose text is not out yet.
    pending: Vec<TokenReport>,
}

impl Detokenizer {
    pub(super) fn new(choice: usize, text: &Text, request: &GenerateRequest) -> Self {
        let text = TextStream::new(text.clone(), &request.prompt, request.skip_special_tokens, request.stop.clone());
        Self { choice, text, pending: Vec::new() }
    }

    /// Adds a token. Gives the text that can be sent, and whether a stop string ended the completion; where it
    /// `may_stop` not, stop strings are text.
    pub(super) fn push(&mut self, token: Token, may_stop: bool) -> (Option<Event>, bool) {
        let offset = self.text.chars();
        self.pending.extend(token.report.map(|report| TokenReport { offset, ..report }));
        if !token.is_text {
            return (None, false);
        }
        let (text, stopped) = self.text.push(token.id, may_stop);
        (self.event(text, stopped), stopped)
    }

    /// What is still held back; the completion ends here, and a stop string in it is told.
    pub(super) fn finish(&mut self) -> (Option<Event>, bool) {
        let (text, stopped) = self.text.finish();
        (self.event(text, true), stopped)
    }

    /// Text, and the tokens so far; at the `end` also those without text: the stop token, or what a stop string cut
    /// off. All that was generated is told.
    fn event(&mut self, text: String, end: bool) -> Option<Event> {
        let any = !text.is_empty() || (end && !self.pending.is_empty());
        any.then(|| Event::Text { choice: self.choice, text, tokens: std::mem::take(&mut self.pending) })
    }
}

/// Sends the events of one request.
#[derive(Clone)]
pub struct EventSender {
    sender: mpsc::Sender<Sent>,
}

impl EventSender {
    /// Sends an event, if the channel has room and someone reads it.
    pub fn send(&self, event: Event) {
        // A full channel is impossible for the engine, whose channels have room for every event; a closed one is found
        // by `is_closed`.
        let _ = self.sender.try_send(Sent::Event(event));
    }

    /// Sends a token of a completion whose text is made by the reader.
    pub(super) fn send_token(&self, choice: usize, token: Token) {
        let _ = self.sender.try_send(Sent::Token { choice, token });
    }

    /// Whether no one reads any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Waits until no one reads any more.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// The events of one request. Its channel has room for all events the request can have, so that a client that
/// reads slowly delays no one.
pub struct Events {
    receiver: mpsc::Receiver<Sent>,
    /// One per completion, unless the engine makes the text.
    detokenizers: Vec<Detokenizer>,
    /// The end of a completion whose last text went before.
    next: Option<Event>,
}

impl Events {
    /// A channel with room for `capacity` events.
    pub fn channel(capacity: usize) -> (EventSender, Self) {
        Self::with_text(capacity, Vec::new())
    }

    /// One whose reader makes the tokens of all completions text.
    pub(super) fn with_text(capacity: usize, detokenizers: Vec<Detokenizer>) -> (EventSender, Self) {
        let (sender, receiver) = mpsc::channel(capacity);
        (EventSender { sender }, Self { receiver, detokenizers, next: None })
    }

    /// Waits for the next event on a thread that is not asynchronous; `None` after the last.
    pub fn blocking_next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.next.take() {
                return Some(event);
            }
            let sent = self.receiver.blocking_recv()?;
            if let Some(event) = self.read(sent) {
                return Some(event);
            }
        }
    }

    /// The event that comes next, if `sent` makes one; another may be in `next`.
    fn read(&mut self, sent: Sent) -> Option<Event> {
        let event = match sent {
            // No stop string is watched for here.
            Sent::Token { choice, token } => return self.detokenizers.get_mut(choice)?.push(token, true).0,
            Sent::Event(event) => event,
        };
        let Event::Done { choice, .. } = event else { return Some(event) };
        let rest = self.detokenizers.get_mut(choice).and_then(|detokenizer| detokenizer.finish().0);
        match rest {
            Some(rest) => {
                self.next = Some(event);
                Some(rest)
            }
            None => Some(event),
        }
    }

    /// Waits for the end of one completion on a thread that is not asynchronous: its text, why it ended, what it used.
    ///
    /// # Errors
    /// The engine's message if it failed.
    pub fn wait(mut self) -> Result<(String, FinishReason, Usage), String> {
        let mut text = String::new();
        while let Some(event) = self.blocking_next() {
            match event {
                Event::Prompt(_) => {}
                Event::Text { text: more, .. } => text.push_str(&more),
                Event::Done { reason, usage, .. } => return Ok((text, reason, usage)),
                Event::Failed(message) => return Err(message),
            }
        }
        Err("the engine stopped".into())
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            if let Some(event) = self.next.take() {
                return Poll::Ready(Some(event));
            }
            let Some(sent) = ready!(self.receiver.poll_recv(cx)) else { return Poll::Ready(None) };
            if let Some(event) = self.read(sent) {
                return Poll::Ready(Some(event));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on_stream;
    use std::path::Path;

    fn text() -> Text {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories/tokenizer.json");
        Text::read(Path::new(path), 4096).unwrap()
    }

    fn token(id: TokenId, is_text: bool) -> Token {
        Token { id, is_text, report: Some(TokenReport { id, offset: 0, score: None, experts: Vec::new() }) }
    }

    fn done(choice: usize) -> Event {
        Event::Done { choice, reason: FinishReason::Stop, usage: Usage::default() }
    }

    /// Two completions of a prompt, whose tokens and ends are sent, and nothing read yet.
    fn told(text: &Text, ids: &[TokenId]) -> Events {
        let request = GenerateRequest::greedy(vec![0], ids.len());
        let detokenizers = (0..2).map(|choice| Detokenizer::new(choice, text, &request)).collect();
        let (sender, events) = Events::with_text(2 * ids.len() + 4, detokenizers);
        for id in ids {
            for choice in [0, 1] {
                sender.send_token(choice, token(*id, true));
            }
        }
        sender.send_token(1, token(0, false));
        sender.send(done(1));
        sender.send(done(0));
        events
    }

    #[test]
    fn the_reader_gets_text_and_tokens_of_every_completion_before_its_end() {
        let text = text();
        let original = "a ☃ and 日本語 🦀";
        let ids = text.encode(original, false).unwrap();
        // The last character lacks a byte: it is held back to the end.
        let ids = &ids[..ids.len() - 1];
        let blocking: Vec<Event> = {
            let mut events = told(&text, ids);
            std::iter::from_fn(|| events.blocking_next()).collect()
        };
        assert_eq!(blocking, block_on_stream(told(&text, ids)).collect::<Vec<_>>());
        for (choice, ends) in [(0, None), (1, Some(0))] {
            let (mut whole, mut told, mut over) = (String::new(), Vec::new(), false);
            for event in &blocking {
                match event {
                    Event::Text { choice: of, text, tokens } if *of == choice => {
                        assert!(!over, "text after the end");
                        whole.push_str(text);
                        told.extend(tokens.iter().map(|token| (token.id, token.offset)));
                    }
                    Event::Done { choice: of, .. } if *of == choice => over = true,
                    _ => {}
                }
            }
            assert!(over && whole.starts_with("a ☃ and 日本語 ") && whole.ends_with('\u{FFFD}'), "{whole:?}");
            let want: Vec<TokenId> = ids.iter().copied().chain(ends).collect();
            assert_eq!(told.iter().map(|(id, _)| *id).collect::<Vec<_>>(), want);
            assert!(told.is_sorted_by_key(|(_, offset)| *offset) && told[0].1 == 0);
        }
    }

    #[test]
    fn events_that_are_sent_as_such_come_as_they_are() {
        let (sender, mut events) = Events::channel(2);
        let sent = [Event::Text { choice: 3, text: "x".into(), tokens: Vec::new() }, done(3)];
        sent.iter().for_each(|event| sender.send(event.clone()));
        assert!(!sender.is_closed());
        drop(sender);
        assert_eq!(std::iter::from_fn(|| events.blocking_next()).collect::<Vec<_>>(), sent);
    }
}
