//! Runs the steps of a test, and counts what they did.

use super::settings::Test;
use super::traffic::Traffic;
use super::{BenchError, Settings};
use crate::model::{CausalLm, StepInput};
use crate::moe::cost::CostModel;
use crate::moe::router::StepTokens;
use crate::moe::{Policy, RouteCtx, StepTrace};
use crate::ops::{self, KvCache, KvShape, Segment, StepLayout};
use crate::types::{BlockId, TokenId, Work, split_mix};
use candle_core::Tensor;
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Instant;

/// Positions per KV block, as in the engine.
const BLOCK_SIZE: usize = 16;
/// Tokens of a step that fills contexts, which is not timed.
const FILL_TOKENS: usize = 2048;
/// Bytes of logits that are on the host at the same time, as in the engine.
const LOGITS_BYTES_MAX: usize = 64 << 20;

/// One run of a test.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Measured {
    pub seconds: f64,
    pub work: Work,
    pub bytes: u64,
}

/// A model with sequences to run it on.
pub(super) struct Steps<'a> {
    model: &'a CausalLm,
    kv: KvCache,
    cost: CostModel,
    traffic: Traffic,
    context: usize,
    /// KV blocks of a sequence that decodes.
    blocks_each: usize,
    seed: u64,
}

/// A step that ran.
struct Done {
    segments: Vec<Segment>,
    trace: StepTrace,
    /// Rows whose logits were computed.
    logit_rows: Vec<u32>,
}

impl<'a> Steps<'a> {
    /// Takes the memory of the KV cache.
    ///
    /// # Errors
    /// More than is free.
    pub(super) fn new(model: &'a CausalLm, settings: &Settings) -> Result<Self, BenchError> {
        let (shape, backend) = (model.shape(), model.backend());
        let blocks_each = settings.decode_positions().div_ceil(BLOCK_SIZE);
        let batch_max = settings.batches.iter().copied().max().unwrap_or(0);
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: settings.prompt_max().div_ceil(BLOCK_SIZE).max(blocks_each * batch_max),
            block_size: BLOCK_SIZE,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        let needed = (kv_shape.blocks as u64).saturating_mul(kv_shape.block_bytes(backend.dtype()) as u64);
        if let Some(free) = backend.free_memory().filter(|free| needed > *free) {
            return Err(BenchError::Memory { needed_mib: needed >> 20, free_mib: free >> 20 });
        }
        Ok(Self {
            model,
            kv: KvCache::new(kv_shape, backend)?,
            cost: CostModel::new(shape),
            traffic: Traffic::new(model),
            context: settings.context,
            blocks_each,
            seed: settings.seed,
        })
    }

    /// Bytes of the KV cache.
    pub(super) fn kv_bytes(&self) -> u64 {
        let shape = self.kv.shape();
        (shape.blocks * shape.block_bytes(self.model.backend().dtype())) as u64
    }

    /// Writes the contexts of `batch` sequences to the KV cache. Prompts overwrite them.
    ///
    /// # Errors
    /// A failure of the device.
    pub(super) fn fill(&mut self, batch: usize, policy: &Arc<Policy>) -> Result<(), BenchError> {
        let together = (FILL_TOKENS / self.context.max(1)).max(1);
        for first in (0..batch).step_by(together) {
            for start in (0..self.context).step_by(FILL_TOKENS) {
                let len = FILL_TOKENS.min(self.context - start);
                let sequences = first..batch.min(first + together);
                let segments: Vec<Segment> = sequences.clone().map(|s| self.segment(s, start, len)).collect();
                let tokens: Vec<TokenId> = sequences.flat_map(|s| self.tokens(s, start..start + len)).collect();
                self.step(&tokens, segments, Vec::new(), (policy, false))?;
            }
        }
        Ok(self.model.backend().device().synchronize()?)
    }

    /// Runs `test` once.
    ///
    /// # Errors
    /// A failure of the device, or logits that are no numbers.
    pub(super) fn run(&mut self, test: Test, policy: &Arc<Policy>) -> Result<Measured, BenchError> {
        match test {
            Test::Prefill { prompt } => self.prefill(prompt, policy),
            Test::Decode { generate, batch } => self.decode(generate, batch, policy),
        }
    }

    fn prefill(&mut self, prompt: usize, policy: &Arc<Policy>) -> Result<Measured, BenchError> {
        let tokens = self.tokens(0, 0..prompt);
        let blocks = (0..prompt.div_ceil(BLOCK_SIZE) as u32).map(BlockId).collect();
        let segments = vec![Segment { start: 0, len: prompt, blocks }];
        let started = Instant::now();
        let (_, done) = self.step(&tokens, segments, vec![prompt as u32 - 1], (policy, false))?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(self.measured(seconds, &[done], policy))
    }

