//! An engine in this process, evaluated through the same requests that it serves.

use super::lm::{Chosen, Encoder, Generated, How, Lm, LmError, Reads, Routed, Scored};
use crate::engine::Text;
use crate::engine::api::{Event, Generate, PromptReport, TokenReport};
use crate::moe::cost::CostModel;
use crate::moe::router::{Signals, signals};
use crate::types::{GenerateRequest, ModelShape, PromptScoring, RouterSpec, TokenId, Work};
use std::ops::Range;
use std::sync::Arc;

/// An engine that is evaluated.
pub struct InProcess {
    engine: Arc<dyn Generate>,
    cost: CostModel,
    moe_layers: usize,
    encoder: Encoder,
}

/// What a request came to.
struct Answered {
    prompt: PromptReport,
    text: String,
    tokens: Vec<TokenReport>,
}

impl InProcess {
    /// `engine` serves a model of `shape` whose tokenizer is `text`.
    pub fn new(engine: Arc<dyn Generate>, text: Text, shape: &ModelShape) -> Self {
        let (cost, moe_layers) = (CostModel::new(shape), shape.moe.layers);
        Self { engine, encoder: Encoder::new(text), cost, moe_layers }
    }

    fn ask(&self, request: GenerateRequest) -> Result<Answered, LmError> {
        let mut events = self.engine.submit(request).map_err(|e| LmError(e.to_string()))?;
        let mut answered = Answered { prompt: PromptReport::default(), text: String::new(), tokens: Vec::new() };
        loop {
            match events.blocking_next() {
                Some(Event::Prompt(report)) => answered.prompt = report,
                Some(Event::Text { text, tokens, .. }) => {
                    answered.text.push_str(&text);
                    answered.tokens.extend(tokens);
                }
                Some(Event::Done { .. }) => return Ok(answered),
                Some(Event::Failed(message)) => return Err(LmError(message)),
                None => return Err(LmError("the engine stopped".into())),
            }
        }
    }

    /// Generates `max_tokens` tokens after `prompt`, whatever ends a text, and tells what routing did.
    ///
    /// # Errors
    /// As for [`Lm::generate`].
    pub(super) fn run(&self, prompt: &[TokenId], max_tokens: usize, router: &RouterSpec) -> Result<Routed, LmError> {
        let how = How { router: Some(router), shared: 0 };
        let request = GenerateRequest { ignore_eos: true, ..Self::request(prompt, max_tokens, &how) };
        Ok(self.routed(&self.ask(request)?, &how, prompt.len() - 1..prompt.len()))
    }

    /// Counts the passes over the prompt's tokens from `how.shared` on, of which those in `scored` were followed by the LM
    /// head, and over the completion's tokens but the last.
    fn routed(&self, answered: &Answered, how: &How<'_>, scored: Range<usize>) -> Routed {
        let read: Signals = signals(how.router.unwrap_or(&self.engine.info().router));
        let mut routed = Routed { rows_l: vec![0; self.moe_layers], ..Default::default() };
        let mut work = Work::default();
        let mut pass = |position: usize, k_l: &[u16], lm_head: bool| {
            let rows = k_l.iter().map(|k| u64::from(*k)).sum();
            work += self.cost.token(position as u64 + 1, rows, lm_head);
            work.forward.ran += self.cost.signals(read, lm_head);
            routed.rows_l.iter_mut().zip(k_l).for_each(|(sum, k)| *sum += u64::from(*k));
            for k in k_l.iter().map(|k| usize::from(*k)) {
                routed.k_histogram.resize(routed.k_histogram.len().max(k + 1), 0);
                routed.k_histogram[k] += 1;
            }
        };
        let prompt = &answered.prompt.experts;
        for (position, k_l) in prompt.iter().enumerate().skip(how.shared) {
            if let Some(k_l) = k_l {
                pass(position, k_l, scored.contains(&position));
            }
        }
        // The pass that drew the first token is the one over the prompt's last.
        for (i, token) in answered.tokens.iter().enumerate().skip(1) {
            pass(prompt.len() + i - 1, &token.experts, true);
        }
        routed.tokens = work.tokens;
        routed.expert_flops = [work.experts.ran, work.experts.native];
        routed.forward_flops = [work.forward.ran, work.forward.native];
        routed
    }

