//! One completion inside the engine.

use super::api::{Event, EventSender, PromptReport, TokenReport, TokenScore};
use super::events::{Detokenizer, Token};
use super::grammar::Grammar;
use super::metrics::Metrics;
use super::sampler::Sampler;
use super::score::distribution;
use crate::moe::Policy;
use crate::sched::{Admitted, BlockHash, Chunk, NewSeq};
use crate::types::{FinishReason, GenerateRequest, PromptScoring, SamplingParams, TokenId, Usage, Work};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// A request that is accepted.
pub(super) struct Accepted {
    pub request: GenerateRequest,
    pub policy: Arc<Policy>,
    /// Begins the hashes of its KV blocks, if it may share them.
    pub root: Option<BlockHash>,
    pub grammar: Option<Grammar>,
    pub events: EventSender,
    /// One per completion, if the engine is to make the text.
    pub detokenizers: Vec<Detokenizer>,
    pub arrived: Instant,
    /// One per completion.
    pub slots: Vec<Slot>,
}

/// A request on its way to the engine thread.
pub(super) struct Job {
    /// The first completion, which has the others with it.
    pub first: Sequence,
    pub new: NewSeq,
}

/// One of the server's places for unfinished completions; free again when dropped.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Slot {
    /// Takes `count` places, or tells how many are taken if that would be more than `limit`.
    pub(super) fn take(taken: &Arc<AtomicUsize>, count: usize, limit: usize) -> Result<Vec<Self>, usize> {
        let more = |n: usize| (n + count <= limit).then_some(n + count);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more)?;
        Ok((0..count).map(|_| Self(taken.clone())).collect())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A completion's state, and what makes its next token. The scheduler has its tokens.
pub(super) struct Sequence {
    pub policy: Arc<Policy>,
    pub work: Work,
    /// The other completions of the prompt, until it is computed.
    pub siblings: Vec<Sequence>,
    /// Whose it is: the request's `cache_salt`.
    pub tenant: Arc<str>,
    choice: usize,
    prompt_len: usize,
    /// Whether the prompt is looked up in the prefix cache.
    caches: bool,
    cached: usize,
    completion_len: usize,
    max_tokens: usize,
    min_tokens: usize,
    /// Tokens that end the completion.
    stop_ids: Vec<TokenId>,
    sampler: Sampler,
    grammar: Option<Grammar>,
    /// Makes the text, if stop strings are watched for; else the reader does.
    detokenizer: Option<Detokenizer>,
    /// Alternatives wanted beside the log-probability of each token.
    logprobs: Option<usize>,
    trace: bool,
    /// Of the first completion alone.
    prompt: Option<PromptTask>,
    /// Experts used per MoE layer by the pass whose logits come next.
    last_k_l: Vec<u16>,
    /// The logits that the pass before gave, if the policy reads the surprisal of what follows.
    last_logits: Vec<f32>,
    events: EventSender,
    arrived: Instant,
    last_token: Option<Instant>,
    admitted: bool,
    slot: Option<Slot>,
}

/// What the logits after a prompt token are to tell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// The token to score; none after the last one.
    token: Option<TokenId>,
    /// Likeliest alternatives to tell.
    top: usize,
    /// Whether to tell the whole distribution.
    whole: bool,
}

/// What they tell.
pub(super) struct Told {
    score: Option<TokenScore>,
    distribution: Option<Vec<f32>>,
}

impl Wanted {
    /// Reads it off the logits.
    pub(super) fn of(self, logits: &[f32]) -> Told {
        Told {
            score: self.token.map(|id| TokenScore::of(logits, id, self.top)),
            distribution: self.whole.then(|| distribution(logits)),
        }
    }
}

/// What is to be told of a prompt.
struct PromptTask {
    tokens: Vec<TokenId>,
    scoring: Option<PromptScoring>,
    report: PromptReport,
}

impl PromptTask {
    fn new(request: &GenerateRequest) -> Option<Self> {
        if request.scoring.is_none() && !request.trace {
            return None;
        }
        let len = request.prompt.len();
        // The first token has nothing before it.
        let unscored = request.scoring.map_or(0, |s| s.from.clamp(1, len));
        let experts = vec![None; if request.trace { len } else { 0 }];
        let report = PromptReport { scores: vec![None; unscored], experts, distributions: Vec::new() };
        Some(Self { tokens: request.prompt.clone(), scoring: request.scoring, report })
    }
}