    fn decode(&mut self, generate: usize, batch: usize, policy: &Arc<Policy>) -> Result<Measured, BenchError> {
        let context = self.context;
        let mut tokens: Vec<TokenId> = (0..batch).flat_map(|s| self.tokens(s, context..context + 1)).collect();
        let rows: Vec<u32> = (0..batch as u32).collect();
        let mut steps = Vec::with_capacity(generate);
        let started = Instant::now();
        for position in context..context + generate {
            let segments = (0..batch).map(|s| self.segment(s, position, 1)).collect();
            let (next, done) = self.step(&tokens, segments, rows.clone(), (policy, true))?;
            tokens = next;
            steps.push(done);
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(self.measured(seconds, &steps, policy))
    }

    /// Tokens of sequence `sequence` that no one wrote.
    fn tokens(&self, sequence: usize, positions: std::ops::Range<usize>) -> Vec<TokenId> {
        let seed = split_mix(self.seed, sequence as u64);
        let vocab = self.model.shape().vocab as u64;
        positions.map(|position| (split_mix(seed, position as u64) % vocab) as TokenId).collect()
    }

    fn segment(&self, sequence: usize, start: usize, len: usize) -> Segment {
        let first = (sequence * self.blocks_each) as u32;
        let blocks = (first..first + self.blocks_each as u32).map(BlockId).collect();
        Segment { start, len, blocks }
    }

    /// One step, made as the engine makes it, and the likeliest token after each of `logit_rows`.
    fn step(
        &mut self,
        tokens: &[TokenId],
        segments: Vec<Segment>,
        logit_rows: Vec<u32>,
        how: (&Arc<Policy>, bool),
    ) -> Result<(Vec<TokenId>, Done), BenchError> {
        ops::on_pool(|| {
            let (hidden, done) = self.forward(tokens, segments, logit_rows, how)?;
            Ok((self.greedy(hidden.as_ref(), how.0)?, done))
        })
    }

    fn forward(
        &mut self,
        tokens: &[TokenId],
        segments: Vec<Segment>,
        logit_rows: Vec<u32>,
        (policy, decodes): (&Arc<Policy>, bool),
    ) -> Result<(Option<Tensor>, Done), BenchError> {
        let layout = StepLayout::new(segments, &self.kv, self.model.backend())?;
        let mut step = StepTokens {
            token_t: tokens.to_vec(),
            position_t: layout.positions().to_vec(),
            policy_t: vec![0; tokens.len()],
            ..StepTokens::default()
        };
        if !policy.batch_invariant() {
            (step.tenant_t, step.decodes_t) = (vec![0; tokens.len()], vec![decodes; tokens.len()]);
        }
        let input = StepInput { tokens, layout: &layout, logit_rows: &logit_rows };
        let mut routes = RouteCtx::new(&self.model.shape().moe, std::slice::from_ref(policy), &step);
        let hidden = self.model.forward(&input, &mut self.kv, &mut routes)?;
        let trace = routes.into_trace();
        Ok((hidden, Done { segments: layout.segments().to_vec(), trace, logit_rows }))
    }

    /// The likeliest token after every row of `hidden`.
    fn greedy(&self, hidden: Option<&Tensor>, policy: &Arc<Policy>) -> Result<Vec<TokenId>, BenchError> {
        let Some(hidden) = hidden else { return Ok(Vec::new()) };
        let (vocab, rows) = (self.model.shape().vocab, hidden.dim(0)?);
        let rows_max = (LOGITS_BYTES_MAX / (vocab * size_of::<f32>())).max(1);
        let mut tokens = Vec::with_capacity(rows);
        for start in (0..rows).step_by(rows_max) {
            let logits = ops::to_host(&self.model.logits(hidden, start, rows_max.min(rows - start))?)?;
            let best: Vec<Option<TokenId>> = logits.par_chunks_exact(vocab).map(argmax).collect();
            tokens.extend(best);
        }
        let token = |(row, token): (usize, Option<TokenId>)| {
            token.ok_or_else(|| BenchError::Logits { router: policy.spec().to_string(), row })
        };
        tokens.into_iter().enumerate().map(token).collect()
    }

    /// What `steps` did, counted as the engine counts it.
    fn measured(&self, seconds: f64, steps: &[Done], policy: &Policy) -> Measured {
        let layers = self.model.shape().moe.layers;
        let mut measured = Measured { seconds, ..Measured::default() };
        for done in steps {
            measured.bytes += self.traffic.step(&done.segments, &done.trace);
            let positions = done.segments.iter().flat_map(|s| s.start..s.start + s.len);
            for (row, position) in positions.enumerate() {
                let expert_rows = done.trace.k_tl[row * layers..][..layers].iter().map(|k| u64::from(*k)).sum();
                // Rows ascend.
                let lm_head = done.logit_rows.binary_search(&(row as u32)).is_ok();
                let mut work = self.cost.token(position as u64 + 1, expert_rows, lm_head);
                work.forward.ran += self.cost.signals(policy.signals(), lm_head);
                measured.work += work;
            }
        }
        measured
    }
}

/// Where the largest of `logits` is; nothing where none is a number.
fn argmax(logits: &[f32]) -> Option<TokenId> {
    // Lanes, so that the compiler takes many at a time.
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *logit);
        }
    }
    let best = lanes.into_iter().fold(rest, larger);
    logits.iter().position(|logit| *logit == best && best.is_finite()).map(|at| at as TokenId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_logits_is_taken() {
        for len in [1, 15, 16, 17, 100] {
            for at in [0, len / 2, len - 1] {
                let mut logits = vec![-1.0; len];
                logits[at..].fill(2.0);
                assert_eq!(argmax(&logits), Some(at as TokenId), "{at} of {len}");
            }
        }
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0]), Some(2));
        assert_eq!((argmax(&[f32::NAN; 20]), argmax(&[])), (None, None));
    }
}