    /// A request whose prompt tokens from `how.shared` on are all computed and traced.
    fn request(prompt: &[TokenId], max_tokens: usize, how: &How<'_>) -> GenerateRequest {
        GenerateRequest {
            trace: true,
            reuse_max: Some(how.shared),
            router: how.router.cloned(),
            ..GenerateRequest::greedy(prompt.to_vec(), max_tokens)
        }
    }
}

impl Lm for InProcess {
    fn max_length(&self) -> usize {
        self.engine.info().limits.max_model_len
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, LmError> {
        self.encoder.encode(text)
    }

    fn text_bytes(&self, tokens: &[TokenId]) -> usize {
        self.encoder.bytes(tokens)
    }

    fn choose(&self, context: &[TokenId], continuations: &[Vec<TokenId>], how: &How<'_>) -> Result<Chosen, LmError> {
        let from = context.len();
        // Continuations that differ in one token alone are read off one distribution.
        let stem = |c: &Vec<TokenId>| c[..c.len() - 1].to_vec();
        let mut asked: Vec<(Vec<TokenId>, Vec<Vec<f32>>)> = Vec::new();
        let mut routed = Routed::default();
        let mut log_likelihoods = Vec::with_capacity(continuations.len());
        for continuation in continuations {
            let stem = stem(continuation);
            let known = asked.iter().position(|(s, _)| *s == stem);
            let known = match known {
                Some(known) => known,
                None => {
                    let scoring = Some(PromptScoring { top: 0, from, whole: true });
                    let prompt = [context, &stem].concat();
                    let request = GenerateRequest { scoring, ..Self::request(&prompt, 0, how) };
                    let answered = self.ask(request)?;
                    whole(&answered.prompt, stem.len() + 1)?;
                    routed.add(&self.routed(&answered, how, from - 1..prompt.len()));
                    asked.push((stem, answered.prompt.distributions));
                    asked.len() - 1
                }
            };
            let logprobs = asked[known].1.iter().zip(continuation);
            log_likelihoods.push(logprobs.map(|(distribution, id)| f64::from(distribution[*id as usize])).sum());
        }
        Ok(Chosen { log_likelihoods, routed: Some(routed) })
    }

    fn generate(
        &self,
        prompt: &[TokenId],
        until: &[String],
        max_tokens: usize,
        how: &How<'_>,
    ) -> Result<Generated, LmError> {
        let request = GenerateRequest { stop: until.to_vec(), ..Self::request(prompt, max_tokens, how) };
        let answered = self.ask(request)?;
        let routed = self.routed(&answered, how, prompt.len() - 1..prompt.len());
        Ok(Generated { text: answered.text, routed: Some(routed) })
    }

    fn score(&self, window: &[TokenId], how: &How<'_>) -> Result<Scored, LmError> {
        let scoring = Some(PromptScoring { top: 0, from: 1, whole: false });
        let answered = self.ask(GenerateRequest { scoring, ..Self::request(window, 0, how) })?;
        let routed = self.routed(&answered, how, 0..window.len() - 1);
        let logprobs = answered.prompt.scores.iter().flatten().map(|score| f64::from(score.logprob)).collect();
        Ok(Scored { logprobs, routed: Some(routed) })
    }

    fn distributions(
        &self,
        prompt: &[TokenId],
        from: usize,
        router: &RouterSpec,
    ) -> Result<Option<Vec<Vec<f32>>>, LmError> {
        let scoring = Some(PromptScoring { top: 0, from, whole: true });
        let greedy = GenerateRequest::greedy(prompt.to_vec(), 0);
        let answered = self.ask(GenerateRequest { scoring, router: Some(router.clone()), ..greedy })?;
        whole(&answered.prompt, prompt.len() + 1 - from)?;
        Ok(Some(answered.prompt.distributions))
    }

    fn expert_reads(&self) -> Result<Option<Reads>, LmError> {
        Ok(Reads::parse(&self.engine.metrics()))
    }
}

/// Checks that as many distributions are told as there must be, and that they are some: of logits that are no numbers
/// every probability is at the floor.
fn whole(prompt: &PromptReport, wanted: usize) -> Result<(), LmError> {
    let told = &prompt.distributions;
    if told.len() != wanted {
        return Err(LmError(format!("the engine told {} distributions instead of {wanted}", told.len())));
    }
    if told.iter().any(|d| d.windows(2).all(|pair| pair[0] == pair[1])) {
        return Err(LmError(
            "the model's logits are no numbers, or all alike: check the checkpoint and --dtype".into(),
        ));
    }
    Ok(())
}