impl Sequence {
    /// The first completion of a request, which computes the prompt and has the others with it; and what the scheduler
    /// is to know. Takes its time for many completions: not for the engine's thread.
    pub(super) fn job(job: Accepted, eos: &[TokenId]) -> Job {
        let mut slots = job.slots;
        let mut detokenizers = job.detokenizers.into_iter();
        let siblings = slots.split_off(1.min(slots.len()));
        let tenant: Arc<str> = job.request.cache_salt.as_str().into();
        let mut one = |choice: usize, slot: Option<Slot>| {
            let request = &job.request;
            let mut stop_ids = request.stop_token_ids.clone();
            if !request.ignore_eos {
                stop_ids.extend(eos);
            }
            let seed = request.sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
            let sampling = SamplingParams { seed, ..request.sampling.clone() };
            Self {
                policy: job.policy.clone(),
                work: Work::default(),
                siblings: Vec::new(),
                tenant: tenant.clone(),
                choice,
                prompt_len: request.prompt.len(),
                caches: false,
                cached: 0,
                completion_len: 0,
                max_tokens: request.max_tokens,
                min_tokens: request.min_tokens,
                stop_ids,
                sampler: Sampler::new(sampling, &request.prompt),
                grammar: job.grammar.clone(),
                detokenizer: detokenizers.next(),
                logprobs: request.logprobs,
                trace: request.trace,
                prompt: None,
                last_k_l: Vec::new(),
                last_logits: Vec::new(),
                events: job.events.clone(),
                arrived: job.arrived,
                last_token: None,
                admitted: false,
                slot,
            }
        };
        let mut first = one(0, slots.pop());
        first.siblings = siblings.into_iter().enumerate().map(|(i, slot)| one(i + 1, Some(slot))).collect();
        first.prompt = PromptTask::new(&job.request);
        // The position before the first scored token must be computed, for its logits.
        let unscored = job.request.scoring.map_or(usize::MAX, |s| s.from.saturating_sub(1));
        let reuse_max = job.request.reuse_max.unwrap_or(usize::MAX).min(unscored);
        first.caches = job.root.is_some() && reuse_max > 0;
        // A token's surprisal is known once the one before it has passed the model.
        let chunk_max = if job.policy.signals().surprisal { 1 } else { usize::MAX };
        Job { first, new: NewSeq { tokens: job.request.prompt, root: job.root, reuse_max, chunk_max } }
    }

    /// Whether the client has left.
    pub(super) fn departed(&self) -> bool {
        self.events.is_closed()
    }

    /// Told when the sequence leaves the queue, for the first time or again.
    pub(super) fn admitted(&mut self, admitted: &Admitted, metrics: &Metrics) {
        if !self.admitted {
            self.admitted = true;
            self.cached = admitted.cached;
            metrics.admitted(self.arrived.elapsed());
            if self.caches {
                metrics.prefix_looked_up(self.prompt_len, self.cached);
            }
        }
    }

    /// Whether `chunk` decodes: the prompt was complete before it, and it is the one token that was drawn last. What is
    /// computed anew after a preemption is no decoding.
    pub(super) fn decodes(&self, chunk: &Chunk) -> bool {
        chunk.samples && chunk.tokens.len() == 1 && chunk.start >= self.prompt_len
    }

    /// Whether a token follows the prompt.
    pub(super) fn generates(&self) -> bool {
        self.max_tokens > 0
    }

    /// Keeps the logits of a pass, for the surprisal of the token that follows.
    pub(super) fn keep(&mut self, logits: &[f32]) {
        self.last_logits.clear();
        self.last_logits.extend(logits);
    }

    /// −log p of `token` at `position`, the one after the last pass; NaN for the first, which nothing stands before.
    pub(super) fn surprisal(&self, position: usize, token: TokenId) -> f32 {
        match self.last_logits.as_slice() {
            logits if position > 0 && !logits.is_empty() => -TokenScore::of(logits, token, 0).logprob,
            _ => f32::NAN,
        }
    }

    /// What of the prompt the logits of `position` are to tell.
    pub(super) fn scores_next(&self, position: usize) -> Option<Wanted> {
        let task = self.prompt.as_ref()?;
        let PromptScoring { top, whole, .. } = task.scoring?;
        // What was scored before a preemption is not scored again.
        let next = position + 1;
        let fresh = next >= task.report.scores.len();
        let wanted = Wanted { token: task.tokens.get(next).copied(), top, whole };
        (fresh && (wanted.token.is_some() || whole)).then_some(wanted)
    }

    /// Takes what the next logits that were wanted tell.
    pub(super) fn scored(&mut self, told: Told) {
        if let Some(task) = &mut self.prompt {
            task.report.scores.extend(told.score.map(Some));
            task.report.distributions.extend(told.distribution);
        }
    }

