//! One request inside the engine.

use super::api::Event;
use super::metrics::Metrics;
use super::sampler::Sampler;
use super::text::{Text, TextStream};
use crate::moe::Policy;
use crate::types::{FinishReason, GenerateRequest, TokenId, Usage, Work};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::sync::mpsc;

/// A request on its way to the engine thread.
pub(super) struct Job {
    pub request: GenerateRequest,
    pub policy: Arc<Policy>,
    pub events: mpsc::Sender<Event>,
    pub arrived: Instant,
    pub slot: Slot,
}

/// One of the server's places for unfinished requests; free again when dropped.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Slot {
    /// Takes a place, or tells how many are taken if that is `limit`.
    pub(super) fn take(taken: &Arc<AtomicUsize>, limit: usize) -> Result<Self, usize> {
        let more = |n: usize| (n < limit).then_some(n + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).map(|_| Self(taken.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request's tokens and what makes its next one.
pub(super) struct Sequence {
    /// Prompt, then completion.
    pub tokens: Vec<TokenId>,
    pub policy: Arc<Policy>,
    pub work: Work,
    prompt_len: usize,
    max_tokens: usize,
    min_tokens: usize,
    /// Tokens that end the completion.
    stop_ids: Vec<TokenId>,
    sampler: Sampler,
    text: TextStream,
    events: mpsc::Sender<Event>,
    arrived: Instant,
    last_token: Option<Instant>,
    admitted: bool,
    slot: Option<Slot>,
}

impl Sequence {
    pub(super) fn new(job: Job, text: Text, eos: &[TokenId]) -> Self {
        let request = job.request;
        let mut stop_ids = request.stop_token_ids;
        if !request.ignore_eos {
            stop_ids.extend(eos);
        }
        Self {
            sampler: Sampler::new(request.sampling, &request.prompt),
            text: TextStream::new(text, &request.prompt, request.skip_special_tokens, request.stop),
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            policy: job.policy,
            work: Work::default(),
            max_tokens: request.max_tokens,
            min_tokens: request.min_tokens,
            stop_ids,
            events: job.events,
            arrived: job.arrived,
            last_token: None,
            admitted: false,
            slot: Some(job.slot),
        }
    }

    /// Whether the client has left.
    pub(super) fn departed(&self) -> bool {
        self.events.is_closed()
    }

    /// Told when a chunk of the sequence runs.
    pub(super) fn runs(&mut self, metrics: &Metrics) {
        if !self.admitted {
            self.admitted = true;
            metrics.admitted(self.arrived.elapsed());
        }
    }

    fn completion_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Samples the next token from `logits` and sends what text it completes. Gives true when the request is over.
    pub(super) fn advance(&mut self, logits: &mut [f32], metrics: &Metrics) -> bool {
        let too_early = self.completion_len() < self.min_tokens;
        let forbidden: &[TokenId] = if too_early { &self.stop_ids } else { &[] };
        let Some(id) = self.sampler.sample(logits, forbidden) else {
            self.fail("the model gave no finite logit for the next token", metrics);
            return true;
        };
        self.tokens.push(id);
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token(now - self.arrived),
            Some(last) => metrics.next_token(now - last),
        }
        if self.stop_ids.contains(&id) {
            // The stop token itself is no text.
            let (text, _) = self.text.finish();
            self.send_text(text);
            return self.finish(FinishReason::Stop, metrics);
        }
        // A stop string that comes too early stays text.
        let (text, stopped) = self.text.push(id, !too_early);
        self.send_text(text);
        if stopped {
            return self.finish(FinishReason::Stop, metrics);
        }
        if self.completion_len() == self.max_tokens {
            let (text, stopped) = self.text.finish();
            self.send_text(text);
            let reason = if stopped { FinishReason::Stop } else { FinishReason::Length };
            return self.finish(reason, metrics);
        }
        false
    }

    fn send_text(&self, text: String) {
        if !text.is_empty() {
            // A full channel is impossible (it has room for every event), a closed one is found by `departed`.
            let _ = self.events.try_send(Event::Text(text));
        }
    }

    fn finish(&mut self, reason: FinishReason, metrics: &Metrics) -> bool {
        let usage = Usage { prompt_tokens: self.prompt_len, completion_tokens: self.completion_len(), work: self.work };
        metrics.finished(reason, &usage, self.arrived.elapsed());
        self.end(Event::Done { reason, usage });
        true
    }

    /// Ends the request with an error.
    pub(super) fn fail(&mut self, message: &str, metrics: &Metrics) {
        metrics.ended("error");
        self.end(Event::Failed(message.to_string()));
    }

    fn end(&mut self, event: Event) {
        // Free before the client knows, who may come back at once.
        self.slot = None;
        let _ = self.events.try_send(event);
    }
}