    /// Takes the experts per MoE layer that the pass over `position` used.
    pub(super) fn routed(&mut self, position: usize, k_l: &[u16]) {
        if !self.trace {
            return;
        }
        self.last_k_l = k_l.to_vec();
        if let Some(told) = self.prompt.as_mut().and_then(|task| task.report.experts.get_mut(position)) {
            *told = Some(k_l.to_vec());
        }
    }

    /// Tells what was asked for of the prompt, once it is computed, and gives the other completions.
    pub(super) fn prompt_done(&mut self) -> Vec<Sequence> {
        if let Some(task) = self.prompt.take() {
            self.events.send(Event::Prompt(task.report));
        }
        let mut siblings = std::mem::take(&mut self.siblings);
        for sibling in &mut siblings {
            sibling.admitted = true;
            sibling.last_k_l.clone_from(&self.last_k_l);
            sibling.last_logits.clone_from(&self.last_logits);
        }
        siblings
    }

    /// Draws the next token from `logits` and sends what text it completes. Nothing, when the completion is over.
    pub(super) fn advance(&mut self, logits: &[f32], metrics: &Metrics) -> Option<TokenId> {
        let too_early = self.completion_len < self.min_tokens;
        let forbidden: &[TokenId] = if too_early { &self.stop_ids } else { &[] };
        let id = match self.sampler.sample(logits, forbidden, self.grammar.as_mut()) {
            Ok(id) => id,
            Err(error) => {
                self.fail(&format!("no token can follow: {error}"), metrics);
                return None;
            }
        };
        self.completion_len += 1;
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token(now - self.arrived),
            Some(last) => metrics.next_token(now - last),
        }
        let tells = self.logprobs.is_some() || self.trace;
        let report = tells.then(|| {
            let score = self.logprobs.map(|top| TokenScore::of(logits, id, top));
            TokenReport { id, offset: 0, score, experts: std::mem::take(&mut self.last_k_l) }
        });
        let token = Token { id, is_text: !self.stop_ids.contains(&id), report };
        let reason = self.end_after(token, too_early, metrics);
        reason?.map_or(Some(id), |reason| {
            self.finish(reason, metrics);
            None
        })
    }

    /// Tells a token, and gives whether it ends the completion; nothing, if it failed.
    fn end_after(&mut self, token: Token, too_early: bool, metrics: &Metrics) -> Option<Option<FinishReason>> {
        if !token.is_text {
            self.tell(token, false);
            self.tell_rest();
            return Some(Some(FinishReason::Stop));
        }
        let complete = match self.grammar.as_mut().map(|grammar| grammar.accept(token.id)) {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(error)) => {
                self.fail(&format!("the output cannot be held to the grammar asked for: {error}"), metrics);
                return None;
            }
        };
        // A stop string that comes too early stays text.
        if self.tell(token, !too_early) {
            return Some(Some(FinishReason::Stop));
        }
        if complete || self.completion_len == self.max_tokens {
            let stop = self.tell_rest() || complete;
            return Some(Some(if stop { FinishReason::Stop } else { FinishReason::Length }));
        }
        Some(None)
    }

    /// Tells a token, and gives whether a stop string ends the completion.
    fn tell(&mut self, token: Token, may_stop: bool) -> bool {
        let Some(detokenizer) = &mut self.detokenizer else {
            self.events.send_token(self.choice, token);
            return false;
        };
        let (text, stopped) = detokenizer.push(token, may_stop);
        text.into_iter().for_each(|text| self.events.send(text));
        stopped
    }

    /// Tells what was held back, and gives whether there is a stop string in it.
    fn tell_rest(&mut self) -> bool {
        let Some(detokenizer) = &mut self.detokenizer else { return false };
        let (text, stopped) = detokenizer.finish();
        text.into_iter().for_each(|text| self.events.send(text));
        stopped
    }

    /// Ends the completion as it is.
    pub(super) fn finish(&mut self, reason: FinishReason, metrics: &Metrics) {
        let first = self.choice == 0;
        let usage = Usage {
            prompt_tokens: if first { self.prompt_len } else { 0 },
            cached_tokens: if first { self.cached } else { 0 },
            completion_tokens: self.completion_len,
            work: self.work,
        };
        metrics.finished(reason, &usage, self.arrived.elapsed());
        self.end(Event::Done { choice: self.choice, reason, usage });
    }

    /// Ends the request with an error.
    pub(super) fn fail(&mut self, message: &str, metrics: &Metrics) {
        // In a step that failed late, some have their end already.
        if self.slot.is_none() {
            return;
        }
        metrics.ended("error");
        self.end(Event::Failed(message.to_string()));
    }

    fn end(&mut self, event: Event) {
        // Free before the client knows, who may come back at once.
        self.slot = None;
        self.events.send(event);
    }
}
